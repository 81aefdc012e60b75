"""Semaphores and events that clients share by name, and the door to all else that they share so.

A granted lease is called by the number of the request that asked for it (see `requests`). A semaphore exists while somebody
holds or waits for a lease of it, an event while it is set or waited for. Variables and datasets are in `shared_values`, queues in
`shared_queues`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zmqtasks.nodes.scheduler.keeping import KeptKeys
from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.requests import Asked, Line, Requests, answer
from zmqtasks.nodes.scheduler.shared_queues import SharedQueues
from zmqtasks.nodes.scheduler.shared_values import SharedValues
from zmqtasks.nodes.scheduler.state import ClientState, SchedulerState
from zmqtasks.protocol import ops

CLOSED_NAMES = 10_000
"""Closed semaphores that are remembered, the last ones."""


class _Semaphore(Line):
    """So many leases, who holds them, and who waits."""

    def __init__(self, book: Coordination, name: str, limit: int) -> None:
        self.book = book
        self.name = name
        self.limit = limit
        self.holders: dict[Asked, ClientState] = {}
        self.waiting: dict[Asked, ClientState] = {}

    def grant(self, asked: Asked, client: ClientState) -> None:
        self.holders[asked] = client
        self.book.requests.held[asked] = self
        answer(client, asked[1], True)

    def end_wait(self, asked: Asked) -> None:
        answer(self.waiting.pop(asked), asked[1], False)

    def give_back(self, asked: Asked) -> None:
        """The lease goes to the next in line."""
        del self.holders[asked]
        while self.waiting and len(self.holders) < self.limit:
            asked, client = next(iter(self.waiting.items()))
            del self.waiting[asked], self.book.requests.waiting[asked]
            self.grant(asked, client)
        if not self.holders and not self.waiting and self.book.semaphores.get(self.name) is self:
            del self.book.semaphores[self.name]


class _Event(Line):
    """Whether it is set, and who waits."""

    def __init__(self, book: Coordination, name: str) -> None:
        self.book = book
        self.name = name
        self.is_set = False
        self.waiting: dict[Asked, ClientState] = {}

    def end_wait(self, asked: Asked) -> None:
        answer(self.waiting.pop(asked), asked[1], False)
        if not self.waiting and not self.is_set:
            del self.book.events[self.name]


class Coordination:
    """All that clients share by name."""

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self.state = state
        self.requests = Requests(state)
        self.kept = KeptKeys(state, lifecycle)
        self.values = SharedValues(self.requests, self.kept)
        self.queues = SharedQueues(self.requests, self.kept)
        self.semaphores: dict[str, _Semaphore] = {}
        self.events: dict[str, _Event] = {}
        self._closed: dict[str, None] = {}
        self.handlers: dict[type, Callable[[ClientState, Any], None]] = {
            ops.AcquireLease: self._on_acquire_lease,
            ops.ReadLeases: self._on_read_leases,
            ops.CloseSemaphore: self._on_close_semaphore,
            ops.SetEvent: self._on_set_event,
            ops.WaitEvent: self._on_wait_event,
            ops.GiveUp: self.requests.give_up,
            ops.Received: self.requests.received,
            ops.SetValue: self.values.set,
            ops.GetValue: self.values.get,
            ops.DeleteValue: self.values.delete,
            ops.ListValues: self.values.names,
            ops.PutItem: self.queues.put,
            ops.GetItems: self.queues.get,
            ops.ReadQueue: self.queues.read,
            ops.CloseQueue: self.queues.close,
        }
        """For ops of clients."""

    def client_left(self, client: ClientState) -> None:
        """Gives up all that a client had asked for. Values that it has given stay."""
        self.requests.client_left(client)

    # --- semaphores -------------------------------------------------------------------------------------------------

    def _on_acquire_lease(self, client: ClientState, op: ops.AcquireLease) -> None:
        """Grants a lease now or later; a semaphore begins with its first lease."""
        if op.max_leases < 1:
            answer(client, op.request, None, f"max_leases={op.max_leases}: a semaphore has at least one lease")
            return
        if op.name in self._closed:
            answer(client, op.request, None, f"the semaphore {op.name!r} was closed: use another name")
            return
        semaphore = self.semaphores.get(op.name)
        if semaphore is None:
            semaphore = self.semaphores[op.name] = _Semaphore(self, op.name, op.max_leases)
        asked = (client.session, op.request)
        if semaphore.limit != op.max_leases:
            text = f"the semaphore {op.name!r} is in use with max_leases={semaphore.limit}, not {op.max_leases}"
            answer(client, op.request, None, text)
        elif len(semaphore.holders) < semaphore.limit:
            semaphore.grant(asked, client)
        else:
            semaphore.waiting[asked] = client
            self.requests.wait(asked, semaphore, op.timeout_s)

    def _on_read_leases(self, client: ClientState, op: ops.ReadLeases) -> None:
        """How many leases are held, or by whom."""
        semaphore = self.semaphores.get(op.name)
        holders = [] if semaphore is None else [holder.name for holder in semaphore.holders.values()]
        answer(client, op.request, holders if op.holders else len(holders))

    def _on_close_semaphore(self, client: ClientState, op: ops.CloseSemaphore) -> None:
        """Ends a semaphore: who waits hears so, who holds a lease may still give it back."""
        self._closed[op.name] = None
        if len(self._closed) > CLOSED_NAMES:
            del self._closed[next(iter(self._closed))]
        semaphore = self.semaphores.pop(op.name, None)
        if semaphore is not None:
            for asked, waiting in semaphore.waiting.items():
                del self.requests.waiting[asked]
                answer(waiting, asked[1], None, f"the semaphore {op.name!r} was closed")
            semaphore.waiting.clear()
        answer(client, op.request, True)

    # --- events -----------------------------------------------------------------------------------------------------

    def _on_set_event(self, client: ClientState, op: ops.SetEvent) -> None:
        """Sets an event, which ends all waits for it, or clears it."""
        event = self.events.get(op.name)
        if op.value:
            if event is None:
                event = self.events[op.name] = _Event(self, op.name)
            event.is_set = True
            for asked, waiting in event.waiting.items():
                del self.requests.waiting[asked]
                answer(waiting, asked[1], True)
            event.waiting.clear()
        elif event is not None and event.is_set:
            del self.events[op.name]
        answer(client, op.request, True)

    def _on_wait_event(self, client: ClientState, op: ops.WaitEvent) -> None:
        """Answers when the event is set."""
        event = self.events.get(op.name)
        if event is not None and event.is_set:
            answer(client, op.request, True)
            return
        if event is None:
            event = self.events[op.name] = _Event(self, op.name)
        asked = (client.session, op.request)
        event.waiting[asked] = client
        self.requests.wait(asked, event, op.timeout_s)
