"""Waiting for many futures: `as_completed`, `wait`, `fire_and_forget`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from zmqtasks import fetching
from zmqtasks.errors import CancelledError, ConfigError, TaskTimeoutError
from zmqtasks.fetching import Deadline, task_waiting
from zmqtasks.future import Future
from zmqtasks.nodes.client.failures import own_error
from zmqtasks.nodes.client.state import CANCELLED, FINISHED, LOST, PENDING, Fault, FutureState
from zmqtasks.nodes.client.waiters import Feed, LoopQueue, ThreadQueue, add_waiter

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

T = TypeVar("T")

ALL_COMPLETED = "ALL_COMPLETED"
FIRST_COMPLETED = "FIRST_COMPLETED"
FIRST_EXCEPTION = "FIRST_EXCEPTION"


def states_by_client(futures: Iterable[Future[Any]]) -> dict[ClientNode, list[FutureState]]:
    """The records of futures, by the node of the client that they belong to, which has its own lock, machine and keys."""
    groups: dict[ClientNode, list[FutureState]] = {}
    for future in futures:
        groups.setdefault(future._node, []).append(future._state)
    return groups


def futures_of(obj: Any) -> list[Future[Any]]:
    """The futures in nested lists, tuples, sets and dicts, and in dask's collections that were persisted."""
    found: list[Future[Any]] = []
    stack = [obj]
    while stack:
        item = stack.pop()
        if isinstance(item, Future):
            found.append(item)
        elif isinstance(item, dict):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple, set, frozenset, Iterator)):
            stack.extend(reversed(list(item)))
        elif hasattr(item, "__dask_graph__") and not isinstance(item, type):
            from zmqtasks.integrations.dask import futures_in

            found.extend(futures_in(item))
    return found


# --- wait -----------------------------------------------------------------------------------------------------------


class DoneAndNotDoneFutures(NamedTuple):
    """What `wait` gives."""

    done: set[Future[Any]]
    not_done: set[Future[Any]]


def wait(fs: Any, timeout: float | str | None = None, return_when: str = ALL_COMPLETED) -> Any:
    """Waits until futures have ended; gives the sets `done` and `not_done`. With an asynchronous client: a coroutine.

    `return_when` is "ALL_COMPLETED", "FIRST_COMPLETED" or "FIRST_EXCEPTION". Failed futures are done; they raise when their
    result is asked for. Raises CancelledError when futures were cancelled, TaskTimeoutError when time is up.

    >>> done, not_done = wait(client.map(slow, range(4)), return_when="FIRST_COMPLETED")
    """
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        raise ConfigError(f"return_when={return_when!r}: use {ALL_COMPLETED}, {FIRST_COMPLETED} or {FIRST_EXCEPTION}")
    futures = futures_of(fs)
    if futures and futures[0].client._called_asynchronously():
        return _wait_async(futures, timeout, return_when)
    if not futures or return_when == ALL_COMPLETED:
        if futures:
            fetching.wait_settled(futures, timeout)
        return _sorted(futures)
    completed: as_completed[Any]
    with as_completed(futures, timeout=timeout) as completed:
        for future in completed:
            if return_when == FIRST_COMPLETED or future._state.status is not FINISHED:
                break
    return _sorted(futures)


async def _wait_async(futures: list[Future[Any]], timeout: Any, return_when: str) -> DoneAndNotDoneFutures:
    if return_when == ALL_COMPLETED:
        await fetching.wait_settled_async(futures, timeout)
        return _sorted(futures)
    completed: as_completed[Any]
    with as_completed(futures, timeout=timeout) as completed:
        async for future in completed:
            if return_when == FIRST_COMPLETED or future._state.status is not FINISHED:
                break
    return _sorted(futures)


def _sorted(futures: list[Future[Any]]) -> DoneAndNotDoneFutures:
    gone = [future for future in futures if future._state.status in (CANCELLED, LOST)]
    if gone:
        faults = {fault for future in gone if isinstance(fault := future._state.value, Fault)}
        reasons = "; ".join(sorted({fault.reason for fault in faults}))
        # All for one reason, as a lost scheduler: that reason's own error.
        kind = faults.pop().kind if len(faults) == 1 else "CancelledError"
        raise own_error(kind)(f"{len(gone)} of {len(futures)} futures will not come true: {reasons}")
    done = {future for future in futures if future._state.status is not PENDING}
    return DoneAndNotDoneFutures(done, set(futures) - done)


