"""Requests of clients that wait for something with a name, or were granted a part of it.

Theory of operation
-------------------
A request is known by its client's session and its number. It waits in the one line of its name, in the order of arrival, until
it is granted, given up by its client, or out of time: this is decided here alone, so a grant and a timeout cannot both happen.
What was granted and is to be given back one day is filed under the same number, so one op, `GiveUp`, ends a wait or gives back
what was granted: a client that stops waiting need not know which of the two it was. What a client that leaves had asked
for is given up with it.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias

import msgspec

from zmqtasks.nodes.scheduler.state import ClientState, SchedulerState
from zmqtasks.protocol.ops import GiveUp, QueryAnswered, Received

Asked: TypeAlias = tuple[bytes, int]
"""A session, and the number of a request."""

LONGEST_WAIT_S = 1e9
"""More is for ever."""
STALE_TIMEOUTS = 64
"""So many entries of requests that are over are kept before the timeouts are sorted out."""


class Line:
    """What requests wait for, in order, or hold a part of."""

    __slots__ = ()

    def end_wait(self, asked: Asked) -> None:
        """A request has waited in vain: answers it, and forgets it."""
        raise NotImplementedError

    def give_back(self, asked: Asked) -> None:
        """What the request was granted is free again."""
        raise NotImplementedError

    def received(self, asked: Asked) -> None:
        """What the request was granted is its client's for good."""
        self.give_back(asked)


class Requests:
    """All requests that wait or hold something."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self.waiting: dict[Asked, Line] = {}
        self.held: dict[Asked, Line] = {}
        self._timeouts: list[tuple[float, Asked]] = []
        """A heap; has stale entries, of requests that are over."""

    def wait(self, asked: Asked, line: Line, timeout_s: float | None) -> None:
        """`line` has this request in its list: until when it stays there."""
        self.waiting[asked] = line
        if timeout_s is not None and not timeout_s > 0:
            self._end_wait(asked)
        elif timeout_s is not None and timeout_s < LONGEST_WAIT_S:
            heappush(self._timeouts, (self.state.now + timeout_s, asked))
            if len(self._timeouts) > 2 * len(self.waiting) + STALE_TIMEOUTS:
                self._timeouts = [entry for entry in self._timeouts if entry[1] in self.waiting]
                heapify(self._timeouts)

    def _end_wait(self, asked: Asked) -> None:
        self.waiting.pop(asked).end_wait(asked)

    # --- from clients -----------------------------------------------------------------------------------------------

    def give_up(self, client: ClientState, op: GiveUp) -> None:
        """Ends a wait, or gives back what was granted."""
        found = self._give_up((client.session, op.number))
        if op.request:
            answer(client, op.request, found)

    def _give_up(self, asked: Asked) -> bool:
        line = self.held.pop(asked, None)
        if line is not None:
            line.give_back(asked)
        elif asked in self.waiting:
            self._end_wait(asked)
        else:
            return False
        return True

    def received(self, client: ClientState, op: Received) -> None:
        """What was granted has arrived."""
        asked = (client.session, op.number)
        line = self.held.pop(asked, None)
        if line is not None:
            line.received(asked)

    def client_left(self, client: ClientState) -> None:
        """Gives up all that a client had asked for: first what waits, so that nothing is granted to one that is gone."""
        for book in (self.waiting, self.held):
            for asked in [asked for asked in book if asked[0] == client.session]:
                self._give_up(asked)

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def timed(self) -> bool:
        """Whether there is a time limit to look after."""
        return bool(self._timeouts)

    def deadline(self) -> float | None:
        """When `tick` wants to be called."""
        while self._timeouts and self._timeouts[0][1] not in self.waiting:
            heappop(self._timeouts)
        return self._timeouts[0][0] if self._timeouts else None

    def tick(self) -> None:
        """Ends waits that are out of time."""
        while self._timeouts and self._timeouts[0][0] <= self.state.now:
            asked = heappop(self._timeouts)[1]
            if asked in self.waiting:
                self._end_wait(asked)


def answer(client: ClientState, request: int, value: Any, error: str = "") -> None:
    """Answers a request with plain data, or with an error."""
    client.outbox.add(QueryAnswered(request, msgspec.msgpack.encode(value), error))
