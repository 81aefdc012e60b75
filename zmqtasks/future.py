"""Futures: what stands for the result of a task, or for a piece of data, on the cluster."""

from __future__ import annotations

import html
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from zmqtasks.errors import DeserializationError, TaskTimeoutError
from zmqtasks.ids import InstanceId, Key
from zmqtasks.nodes.client.failures import error_to_exception, fault_to_exception
from zmqtasks.nodes.client.names import UserKey, to_user, to_wire
from zmqtasks.nodes.client.state import CANCELLED, ERROR, FINISHED, LOST, PENDING, Fault, FutureState
from zmqtasks.protocol.ops import ErrorInfo
from zmqtasks.protocol.references import note_reference
from zmqtasks.protocol.serialize import deserialize_inline

if TYPE_CHECKING:
    from zmqtasks.client import Client
    from zmqtasks.nodes.client.node import ClientNode

T = TypeVar("T")


class Future(Generic[T]):
    """The result of a task that may still be running, or data that was scattered.

    The cluster keeps the result as long as a future of its key exists somewhere. A future among the arguments of
    `Client.submit` (or in lists, tuples, dicts and sets there) is replaced by its result; anywhere else it arrives as a
    future. Futures can be pickled: a future that is unpickled belongs to the client of that process.

    >>> future = client.submit(pow, 2, 10)
    >>> future
    <Future: pending, key: pow-1.1>
    >>> future.result()
    1024
    """

    __slots__ = ("__weakref__", "_state")

    __dask_future__ = True

    _state: FutureState

    def __init__(self, key: object, client: Client | None = None) -> None:
        """A future of an existing key; `client` is the default client when not given."""
        if type(key) is FutureState:
            self._state = key
            return
        if client is None:
            from zmqtasks.sessions import default_client

            client = default_client()
        self._state = client._want(to_wire(key))

    def __del__(self) -> None:
        # May run in any thread, inside garbage collection, at exit: no lock, no call that could wait.
        try:
            state = self._state
            node = state.owner
            node.dropped.append(state)
            if node.asleep:
                node.wake_to_collect()
        except Exception:  # half made, or the interpreter is going down
            pass

    # What is known

    @property
    def key(self) -> UserKey:
        """The key: what was given as `key`, or a readable name."""
        state = self._state
        return to_user(state.key, state.name)

    @property
    def client(self) -> Client:
        """The client that the future belongs to."""
        client: Client = self._node.client
        return client

    @property
    def status(self) -> str:
        """One of "pending", "finished", "error", "cancelled", "lost"."""
        return self._state.status.value

    @property
    def type(self) -> Any:
        """The type of the result, or None where that isn't known without fetching it."""
        state = self._state
        if state.status is not FINISHED or not isinstance(state.value, bytes):
            return None
        try:
            return type(deserialize_inline(state.value))
        except DeserializationError:
            return None

    @property
    def _node(self) -> ClientNode:
        node: ClientNode = self._state.owner
        return node

    def done(self) -> bool:
        """Whether the task has ended, in one way or another."""
        return self._state.status is not PENDING

    def cancelled(self) -> bool:
        """Whether the future was cancelled."""
        return self._state.status is CANCELLED

    # Waiting

    def result(self, timeout: float | str | None = None) -> T:
        """The result; waits for it, at most `timeout` seconds. With an asynchronous client: a coroutine.

        Each call gives a fresh object: small results are kept here as bytes and opened again, larger ones are fetched
        again (gather many futures at once: that takes fewer round trips).

        Raises what the task has raised, with its traceback; CancelledError; LostDataError and other errors of
        `zmqtasks.errors` when there is no result; TaskTimeoutError (a TimeoutError) when time is up.

        >>> client.submit(pow, 2, 10).result(timeout=5)
        1024
        """
        from zmqtasks.fetching import result, result_async  # this form costs a dictionary look-up when it is loaded

        if self.client._called_asynchronously():
            return result_async(self, timeout)  # type: ignore[return-value]
        return result(self, timeout)

    def exception(self, timeout: float | str | None = None) -> BaseException | None:
        """What the task has raised, or None when it has finished; waits as `result` does.

        >>> client.submit(int, "seven").exception()
        ValueError("invalid literal for int() with base 10: 'seven'")
        """
        from zmqtasks import fetching

        if self.client._called_asynchronously():
            return self._exception_async(timeout)  # type: ignore[return-value]
        deadline = fetching.Deadline(timeout)
        while True:  # a result that got lost right after the wait is pending again
            fetching.wait_settled([self], deadline)
            error = self._error()
            if error is not None or self._state.status is FINISHED:
                return error

    async def _exception_async(self, timeout: float | str | None) -> BaseException | None:
        from zmqtasks import fetching

        deadline = fetching.Deadline(timeout)
        while True:
            await fetching.wait_settled_async([self], deadline)
            error = self._error()
            if error is not None or self._state.status is FINISHED:
                return error

    def traceback(self, timeout: float | str | None = None) -> TracebackType | None:
        """The traceback of what the task has raised, for the `traceback` module; None when it has finished.

        >>> traceback.print_tb(future.traceback())  # doctest: +SKIP
        """
        if self.client._called_asynchronously():
            return self._traceback_async(timeout)  # type: ignore[return-value]
        exc = self.exception(timeout)
        return exc.__traceback__ if exc is not None else None

    async def _traceback_async(self, timeout: float | str | None) -> TracebackType | None:
        exc = await self._exception_async(timeout)
        return exc.__traceback__ if exc is not None else None

    def __await__(self) -> Generator[Any, None, T]:
        from zmqtasks import fetching

        return fetching.result_async(self, None).__await__()

    def add_done_callback(self, function: Callable[[Future[T]], Any]) -> None:
        """Calls `function(future)` once the task has ended: in a thread for callbacks, or in the loop of an asynchronous client.

        What the function raises is logged.

        >>> future.add_done_callback(lambda f: print(f.status))
        """
        from zmqtasks.callbacks import call_when_done

        call_when_done(self, function)

    # Doing

    def cancel(self, reason: str | None = None, msg: str | None = None, *, force: bool = False) -> Any:
        """Ends the task if nobody else wants its result: see `Client.cancel`."""
        return self.client.cancel([self], force=force, reason=reason, msg=msg)

    def retry(self) -> Any:
        """Tries a failed task again: see `Client.retry`."""
        return self.client.retry([self])

    def release(self) -> None:
        """Gives the result up now, instead of when the future goes away: this object is of no use from then on.

        >>> future.release()
        """
        state = self._state
        fault = Fault("CancelledError", "the future was released")
        self._state = FutureState(state.key, state.owner, state.name, 1, CANCELLED, fault, wanted=False)
        state.owner.dropped.append(state)
        if state.owner.asleep:
            state.owner.wake_to_collect()

    # Between processes

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        state = self._state
        note_reference(state)
        return rebuild_future, (state.key, state.name, state.owner.scheduler_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Future) and self._state is other._state

    def __hash__(self) -> int:
        return hash(self._state)

    def __repr__(self) -> str:
        state = self._state
        status = state.status.value
        detail = f", size: {state.size} B" if state.status is FINISHED and state.size else ""
        if isinstance(state.value, ErrorInfo):
            detail = f", {state.value.text.splitlines()[0] if state.value.text else 'failed'}"
        elif isinstance(state.value, Fault):
            detail = f", {state.value.reason}"
        return f"<Future: {status}{detail}, key: {self.key!s}>"

    def _repr_html_(self) -> str:
        colour = {"finished": "#2ca02c", "pending": "#888", "error": "#d62728"}.get(self.status, "#ff7f0e")
        return (
            f'<b>Future: {html.escape(self._state.name)}</b> <span style="color:{colour}">{self.status}</span>, '
            f"key: <code>{html.escape(str(self.key))}</code>"
        )

    # For this package

    def _error(self) -> BaseException | None:
        """What `result` would raise, for a settled future; None when it has finished."""
        state = self._state
        value = state.value
        if state.status is ERROR and isinstance(value, ErrorInfo):
            return error_to_exception(value)
        if state.status in (CANCELLED, LOST) and isinstance(value, Fault):
            return fault_to_exception(value, str(self.key))
        return None


def rebuild_future(key: Key, name: str, scheduler_id: InstanceId) -> Future[Any]:
    """A future from a pickle: one of the client that is in charge here, or of another open one if that is of another cluster."""
    from zmqtasks.sessions import client_of_scheduler, get_client, receiving

    try:
        client = receiving.client or get_client()
    except ValueError:
        raise DeserializationError(
            f"the future {to_user(key, name)!r} cannot be unpickled without a client: make a Client here first"
        ) from None
    if client._node.scheduler_id != scheduler_id:
        its_own = client_of_scheduler(scheduler_id)
        if its_own is None:
            raise DeserializationError(
                f"the future {to_user(key, name)!r} belongs to another cluster than the client in charge here, at "
                f"{client._node.address}: make a Client of that one, or pass on its result"
            )
        client = its_own
    return Future(client._want(key, name))


def timed_out(what: str, timeout_s: float | None, node: ClientNode) -> TaskTimeoutError:
    """The error for a wait that ran out of time."""
    within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
    rest = "it goes on" if node.cluster.workers else "the cluster has no workers"
    return TaskTimeoutError(f"{what} {within}; {rest}")
