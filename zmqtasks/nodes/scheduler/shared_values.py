"""Values that clients share by name: variables, which may be waited for, and published datasets.

A value is bytes that nobody opens here, and the keys of the futures inside (see `keeping`). Who asks for a value with keys holds
a share of it until it wants the keys itself: meanwhile the name may get another value, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.keeping import KeptKeys
from zmqtasks.nodes.scheduler.requests import Asked, Line, Requests, answer
from zmqtasks.nodes.scheduler.state import ClientState
from zmqtasks.protocol.ops import DeleteValue, GetValue, ListValues, SetValue

KINDS = ("variable", "dataset")


class Value(Line):
    """Bytes with keys. They are kept while it has shares: that of its name or queue, and those of clients that take it over."""

    __slots__ = ("data", "kept", "keys", "shares")

    def __init__(self, kept: KeptKeys, data: bytes, keys: Sequence[Key]) -> None:
        self.kept = kept
        self.data = data
        self.keys = keys
        self.shares = 1
        kept.hold(keys)

    def drop_share(self) -> None:
        self.shares -= 1
        if not self.shares:
            self.kept.let_go(self.keys)

    def give_back(self, asked: Asked) -> None:
        self.drop_share()


class _Name(Line):
    """A name, its value if it has one, and who waits for that."""

    def __init__(self, book: dict[str, _Name], name: str) -> None:
        self.book = book
        self.name = name
        self.value: Value | None = None
        self.waiting: dict[Asked, ClientState] = {}

    def end_wait(self, asked: Asked) -> None:
        answer(self.waiting.pop(asked), asked[1], None)
        self.forget_if_unused()

    def forget_if_unused(self) -> None:
        if self.value is None and not self.waiting:
            del self.book[self.name]


class SharedValues:
    """All variables and datasets."""

    def __init__(self, requests: Requests, kept: KeptKeys) -> None:
        self.requests = requests
        self.kept = kept
        self.books: dict[str, dict[str, _Name]] = {kind: {} for kind in KINDS}

    def _book(self, op: SetValue | GetValue | DeleteValue | ListValues) -> dict[str, _Name]:
        book = self.books.get(op.kind)
        if book is None:
            raise RemoteProtocolError(f"{type(op).__name__}: no such kind of shared value: {op.kind!r}")
        return book

    def set(self, client: ClientState, op: SetValue) -> None:
        """A name gets its value, and who waits for that hears it."""
        book = self._book(op)
        name = book.get(op.name)
        if name is None:
            name = book[op.name] = _Name(book, op.name)
        old = name.value
        if old is not None and op.new:
            answer(client, op.request, False)
            return
        name.value = Value(self.kept, op.value, op.keys)
        if old is not None:  # after the new one: they may have keys in common
            old.drop_share()
        waiting, name.waiting = name.waiting, {}
        for asked, waiter in waiting.items():
            del self.requests.waiting[asked]
            self._hand_out(name.value, waiter, asked)
        answer(client, op.request, True)

    def _hand_out(self, value: Value, client: ClientState, asked: Asked) -> None:
        if value.keys:
            value.shares += 1
            self.requests.held[asked] = value
        answer(client, asked[1], [value.data, bool(value.keys)])

    def get(self, client: ClientState, op: GetValue) -> None:
        """Gives the value, or waits for one."""
        book = self._book(op)
        name = book.get(op.name)
        asked = (client.session, op.request)
        if name is not None and name.value is not None:
            self._hand_out(name.value, client, asked)
            return
        if name is None:
            name = book[op.name] = _Name(book, op.name)
        name.waiting[asked] = client
        self.requests.wait(asked, name, op.timeout_s)

    def delete(self, client: ClientState, op: DeleteValue) -> None:
        """The name has no value any more; who waits for one goes on waiting."""
        name = self._book(op).get(op.name)
        found = name is not None and name.value is not None
        if name is not None and name.value is not None:
            value, name.value = name.value, None
            value.drop_share()
            name.forget_if_unused()
        answer(client, op.request, found)

    def names(self, client: ClientState, op: ListValues) -> None:
        """The names that have values."""
        answer(client, op.request, [name.name for name in self._book(op).values() if name.value is not None])
