"""Semaphores and events that clients share by name.

Theory of operation
-------------------
A request is known by its client's session and its number. It waits in the one line of its name, in the order of arrival, until
it is granted, given up by its client, or out of time: this is decided here alone, so a grant and a timeout cannot both happen.
A granted request is the lease itself: `GiveUp` with its number gives the lease back, and the same op ends a request that
waits. So a client that stops waiting need not know which of the two it was. What a client that leaves had asked for is
given up with it. A semaphore exists while somebody holds or waits for a lease of it, an event while it is set or waited for.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TypeAlias

import msgspec

from zmqtasks.nodes.scheduler.state import ClientState, SchedulerState
from zmqtasks.protocol.ops import AcquireLease, CloseSemaphore, GiveUp, QueryAnswered, ReadLeases, SetEvent, WaitEvent

Asked: TypeAlias = tuple[bytes, int]
"""A session, and the number of a request."""

LONGEST_WAIT_S = 1e9
"""More is for ever."""
STALE_TIMEOUTS = 64
"""So many entries of requests that are over are kept before the timeouts are sorted out."""
CLOSED_NAMES = 10_000
"""Closed semaphores that are remembered, the last ones."""


class _Line:
    """A semaphore (`limit` > 0) or an event, and who waits for it, in order."""

    def __init__(self, name: str, limit: int = 0) -> None:
        self.name = name
        self.limit = limit
        self.leases = 0
        self.is_set = False
        self.waiting: dict[Asked, ClientState] = {}


class Coordination:
    """All semaphores and events."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self._semaphores: dict[str, _Line] = {}
        self._events: dict[str, _Line] = {}
        self._closed: dict[str, None] = {}
        self._held: dict[Asked, _Line] = {}
        self._waits: dict[Asked, _Line] = {}
        self._timeouts: list[tuple[float, Asked]] = []
        """A heap; has stale entries, of requests that are over."""

    # --- semaphores -------------------------------------------------------------------------------------------------

    def acquire(self, client: ClientState, op: AcquireLease) -> None:
        """Grants a lease now or later; a semaphore begins with its first lease."""
        if op.max_leases < 1:
            _answer(client, op.request, None, f"max_leases={op.max_leases}: a semaphore has at least one lease")
            return
        if op.name in self._closed:
            _answer(client, op.request, None, f"the semaphore {op.name!r} was closed: use another name")
            return
        line = self._semaphores.get(op.name)
        if line is None:
            line = self._semaphores[op.name] = _Line(op.name, op.max_leases)
        if line.limit != op.max_leases:
            text = f"the semaphore {op.name!r} is in use with max_leases={line.limit}, not {op.max_leases}"
            _answer(client, op.request, None, text)
        elif line.leases < line.limit:
            self._grant(line, client, op.request)
        else:
            self._wait(line, client, op.request, op.timeout_s)

    def _grant(self, line: _Line, client: ClientState, request: int) -> None:
        line.leases += 1
        self._held[client.session, request] = line
        _answer(client, request, True)

    def _pass_on(self, line: _Line) -> None:
        while line.waiting and line.leases < line.limit:
            asked, client = next(iter(line.waiting.items()))
            del line.waiting[asked], self._waits[asked]
            self._grant(line, client, asked[1])
        if not line.leases and not line.waiting and self._semaphores.get(line.name) is line:
            del self._semaphores[line.name]

    def read(self, client: ClientState, op: ReadLeases) -> None:
        """How many leases are held."""
        line = self._semaphores.get(op.name)
        _answer(client, op.request, 0 if line is None else line.leases)

    def close(self, client: ClientState, op: CloseSemaphore) -> None:
        """Ends a semaphore: who waits hears so, who holds a lease may still give it back."""
        self._closed[op.name] = None
        if len(self._closed) > CLOSED_NAMES:
            del self._closed[next(iter(self._closed))]
        line = self._semaphores.pop(op.name, None)
        if line is not None:
            for asked, waiting in line.waiting.items():
                del self._waits[asked]
                _answer(waiting, asked[1], None, f"the semaphore {op.name!r} was closed")
            line.waiting.clear()
        _answer(client, op.request, True)

    # --- events -----------------------------------------------------------------------------------------------------

    def set_event(self, client: ClientState, op: SetEvent) -> None:
        """Sets an event, which ends all waits for it, or clears it."""
        line = self._events.get(op.name)
        if op.value:
            if line is None:
                line = self._events[op.name] = _Line(op.name)
            line.is_set = True
            for asked, waiting in line.waiting.items():
                del self._waits[asked]
                _answer(waiting, asked[1], True)
            line.waiting.clear()
        elif line is not None and line.is_set:
            del self._events[op.name]
        _answer(client, op.request, True)

    def wait_event(self, client: ClientState, op: WaitEvent) -> None:
        """Answers when the event is set."""
        line = self._events.get(op.name)
        if line is not None and line.is_set:
            _answer(client, op.request, True)
            return
        if line is None:
            line = self._events[op.name] = _Line(op.name)
        self._wait(line, client, op.request, op.timeout_s)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _wait(self, line: _Line, client: ClientState, request: int, timeout_s: float | None) -> None:
        asked = (client.session, request)
        self._waits[asked] = line
        line.waiting[asked] = client
        if timeout_s is not None and not timeout_s > 0:
            self._end_wait(asked, False)
        elif timeout_s is not None and timeout_s < LONGEST_WAIT_S:
            heappush(self._timeouts, (self.state.now + timeout_s, asked))
            if len(self._timeouts) > 2 * len(self._waits) + STALE_TIMEOUTS:
                self._timeouts = [entry for entry in self._timeouts if entry[1] in self._waits]
                heapify(self._timeouts)

    def _end_wait(self, asked: Asked, answer: bool) -> None:
        line = self._waits.pop(asked)
        _answer(line.waiting.pop(asked), asked[1], answer)
        if not line.limit and not line.waiting and not line.is_set:
            del self._events[line.name]

    def give_up(self, client: ClientState, op: GiveUp) -> None:
        """Ends a wait, or gives a lease back to the next in line."""
        asked = (client.session, op.number)
        found = self._give_up(asked)
        if op.request:
            _answer(client, op.request, found)

    def _give_up(self, asked: Asked) -> bool:
        line = self._held.pop(asked, None)
        if line is not None:
            line.leases -= 1
            self._pass_on(line)
        elif asked in self._waits:
            self._end_wait(asked, False)
        else:
            return False
        return True

    def client_left(self, client: ClientState) -> None:
        """Gives up all that a client had asked for: first what waits, so that no lease goes to one that is gone."""
        for book in (self._waits, self._held):
            for asked in [asked for asked in book if asked[0] == client.session]:
                self._give_up(asked)

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def timed(self) -> bool:
        """Whether there is a time limit to look after."""
        return bool(self._timeouts)

    def deadline(self) -> float | None:
        """When `tick` wants to be called."""
        while self._timeouts and self._timeouts[0][1] not in self._waits:
            heappop(self._timeouts)
        return self._timeouts[0][0] if self._timeouts else None

    def tick(self) -> None:
        """Ends waits that are out of time."""
        while self._timeouts and self._timeouts[0][0] <= self.state.now:
            asked = heappop(self._timeouts)[1]
            if asked in self._waits:
                self._end_wait(asked, False)


def _answer(client: ClientState, request: int, value: bool | int | None, error: str = "") -> None:
    client.outbox.add(QueryAnswered(request, msgspec.msgpack.encode(value), error))