def fire_and_forget(obj: Any) -> None:
    """Has the tasks run to their end although nobody holds a future of them.

    >>> fire_and_forget(client.submit(write_report))
    """
    for node, states in states_by_client(futures_of(obj)).items():
        node.check_usable()
        with node.lock:
            node.machine.keep([state.key for state in states])
            node.wake()


# --- as_completed ---------------------------------------------------------------------------------------------------


class as_completed(Generic[T]):  # noqa: N801 - the name that users of concurrent.futures and dask know
    """Gives futures as they end; more may be added meanwhile. Iterate with `for`, or with `async for`.

    With `with_results` it gives pairs of future and result; of a failed future, the result's error is raised, or with
    `raise_errors=False` given as (type, exception, traceback). Raises TaskTimeoutError `timeout` seconds after it was made.

    >>> for future in as_completed(client.map(slow, range(4))):
    ...     print(future.result())
    """

    def __init__(
        self,
        futures: Iterable[Future[Any]] | None = None,
        loop: object = None,
        with_results: bool = False,
        raise_errors: bool = True,
        *,
        timeout: float | str | None = None,
    ) -> None:
        self.with_results = with_results
        self.raise_errors = raise_errors
        self._deadline = Deadline(timeout)
        self._futures: dict[FutureState, list[Future[Any]]] = {}
        """Those that were not given yet; the same future may have been added more than once."""
        self._ready: deque[FutureState] = deque()
        """Ended when they were added."""
        self._queue: ThreadQueue | LoopQueue | None = None
        self._feed: Feed | None = None
        if futures is not None:
            self.update(futures)

    def __enter__(self) -> as_completed[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __del__(self) -> None:
        feed = getattr(self, "_feed", None)
        if feed is not None:
            feed.close()

    # Adding

    def add(self, future: Future[Any]) -> None:
        """One more future."""
        self.update((future,))

    def update(self, futures: Iterable[Future[Any]]) -> None:
        """More futures.

        >>> completed = as_completed([first])
        >>> for future in completed:
        ...     if (more := next_step(future.result())) is not None:
        ...         completed.add(more)
        """
        given = futures_of(futures if isinstance(futures, (list, tuple, set)) else list(futures))
        if not given:
            return
        if self._feed is None:
            self._queue = LoopQueue() if given[0].client._called_asynchronously() else ThreadQueue()
            self._feed = Feed(self._queue)
        nodes: dict[ClientNode, list[FutureState]] = {}
        for future in given:
            state = future._state
            if state in self._futures:
                self._futures[state].append(future)
            else:
                self._futures[state] = [future]
                nodes.setdefault(state.owner, []).append(state)
        for node, states in nodes.items():
            with node.lock:
                settled = [state for state in states if state.status is not PENDING]
                add_waiter(self._feed, states)
            self._ready.extend(settled)

    # Asking

    def count(self) -> int:
        """How many futures are still to come."""
        return sum(map(len, list(self._futures.values())))

    def is_empty(self) -> bool:
        """Whether none is to come."""
        return not self._futures

    def has_ready(self) -> bool:
        """Whether the next one is there already."""
        self._drain()
        return bool(self._ready)

    def clear(self) -> None:
        """Forgets the futures that were added."""
        if self._feed is not None:
            self._feed.close()
        self._feed = self._queue = None
        self._futures.clear()
        self._ready.clear()

    def next_batch(self, block: bool = True) -> list[Any]:
        """All that are there; with `block`, at least one.

        >>> while not completed.is_empty():
        ...     for future in completed.next_batch():
        ...         print(future.result())
        """
        self._drain()
        if block and not self._ready:
            if not self._futures:
                return []
            self._wait()
        return self._results(self._take_all())

    def batches(self) -> Iterator[list[Any]] | AsyncIterator[list[Any]]:
        """Everything in lists, each with all that was there at that time.

        >>> for batch in as_completed(futures, with_results=True).batches():
        ...     print(len(batch), "at once")
        """
        if isinstance(self._queue, LoopQueue):
            return self._batches_async()
        return self._batches()

    def _batches(self) -> Iterator[list[Any]]:
        while self._futures:
            yield self.next_batch(block=True)

    async def _batches_async(self) -> AsyncIterator[list[Any]]:
        while self._futures:
            await self._wait_async()
            yield await self._results_async(self._take_all())

    # Iterating

    def __iter__(self) -> as_completed[T]:
        return self

    def __next__(self) -> Any:
        if not self._futures:
            raise StopIteration
        self._wait()
        return self._results([self._take_one()])[0]

    def __aiter__(self) -> as_completed[T]:
        return self

    async def __anext__(self) -> Any:
        if not self._futures:
            raise StopAsyncIteration
        await self._wait_async()
        return (await self._results_async([self._take_one()]))[0]

    def _drain(self) -> None:
        if self._queue is not None:
            items = self._queue.items
            while items:
                state = items.popleft()
                if state in self._futures:
                    self._ready.append(state)

    def _wait(self) -> None:
        self._drain()
        while not self._ready:
            queue = self._queue
            if not isinstance(queue, ThreadQueue):
                raise TypeError("these futures belong to an asynchronous client: use `async for`")
            with task_waiting():
                if not queue.wait(self._deadline.remaining_s()):
                    raise self._timed_out()
            self._drain()

    async def _wait_async(self) -> None:
        self._drain()
        while not self._ready:
            queue = self._queue
            if isinstance(queue, ThreadQueue):  # a synchronous client, iterated in somebody's loop
                queue = self._move_to_loop()
            assert queue is not None
            with task_waiting():
                if not await queue.wait(self._deadline.remaining_s()):
                    raise self._timed_out()
            self._drain()

    def _move_to_loop(self) -> LoopQueue:
        old, self._queue = self._queue, LoopQueue()
        assert self._feed is not None
        assert old is not None
        self._feed.sink = self._queue
        while old.items:
            self._queue.put(old.items.popleft())
        return self._queue

    def _timed_out(self) -> TaskTimeoutError:
        return TaskTimeoutError(f"{self.count()} futures did not end within {self._deadline.limit_s:g} s; they go on")

    def _take_one(self) -> Future[Any]:
        state = self._ready[0]
        waiting = self._futures[state]
        future = waiting.pop()
        if not waiting:
            del self._futures[state]
            self._ready.popleft()
        return future

    def _take_all(self) -> list[Future[Any]]:
        taken = []
        while self._ready:
            taken.append(self._take_one())
        return taken

    def _results(self, futures: list[Future[Any]]) -> list[Any]:
        if not self.with_results:
            return futures
        if self.raise_errors:
            return list(zip(futures, fetching.gather(futures, "raise", self._remaining()), strict=True))
        return self._paired(futures, fetching.gather(futures, "skip", self._remaining()))

    async def _results_async(self, futures: list[Future[Any]]) -> list[Any]:
        if not self.with_results:
            return futures
        errors = "raise" if self.raise_errors else "skip"
        values = await fetching.gather_async(futures, errors, self._remaining())
        return self._paired(futures, values)

    def _remaining(self) -> float | None:
        return self._deadline.remaining_s()

    @staticmethod
    def _paired(futures: list[Future[Any]], values: list[Any]) -> list[Any]:
        pairs: list[Any] = []
        for future, value in zip(futures, values, strict=True):
            if value is fetching.SKIPPED:
                exc = future._error() or CancelledError(f"the result of {future.key!r} could not be fetched")
                value = (type(exc), exc, exc.__traceback__)
            pairs.append((future, value))
        return pairs


def parse_deadline(timeout: float | str | None) -> float:
    """The moment (of `time.monotonic`) at which `timeout` is over; never, for None."""
    limit_s = fetching.parse_timeout(timeout)
    return float("inf") if limit_s is None else time.monotonic() + limit_s
