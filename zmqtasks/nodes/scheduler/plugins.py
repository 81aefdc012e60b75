"""Plugins and files that every worker has to have: those of now, and those that come later.

Theory of operation
-------------------
The book lists what is registered, in order; contents are bytes that nobody opens here. A registration goes into the book and
to every worker at once. The client hears of each worker's answer; a worker that leaves before it answers is no failure,
as its successor gets the plugin when it joins. When a worker fails, the registration is taken back: out of the book, and off
the workers, those that have joined meanwhile too; what it had replaced is set up again.

A worker that joins is sent all files, then the whole book in its order. It may not be given tasks until it has answered for
each (`WorkerState.preparing`). When one fails, the worker ends by itself: it knows the error, which these bytes do not tell.
"""

from __future__ import annotations

from collections.abc import Callable

from zmqtasks.nodes.scheduler.state import ClientState, SchedulerState, WorkerState
from zmqtasks.protocol.ops import (
    CallFinished,
    PlaceFile,
    RegisterPlugin,
    RunFinished,
    SetUpPlugin,
    TearDownPlugin,
    UnregisterPlugin,
)

LOOK_INTERVAL_S = 0.5
"""How often workers that left before they answered are looked for."""


class _Entry:
    """One plugin or file in the book."""

    def __init__(self, name: str, content: bytes, is_file: bool) -> None:
        self.name = name
        self.content = content
        self.is_file = is_file

    @property
    def title(self) -> str:
        return self.name if self.is_file else f"plugin {self.name!r}"


class _Call:
    """One registration or its end, until all workers have answered."""

    def __init__(self, client: ClientState, request: int, entry: _Entry | None, former: _Entry | None) -> None:
        self.client = client
        self.request = request
        self.entry = entry
        """What is being registered; None when it is being taken back."""
        self.former = former
        """What had its name."""
        self.open: dict[bytes, WorkerState] = {}
        self.failed = False


class Plugins:
    """The book, and who has to answer."""

    def __init__(self, state: SchedulerState, on_prepared: Callable[[WorkerState], None]) -> None:
        self.state = state
        self.news: list[tuple[bool, str]] = []
        """Lines for the node's log, as those of `Membership`."""
        self._book: dict[str, _Entry] = {}
        self._calls: dict[int, _Call] = {}
        self._next_call = -1
        self._on_prepared = on_prepared

    @property
    def count(self) -> int:
        """How many a worker that joins now has to set up."""
        return len(self._book)

    # --- clients ----------------------------------------------------------------------------------------------------

    def register(self, client: ClientState, op: RegisterPlugin) -> None:
        """A plugin for all workers; one of the same name gives its place in the order to it."""
        if op.idempotent and op.name in self._book:
            client.outbox.add(RunFinished(op.request, ""))
            return
        former = self._book.get(op.name)
        entry = self._book[op.name] = _Entry(op.name, op.content, op.is_file)
        number, call = self._begin(client, op.request, entry, former)
        for worker in self.state.workers.values():
            self._send(worker, entry, number)
            call.open[worker.session] = worker
        self._end_if_done(number)

    def unregister(self, client: ClientState, op: UnregisterPlugin) -> None:
        """All workers tear it down, and later ones will not get it."""
        if self._book.pop(op.name, None) is None:
            names = ", ".join(map(repr, self._book)) or "none"
            error = f"no plugin is called {op.name!r}: registered are {names}"
            client.outbox.add(RunFinished(op.request, "", error=error))
            return
        number, call = self._begin(client, op.request, None, None)
        for worker in self.state.workers.values():
            worker.outbox.add(TearDownPlugin(number, op.name))
            call.open[worker.session] = worker
        self._end_if_done(number)

    def _begin(
        self, client: ClientState, request: int, entry: _Entry | None, former: _Entry | None
    ) -> tuple[int, _Call]:
        number = self._next_number()
        call = self._calls[number] = _Call(client, request, entry, former)
        return number, call

    @staticmethod
    def _send(worker: WorkerState, entry: _Entry, number: int) -> None:
        if entry.is_file:
            worker.outbox.add(PlaceFile(entry.name, entry.content))
        worker.outbox.add(SetUpPlugin(number, entry.name, b"" if entry.is_file else entry.content))

    def _next_number(self) -> int:
        """Numbers below zero: those above are of `Errands`, whose answers are the same op."""
        self._next_call -= 1
        return self._next_call

    # --- workers ----------------------------------------------------------------------------------------------------

    def prepare(self, worker: WorkerState) -> None:
        """A worker has joined: all that is registered, before anything else."""
        for entry in self._book.values():
            if entry.is_file:
                worker.outbox.add(PlaceFile(entry.name, entry.content))
        for entry in self._book.values():
            number = self._next_number()
            worker.preparing[number] = entry.title
            content = b"" if entry.is_file else entry.content
            worker.outbox.add(SetUpPlugin(number, entry.name, content, required=True))

    def finished(self, worker: WorkerState, op: CallFinished) -> None:
        """A worker's answer."""
        title = worker.preparing.get(op.call)
        if title is not None:
            if op.erred:
                worker.leaving = True
                self.news.append((True, f"worker {worker.name} at {worker.address} ends: setup of {title} failed"))
                self.state.note(worker.address, f"setup of {title} failed")
                return
            del worker.preparing[op.call]
            if not worker.preparing:
                self._on_prepared(worker)
            return
        call = self._calls.get(op.call)
        if call is None or call.open.pop(worker.session, None) is None:
            return
        call.failed |= op.erred
        call.client.outbox.add(RunFinished(call.request, worker.address, op.result, op.erred))
        self._end_if_done(op.call)

    def _end_if_done(self, number: int) -> None:
        call = self._calls[number]
        if call.open:
            return
        del self._calls[number]
        if call.failed and call.entry is not None and self._book.get(call.entry.name) is call.entry:
            self._take_back(call.entry.name, call.former)
        call.client.outbox.add(RunFinished(call.request, ""))

    def _take_back(self, name: str, former: _Entry | None) -> None:
        if former is None:
            del self._book[name]
        else:
            self._book[name] = former
        for worker in self.state.workers.values():
            if former is None:
                worker.outbox.add(TearDownPlugin(0, name))
            else:
                self._send(worker, former, 0)

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether there is anything to look after."""
        return bool(self._calls)

    def deadline(self) -> float | None:
        """When `tick` wants to be called."""
        return self.state.now + LOOK_INTERVAL_S if self._calls else None

    def tick(self) -> None:
        """Goes on without workers that left."""
        for number, call in list(self._calls.items()):
            for session in call.open.keys() - self.state.workers.keys():
                del call.open[session]
            self._end_if_done(number)
