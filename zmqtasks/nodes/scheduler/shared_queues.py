"""Queues that clients share by name.

A value that was taken belongs to its queue until the taker says `Received`: by then it wants the keys inside itself. A taker that
gives up or dies puts its values back where they were, by their serial numbers. A request for several values takes them one by one
as they come, also from a queue that never holds so many.

A queue is forgotten when there is nothing in it and nobody waits; only bounds are remembered, and closings: these are counted for
all queues together, so that whoever has used a queue can say after which of them that was, and hears when it was closed since.
"""

from __future__ import annotations

from collections import deque

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.nodes.scheduler.keeping import KeptKeys
from zmqtasks.nodes.scheduler.requests import Asked, Line, Requests, answer
from zmqtasks.nodes.scheduler.shared_values import Value
from zmqtasks.nodes.scheduler.state import ClientState
from zmqtasks.protocol.ops import CloseQueue, GetItems, PutItem, ReadQueue

REMEMBERED_NAMES = 10_000
"""Names whose bounds or closings are remembered, the last ones."""


class _Getter:
    """A request for values: how many it waits for, and what it has by now."""

    __slots__ = ("_taken", "client", "count")

    def __init__(self, client: ClientState, count: int) -> None:
        self.client = client
        self.count = count
        self._taken: list[tuple[int, Value]] = []

    def take(self, entry: tuple[int, Value]) -> bool:
        """Whether it has all now."""
        self._taken.append(entry)
        return len(self._taken) == self.count

    @property
    def taken(self) -> list[tuple[int, Value]]:
        """In the order of the queue: while it waited, others may have put back what comes before its own."""
        self._taken.sort(key=_serial)
        return self._taken


def _serial(entry: tuple[int, Value]) -> int:
    return entry[0]


class _Queue(Line):
    """Values in order, each with its serial number; who waits for values, and who for room."""

    def __init__(self, book: SharedQueues, name: str, maxsize: int) -> None:
        self.book = book
        self.requests = book.requests
        self.name = name
        self.maxsize = maxsize
        """0: it holds any number."""
        self.values: deque[tuple[int, Value]] = deque()
        self.next_serial = 0
        self.getters: dict[Asked, _Getter] = {}
        self.putters: dict[Asked, tuple[ClientState, Value]] = {}
        self.taken: dict[Asked, _Getter] = {}
        """Those whose values are on their way to them."""

    def put(self, value: Value) -> None:
        self.values.append((self.next_serial, value))
        self.next_serial += 1

    def settle(self) -> None:
        """Values go to who waits for them, and into the room that this makes."""
        while True:
            while self.values and self.getters:
                asked, getter = next(iter(self.getters.items()))
                if getter.take(self.values.popleft()):
                    del self.getters[asked], self.requests.waiting[asked]
                    self.hand_out(asked, getter)
            if not self.putters or (self.maxsize and len(self.values) >= self.maxsize):
                break
            asked, (client, value) = next(iter(self.putters.items()))
            del self.putters[asked], self.requests.waiting[asked]
            self.put(value)
            self.book.answer(client, asked[1], self.name, True)
        if not self.values and not self.getters and not self.putters and not self.taken:
            self.book.forget(self)

    def hand_out(self, asked: Asked, getter: _Getter) -> None:
        if getter.taken:
            self.taken[asked] = getter
            self.requests.held[asked] = self
        self.book.answer(getter.client, asked[1], self.name, [value.data for _, value in getter.taken])

    def end_wait(self, asked: Asked) -> None:
        if asked in self.putters:
            client, value = self.putters.pop(asked)
            self.book.answer(client, asked[1], self.name, False)
            value.drop_share()
        else:
            getter = self.getters.pop(asked)
            self.book.answer(getter.client, asked[1], self.name, None)
            self._put_back(getter)
        self.settle()

    def give_back(self, asked: Asked) -> None:
        self._put_back(self.taken.pop(asked))
        self.settle()

    def _put_back(self, getter: _Getter) -> None:
        if self.book.queues.get(self.name) is not self:  # it was closed meanwhile
            for _, value in getter.taken:
                value.drop_share()
        elif getter.taken:
            if not self.values or getter.taken[-1][0] < self.values[0][0]:
                self.values.extendleft(reversed(getter.taken))
            else:  # of two takers, the second gave up first
                self.values = deque(sorted([*self.values, *getter.taken], key=_serial))

    def received(self, asked: Asked) -> None:
        for _, value in self.taken.pop(asked).taken:
            value.drop_share()
        self.settle()

    def close(self) -> None:
        """Drops all that is in it, and ends all waits with an error. What is on its way to a taker arrives."""
        error = f"the queue {self.name!r} was closed"
        for asked, getter in self.getters.items():
            del self.requests.waiting[asked]
            answer(getter.client, asked[1], None, error)
            self.values.extend(getter.taken)
        for asked, (client, value) in self.putters.items():
            del self.requests.waiting[asked]
            answer(client, asked[1], None, error)
            value.drop_share()
        for _, value in self.values:
            value.drop_share()
        self.getters.clear()
        self.putters.clear()
        self.values.clear()


