"""Waiting for futures and opening their results: what `Future.result`, `Client.gather` and the others are made of."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, TypeVar

from zmqtasks import sessions
from zmqtasks.errors import ConfigError, ZmqTasksError
from zmqtasks.future import Future, timed_out
from zmqtasks.ids import Key
from zmqtasks.nodes.client.fetch import fetch
from zmqtasks.nodes.client.loop import Work, run_in
from zmqtasks.nodes.client.state import FINISHED, PENDING, FutureState
from zmqtasks.nodes.client.waiters import Countdown, LoopCountdown, ThreadCountdown, add_waiter, remove_waiter
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, deserialize_inline

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

T = TypeVar("T")

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}
_CONTEXT = "zmqtasks.nodes.worker.context"


class Skipped:
    """Stands for a result that `gather(errors="skip")` leaves out."""


SKIPPED: Final = Skipped()

Fetched: TypeAlias = "dict[ClientNode, dict[Key, Payload | ZmqTasksError]]"
"""By client: keys of two clusters are alike."""

_not_in_task = nullcontext()
_NOTHING: dict[Key, Payload | ZmqTasksError] = {}


def parse_timeout(timeout: float | str | timedelta | None) -> float | None:
    """Seconds from a number, a text such as "500ms" or "2 min", or a timedelta; raises ConfigError for anything else."""
    if timeout is None:
        return None
    if isinstance(timeout, timedelta):
        return timeout.total_seconds()
    if isinstance(timeout, str):
        text = timeout.strip().replace(" ", "").lower()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        try:
            return float(number) * _UNITS[text[len(number) :]]
        except (ValueError, KeyError):
            raise ConfigError(f"timeout={timeout!r} is not a time: use seconds, or a text such as '500ms'") from None
    if isinstance(timeout, (int, float)):
        return float(timeout)
    raise ConfigError(f"timeout={timeout!r} is not a time: use seconds, or a text such as '500ms'")


def task_waiting() -> AbstractContextManager[None]:
    """Inside a task: gives the worker's slot back while open. Elsewhere: nothing."""
    context = sys.modules.get(_CONTEXT)
    if context is None or context.current_thread() is None:
        return _not_in_task
    waiting: AbstractContextManager[None] = context.waiting()
    return waiting


def in_async_task() -> bool:
    """Whether this code belongs to an `async def` task."""
    context = sys.modules.get(_CONTEXT)
    return context is not None and context.local.thread is None and context.async_thread.get() is not None


class Deadline:
    """Counts down a time limit; None: no limit."""

    __slots__ = ("_end", "limit_s")

    def __init__(self, timeout: float | str | timedelta | None) -> None:
        self.limit_s = parse_timeout(timeout)
        self._end = None if self.limit_s is None else time.monotonic() + self.limit_s

    def remaining_s(self) -> float | None:
        """Seconds left, not negative."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


# --- waiting --------------------------------------------------------------------------------------------------------


def _by_node(futures: Sequence[Future[Any]]) -> list[tuple[ClientNode, list[FutureState]]]:
    owners = {future._state.owner for future in futures}
    if len(owners) == 1:
        return [(owners.pop(), [future._state for future in futures])]
    return [(node, [f._state for f in futures if f._state.owner is node]) for node in owners]


def _register(countdown: Countdown, node: ClientNode, states: Sequence[FutureState]) -> bool:
    """Whether there is something to wait for; then `countdown` is told of it."""
    with node.lock:
        # Inside: one that fails just before it is waited for would be missed, and the wait go on for the others.
        if countdown.eager and any(s.status is not PENDING and s.status is not FINISHED for s in states):
            return False
        countdown.remaining = add_waiter(countdown, states)
        return countdown.remaining > 0


def _unregister(countdown: Countdown, node: ClientNode, states: Sequence[FutureState]) -> None:
    with node.lock:
        remove_waiter(countdown, states)


def wait_settled(futures: Sequence[Future[Any]], timeout: Any = None, eager: bool = False) -> None:
    """Waits until all have settled; if `eager`, or one has not finished well. Raises TaskTimeoutError."""
    deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
    for node, states in _by_node(futures):
        countdown = ThreadCountdown(eager)
        if not _register(countdown, node, states):
            continue
        if node.loop_thread is not None and node.loop_thread.is_current():
            _unregister(countdown, node, states)
            raise RuntimeError("waiting for a future in the event loop that brings its result would wait for ever")
        settled = False
        try:
            with task_waiting():
                settled = countdown.wait(deadline.remaining_s())
        finally:
            if not settled or countdown.remaining:
                _unregister(countdown, node, states)
        if not settled:
            raise timed_out(_still_pending(futures), deadline.limit_s, node)


def _wait_for_one(state: FutureState) -> None:
    """As `wait_settled` for one future outside of tasks, in few steps: the loop gets the interpreter only when this waits."""
    node: ClientNode = state.owner
    if node.loop_thread is None or node.loop_thread.is_current():
        return  # the general way has the error for it
    countdown = ThreadCountdown()
    with node.lock:
        countdown.remaining = add_waiter(countdown, (state,))
    if countdown.remaining:
        try:
            countdown.wait(None)
        finally:
            if countdown.remaining:
                _unregister(countdown, node, (state,))


async def wait_settled_async(futures: Sequence[Future[Any]], timeout: Any = None, eager: bool = False) -> None:
    """As `wait_settled`, for coroutines in any loop."""
    deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
    for node, states in _by_node(futures):
        countdown = LoopCountdown(eager)
        if not _register(countdown, node, states):
            continue
        settled = False
        try:
            with task_waiting():
                settled = await countdown.wait(deadline.remaining_s())
        finally:
            if not settled or countdown.remaining:
                _unregister(countdown, node, states)
        if not settled:
            raise timed_out(_still_pending(futures), deadline.limit_s, node)


def _still_pending(futures: Sequence[Future[Any]]) -> str:
    pending = [future for future in futures if not future.done()]
    if len(futures) == 1:
        return f"{futures[0].key!r} did not end"
    first = f", {pending[0].key!r} among them," if pending else ""
    return f"{len(pending)} of {len(futures)} futures{first} did not end"


# --- opening --------------------------------------------------------------------------------------------------------


def run_on(node: ClientNode, work: Work[T], timeout_s: float | None = None) -> T:
    """The result of a coroutine of `node`, from any thread but its loop's."""
    if node.loop_thread is not None:
        return node.loop_thread.run(work, timeout_s)
    return run_in(node.loop, work, timeout_s)


