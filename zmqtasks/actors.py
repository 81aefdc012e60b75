"""Actors: objects that live on a worker, whose methods are called from anywhere (`Client.submit(cls, actor=True)`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from zmqtasks.errors import ZmqTasksError
from zmqtasks.future import Future, rebuild_future
from zmqtasks.ids import InstanceId, Key, format_key
from zmqtasks.protocol.references import note_reference

T = TypeVar("T")

MAKES_ACTOR = 1
"""`TaskOptions.actor` of a task whose result stays on its worker as an actor."""
CALLS_ACTOR = 2
"""Of a task that calls a method of the actor that is its last input."""

_SIZES = ("nbytes", "strides")

_CONTEXT = "zmqtasks.nodes.worker.context"


class ActorFuture(Future[T]):
    """The result of a call of an actor's method: `result`, `done`, `await` and the rest as of any future."""

    __slots__ = ("_actor_key",)

    _actor_key: Key

    def result(self, timeout: Any = None) -> T:
        """As `Future.result`. Raises RuntimeError for a call that can't begin before the one that waits for it here has ended."""
        context = sys.modules.get(_CONTEXT)
        if context is not None and not self.done():
            thread = context.local.thread
            if thread is not None and getattr(thread, "key", None) == self._actor_key:
                raise RuntimeError(
                    f"{self.key!s} waits for the method that waits for it: an actor's calls run one after the other; "
                    "call the method of `self`, or make both `async def`"
                )
        return super().result(timeout)


class Actor:
    """Stands for an object on a worker: calls of its methods give futures, its attributes can be read.

    Methods run one at a time, in the order in which the calls arrive, in a thread of the object's own; `async def` methods run on
    the worker's loop, and take turns wherever they wait. The object stays as long as this one, or a future of it, exists
    anywhere: it can be passed to tasks and to other actors. It is never moved or copied. When its worker ends, calls raise
    ActorLostError; `client.retry(future)` makes a new object under the same key, from the same arguments.

    Attributes are read in turn with the calls, and waited for; with an asynchronous client (and in async code) `await` them.

    >>> class Counter:
    ...     n = 0
    ...     def increment(self):
    ...         self.n += 1
    ...         return self.n
    >>> counter = client.submit(Counter, actor=True).result()
    >>> counter.increment().result()
    1
    >>> counter.n
    1
    """

    __slots__ = ("__weakref__", "_class_name", "_future", "_methods")

    __zmqtasks_fresh__ = True  # see `nodes.worker.store`: what holds a future of its own key must not be kept under it

    _future: Future[Any]
    _class_name: str
    _methods: frozenset[str]

    def __init__(self, future: Future[Any], class_name: str, methods: frozenset[str]) -> None:
        object.__setattr__(self, "_future", future)
        object.__setattr__(self, "_class_name", class_name)
        object.__setattr__(self, "_methods", methods)

    @property
    def key(self) -> Any:
        """The key of the task that has made it."""
        return self._future.key

    def __getattr__(self, name: str) -> Any:
        if name in Actor.__slots__ or (name.startswith("__") and name.endswith("__")) or name.startswith("_repr_"):
            raise AttributeError(name)  # half made, or looked for by pickle, copy, notebooks
        if name in self._methods:
            return _Method(self, name)
        if name in _SIZES:
            raise AttributeError(
                f"{name} of actors is not read, as it is looked for in all arguments: make it a method"
            )
        return _call(self, True, name, (), {}).result()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{self!r}: attributes of actors cannot be set from outside: make a method that sets {name!r}"
        )

    def __dir__(self) -> list[str]:
        return sorted({"key", *self._methods})

    def __repr__(self) -> str:
        return f"<Actor: {self._class_name}, key={self.key}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Actor):
            return False
        mine, its = self._future._state, other._future._state
        return bool(mine.key == its.key and mine.owner.scheduler_id == its.owner.scheduler_id)

    def __hash__(self) -> int:
        return hash(self._future._state.key)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        state = self._future._state
        note_reference(state)
        return _rebuild, (state.key, state.name, state.owner.scheduler_id, self._class_name, self._methods)


class _Method:
    """A method of an actor: call it."""

    __slots__ = ("__name__", "__self__")

    def __init__(self, actor: Actor, name: str) -> None:
        self.__self__ = actor
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> ActorFuture[Any]:
        return _call(self.__self__, False, self.__name__, args, kwargs)

    def __repr__(self) -> str:
        return f"<method {self.__name__} of {self.__self__!r}>"


def _call(actor: Actor, reads: bool, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ActorFuture[Any]:
    future = actor._future
    if future.status in ("cancelled", "lost"):
        error = future._error()
        raise ZmqTasksError(f"{actor!r} is gone: {error}") from error
    state = future.client._submitter.call(
        future._state.key, f"{actor._class_name}.{name}", (reads, name, *args), kwargs
    )
    call: ActorFuture[Any] = ActorFuture(state)
    call._actor_key = future._state.key
    return call


def _rebuild(key: Key, name: str, scheduler_id: InstanceId, class_name: str, methods: frozenset[str]) -> Actor:
    return Actor(rebuild_future(key, name, scheduler_id), class_name, methods)


def call_method(*args: Any, **kwargs: Any) -> Any:
    """What calls name as their function: workers find the method by themselves."""
    raise RuntimeError("calls of actors are for the threads of actors")


class ActorFactory:
    """The function of a task that makes an actor."""

    def __init__(self, cls: Callable[..., Any]) -> None:
        self.cls = cls

    def __call__(self, *args: Any, **kwargs: Any) -> _Made:
        from zmqtasks.nodes.worker.context import current_thread, get_worker

        instance = self.cls(*args, **kwargs)
        thread = current_thread()
        if thread is None or thread.current is None:
            raise RuntimeError(f"an actor of {self.cls!r} can only be made by a task")
        run = thread.current
        thread.executor.actors.make(run, instance)
        return _Made(run.key, run.group.name, get_worker().scheduler_id, type(instance))


class _Made:
    """The result of such a task; pickles as the `Actor`."""

    def __init__(self, key: Key, name: str, scheduler_id: InstanceId, cls: type) -> None:
        self.key = key
        self.name = name
        self.scheduler_id = scheduler_id
        self.cls = cls

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, (self.key, self.name, self.scheduler_id, self.cls.__name__, _methods_of(self.cls))

    def __repr__(self) -> str:
        return f"<actor {format_key(self.key, self.name)}>"


def _methods_of(cls: type) -> frozenset[str]:
    found = []
    for name in dir(cls):
        try:
            if not (name.startswith("__") and name.endswith("__")) and callable(getattr(cls, name)):
                found.append(name)
        except Exception:  # a descriptor that works on objects only
            continue
    return frozenset(found)
