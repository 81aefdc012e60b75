"""Locks, semaphores and events that programs and tasks share by name: `Lock`, `Semaphore`, `Event`."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from zmqtasks.errors import LeaseError
from zmqtasks.fetching import parse_timeout
from zmqtasks.named import Named, Request, Timeout
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.protocol.ops import AcquireLease, CloseSemaphore, GiveUp, ReadLeases, SetEvent, WaitEvent

if TYPE_CHECKING:
    from zmqtasks.client import Client


class Semaphore(Named):
    """At most `max_leases` leases at a time, on the whole cluster; who waits is served in order.

    Programs and tasks that name the same semaphore share it, all with the same `max_leases`; without a name it is new.
    Pickled into tasks it keeps its name, not its leases. A task that waits gives its slot back meanwhile. The leases of a
    client that closes, or is lost, are free again; those of tasks when their worker's process ends.

    With an asynchronous client (and in async tasks) the methods give coroutines; use `async with`.

    >>> semaphore = Semaphore(max_leases=2, name="database")
    >>> with semaphore:
    ...     pass
    """

    _prefix = "semaphore"
    _error = LeaseError

    def __init__(self, max_leases: int = 1, name: str | None = None, client: Client | None = None) -> None:
        if not isinstance(max_leases, int) or max_leases < 1:
            raise ValueError(f"max_leases={max_leases!r}: give an integer, at least 1")
        super().__init__(name, client)
        self.max_leases = max_leases
        self._leases: deque[tuple[ClientNode, int]] = deque()

    def acquire(self, timeout: Timeout = None) -> Any:
        """Takes a lease; False when there is none within `timeout` (None: waits as long as it takes; 0: does not wait).

        A wait that is interrupted or cancelled leaves nothing behind. Raises LeaseError when the semaphore was closed, or is in
        use with another `max_leases`.
        """
        timeout_s = parse_timeout(timeout)
        return self._ask(lambda number: AcquireLease(number, self.name, self.max_leases, timeout_s), self._acquired)

    def _acquired(self, request: Request, granted: bool) -> bool:
        if granted:
            self._leases.append((request.node, request.number))
        return granted

    def release(self) -> Any:
        """Gives back a lease that this object has taken. Raises LeaseError when it has none."""
        try:
            node, lease = self._leases.popleft()
        except IndexError:
            raise LeaseError(f"{self!r} was not acquired by this object, or was released already") from None
        request = Request(node, lambda number: GiveUp(number, lease), LeaseError)
        if node.client._called_asynchronously():
            return self._release_async(request, lease)
        try:
            return request.wait(self._keeps_slot)
        finally:  # once more does no harm, and is needed when an interrupt came before the first was on its way
            if not request.number:
                node.tell(GiveUp(0, lease))

    async def _release_async(self, request: Request, lease: int) -> Any:
        try:
            return await request.wait_async()
        finally:
            if not request.number:
                request.node.tell(GiveUp(0, lease))

    def get_value(self) -> Any:
        """How many leases are taken, by anybody."""
        return self._ask(lambda number: ReadLeases(number, self.name))

    def leases(self) -> Any:
        """Who has them: for each lease that is taken the name of its client, the oldest first.

        Leases of tasks are those of `tasks of WORKER`; a client has the name that it was given (`Client(name=...)`).
        """
        return self._ask(lambda number: ReadLeases(number, self.name, True))

    def close(self) -> Any:
        """Ends the semaphore for all: who waits or asks for a lease gets a LeaseError."""
        return self._ask(lambda number: CloseSemaphore(number, self.name), lambda request, answer: None)

    def __enter__(self) -> Self:
        if self.client._called_asynchronously():
            raise TypeError(f"{self!r} is used asynchronously: use `async with`")
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    def __reduce__(self) -> Any:
        return type(self), (self.max_leases, self.name)


class Lock(Semaphore):
    """A lock for the whole cluster: a `Semaphore` of one lease. Not reentrant.

    >>> with Lock("results.csv"):
    ...     pass
    """

    _prefix = "lock"

    def __init__(self, name: str | None = None, client: Client | None = None) -> None:
        super().__init__(1, name, client)

    def acquire(self, blocking: bool = True, timeout: Timeout = None) -> Any:  # type: ignore[override]
        """Takes the lock; False when it is not free within `timeout`, or now, unless `blocking`.

        As in dask.distributed the first argument is `blocking`. The rest as in `Semaphore.acquire`.
        """
        if not blocking and timeout is not None:
            raise ValueError(f"timeout={timeout!r}: without blocking there is nothing to wait for; leave it out")
        return super().acquire(timeout if blocking else 0)

    def locked(self) -> Any:
        """Whether anybody holds it."""
        return self._ask(lambda number: ReadLeases(number, self.name), lambda request, leases: leases > 0)

    def __reduce__(self) -> Any:
        return type(self), (self.name,)


class Event(Named):
    """A flag that programs and tasks wait for. It is not set at first, and remains set until it is cleared.

    Shared by name, as a `Semaphore`.

    >>> event = Event("ready")
    >>> event.set()
    >>> event.wait(timeout="2s")
    True
    """

    _prefix = "event"

    def __init__(self, name: str | None = None, client: Client | None = None) -> None:
        super().__init__(name, client)

    def set(self) -> Any:
        """Sets it: all who wait go on."""
        return self._ask(lambda number: SetEvent(number, self.name, True), lambda request, answer: None)

    def clear(self) -> Any:
        """It is not set any more."""
        return self._ask(lambda number: SetEvent(number, self.name, False), lambda request, answer: None)

    def wait(self, timeout: Timeout = None) -> Any:
        """Waits until it is set; False when it is not within `timeout`."""
        timeout_s = parse_timeout(timeout)
        return self._ask(lambda number: WaitEvent(number, self.name, timeout_s))

    def is_set(self) -> Any:
        """Whether it is set now."""
        return self._ask(lambda number: WaitEvent(number, self.name, 0.0))

    def __reduce__(self) -> Any:
        return type(self), (self.name,)