async def await_on(node: ClientNode, coroutine: Coroutine[Any, Any, T]) -> T:
    """The same, awaited in any loop."""
    if asyncio.get_running_loop() is node.loop:
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, node.loop))


def _nodes_to_ask(futures: Sequence[Future[Any]], fetched: Fetched) -> list[tuple[ClientNode, list[FutureState]]]:
    """What is in memory somewhere and was not fetched yet, by client."""
    found: dict[ClientNode, dict[Key, FutureState]] = {}
    for future in futures:
        state = future._state
        if (
            type(state.value) is not bytes
            and state.status is FINISHED
            and state.key not in fetched.get(state.owner, _NOTHING)
        ):
            found.setdefault(state.owner, {})[state.key] = state
    for node in found:
        node.check_usable()
    return [(node, list(states.values())) for node, states in found.items()]


def _assemble(futures: Sequence[Future[Any]], fetched: Fetched, errors: str) -> list[Any] | None:
    """The results if all are here; None when some are to be fetched, or (again) to be waited for."""
    receiving = sessions.receiving
    outer = receiving.client
    try:
        return _opened(futures, fetched, errors)
    finally:
        receiving.client = outer


def _opened(futures: Sequence[Future[Any]], fetched: Fetched, errors: str) -> list[Any] | None:
    receiving = sessions.receiving
    owner: ClientNode | None = None
    values: list[Any] = []
    for future in futures:
        state = future._state
        value = state.value
        if state.owner is not owner:
            owner = state.owner
            receiving.client = owner.client
        if state.status is FINISHED:
            if type(value) is bytes:
                values.append(deserialize_inline(value))
                continue
            payload = fetched.get(owner, _NOTHING).get(state.key)
            if isinstance(payload, Payload):
                values.append(deserialize(payload))
                continue
            if payload is None:
                return None
            error: BaseException | None = payload
        else:
            error = future._error()
            if error is None:  # pending (again): somebody else's failure may be why the wait is over
                error = next(filter(None, map(Future._error, futures)), None) if errors == "raise" else None
                if error is None:
                    return None
        if errors == "raise":
            _raise(error)
        values.append(SKIPPED)
    return values


def _raise(error: BaseException | None) -> NoReturn:
    assert error is not None
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def result(future: Future[T], timeout: Any) -> T:
    """`Future.result` for threads."""
    state = future._state
    if timeout is None and state.status is PENDING and _CONTEXT not in sys.modules:
        _wait_for_one(state)
        value = state.value
        if state.status is FINISHED and type(value) is bytes:  # what `gather` does, for the commonest case
            receiving = sessions.receiving
            outer, receiving.client = receiving.client, state.owner.client
            try:
                return deserialize_inline(value)  # type: ignore[no-any-return]
            finally:
                receiving.client = outer
    (value,) = gather((future,), "raise", timeout)
    return value  # type: ignore[no-any-return]


async def result_async(future: Future[T], timeout: Any) -> T:
    """`Future.result` for coroutines."""
    (value,) = await gather_async((future,), "raise", timeout)
    return value  # type: ignore[no-any-return]


def gather(futures: Sequence[Future[Any]], errors: str, timeout: Any = None) -> list[Any]:
    """The results, in order; raises the first error, or puts SKIPPED in its place."""
    if not futures:
        return []
    deadline = Deadline(timeout)
    fetched: Fetched = {}
    while True:
        if any(future._state.status is PENDING for future in futures):
            wait_settled(futures, deadline, errors == "raise")
        values = _assemble(futures, fetched, errors)
        if values is not None:
            return values
        for node, states in _nodes_to_ask(futures, fetched):
            try:
                with task_waiting():
                    values_there = run_on(node, partial(fetch, node, states), deadline.remaining_s())
                fetched.setdefault(node, {}).update(values_there)
            except TimeoutError:
                raise timed_out(f"{len(states)} results could not be fetched", deadline.limit_s, node) from None


async def gather_async(futures: Sequence[Future[Any]], errors: str, timeout: Any = None) -> list[Any]:
    """As `gather`, for coroutines in any loop."""
    if not futures:
        return []
    deadline = Deadline(timeout)
    fetched: Fetched = {}
    while True:
        await wait_settled_async(futures, deadline, errors == "raise")
        values = _assemble(futures, fetched, errors)
        if values is not None:
            return values
        for node, states in _nodes_to_ask(futures, fetched):
            try:
                with task_waiting():
                    async with asyncio.timeout(deadline.remaining_s()):
                        values_there = await await_on(node, fetch(node, states))
                fetched.setdefault(node, {}).update(values_there)
            except TimeoutError:
                raise timed_out(f"{len(states)} results could not be fetched", deadline.limit_s, node) from None