class SharedQueues:
    """All queues."""

    def __init__(self, requests: Requests, kept: KeptKeys) -> None:
        self.requests = requests
        self.kept = kept
        self.queues: dict[str, _Queue] = {}
        self._bounds: dict[str, int] = {}
        """How many values queues hold that are forgotten otherwise."""
        self._closings = 0
        self._closed: dict[str, int] = {}
        """After which closing (they are counted for all queues together) each name is to be used."""

    def _usable(self, client: ClientState, op: PutItem | GetItems | ReadQueue) -> bool:
        """Whether the asker may use the queue of that name; else it has been told."""
        usable = not 0 <= op.closings < self._closed.get(op.name, 0)
        if not usable:
            answer(client, op.request, None, f"the queue {op.name!r} was closed")
        return usable

    def answer(self, client: ClientState, request: int, name: str, value: object) -> None:
        """Tells also after which closing that was."""
        answer(client, request, [self._closed.get(name, 0), value])

    def _queue(self, name: str) -> _Queue:
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = _Queue(self, name, self._bounds.pop(name, 0))
        return queue

    def forget(self, queue: _Queue) -> None:
        """Nobody uses it now."""
        if self.queues.get(queue.name) is queue:
            del self.queues[queue.name]
            if queue.maxsize:
                _remember(self._bounds, queue.name, queue.maxsize)

    def put(self, client: ClientState, op: PutItem) -> None:
        """Takes a value when there is room for it."""
        if not self._usable(client, op):
            return
        if op.maxsize < 0:
            raise RemoteProtocolError(f"PutItem: maxsize={op.maxsize}")
        known = self.queues.get(op.name)
        if known is not None and known.maxsize and op.maxsize and op.maxsize != known.maxsize:
            text = f"the queue {op.name!r} is in use with maxsize={known.maxsize}, not {op.maxsize}"
            answer(client, op.request, None, text)
            return
        queue = self._queue(op.name)
        queue.maxsize = op.maxsize or queue.maxsize
        asked = (client.session, op.request)
        queue.putters[asked] = (client, Value(self.kept, op.value, op.keys))
        if queue.maxsize and (len(queue.putters) > 1 or len(queue.values) >= queue.maxsize):
            self.requests.wait(asked, queue, op.timeout_s)
        else:
            self.requests.waiting[asked] = queue
            queue.settle()

    def get(self, client: ClientState, op: GetItems) -> None:
        """Gives the first values."""
        if not self._usable(client, op):
            return
        if op.count < 0:
            raise RemoteProtocolError(f"GetItems: count={op.count}")
        queue = self._queue(op.name)
        asked = (client.session, op.request)
        count = op.count or len(queue.values)  # none, where others wait
        getter = _Getter(client, count)
        if not count:
            queue.hand_out(asked, getter)
            queue.settle()
            return
        queue.getters[asked] = getter
        self.requests.waiting[asked] = queue
        queue.settle()
        if asked in queue.getters:
            self.requests.wait(asked, queue, op.timeout_s)

    def read(self, client: ClientState, op: ReadQueue) -> None:
        """How many values are in it."""
        if self._usable(client, op):
            queue = self.queues.get(op.name)
            self.answer(client, op.request, op.name, 0 if queue is None else len(queue.values))

    def close(self, client: ClientState, op: CloseQueue) -> None:
        """Ends a queue for all who have used it."""
        self._closings += 1
        _remember(self._closed, op.name, self._closings)
        self._bounds.pop(op.name, None)
        queue = self.queues.pop(op.name, None)
        if queue is not None:
            queue.close()
        answer(client, op.request, True)


def _remember(book: dict[str, int], name: str, number: int) -> None:
    book.pop(name, None)
    book[name] = number
    if len(book) > REMEMBERED_NAMES:
        del book[next(iter(book))]
