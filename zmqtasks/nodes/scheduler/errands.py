"""Errands that clients send through the scheduler: calls of functions on workers and nannies, and restarts of the cluster."""

from __future__ import annotations

import msgspec

from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.membership import Membership
from zmqtasks.nodes.scheduler.state import ClientState, NannyState, SchedulerState, WorkerState
from zmqtasks.protocol.ops import (
    CallFinished,
    CallFunction,
    QueryAnswered,
    Restart,
    RestartWorkers,
    RunFinished,
    RunFunction,
)

LONGEST_RESTART_S = 86400.0


class _Call:
    """One `RunFunction`, until every worker has answered."""

    def __init__(self, client: ClientState, request: int) -> None:
        self.client = client
        self.request = request
        self.open: dict[bytes, str] = {}
        """Who has not answered: names by session, as another process may come to the same address."""


class _Restart:
    """One `Restart`, until as many workers as before are back."""

    def __init__(self, client: ClientState, request: int, old: set[bytes], wanted: int, until: float) -> None:
        self.client = client
        self.request = request
        self.old = old
        self.wanted = wanted
        self.until = until


class Errands:
    """Calls and restarts under way."""

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle, membership: Membership) -> None:
        self.state = state
        self.lifecycle = lifecycle
        self.membership = membership
        self._calls: dict[int, _Call] = {}
        self._next_call = 1
        self._restarts: list[_Restart] = []

    # --- calls ------------------------------------------------------------------------------------------------------

    def run_function(self, client: ClientState, op: RunFunction) -> None:
        """Sends the call to each worker (or nanny) that is meant."""
        number = self._next_call
        self._next_call += 1
        call = _Call(client, op.request)
        targets: list[WorkerState | NannyState]
        if op.on_nanny:
            targets = [n for n in self.state.nannies.values() if not op.workers or n.name in op.workers]
        else:
            every = self.state.workers.values()
            targets = [w for w in every if not op.workers or {w.address, w.name, w.host} & set(op.workers)]
        for target in targets:
            call.open[target.session] = target.name if isinstance(target, NannyState) else target.address
            target.outbox.add(CallFunction(number, op.function))
        self._calls[number] = call
        self._close_if_done(number)

    def call_finished(self, session: bytes, op: CallFinished) -> None:
        """A worker's or nanny's answer."""
        call = self._calls.get(op.call)
        if call is None or (who := call.open.pop(session, None)) is None:
            return
        call.client.outbox.add(RunFinished(call.request, who, op.result, op.erred))
        self._close_if_done(op.call)

    def _close_if_done(self, number: int) -> None:
        call = self._calls[number]
        if not call.open:
            del self._calls[number]
            call.client.outbox.add(RunFinished(call.request, ""))

    def _drop_gone(self) -> None:
        present = self.state.workers.keys() | {n.session for n in self.state.nannies.values()}
        for number, call in list(self._calls.items()):
            if call.client.session not in self.state.clients:
                del self._calls[number]
                continue
            for session in call.open.keys() - present:
                gone = call.open.pop(session)
                call.client.outbox.add(RunFinished(call.request, gone, error=f"{gone} left before it answered"))
            self._close_if_done(number)

    # --- restarts ---------------------------------------------------------------------------------------------------

    def restart(self, client: ClientState, op: Restart) -> None:
        """Cancels all tasks, forgets all data, and has the nannies start new worker processes."""
        self.lifecycle.give_up(list(self.state.tasks.values()), "the cluster was restarted", "CancelledError")
        watched = {w.instance for w in self.state.workers.values() if w.nanny in self.state.nannies}
        until = self.state.now + (op.timeout_s if 0 <= op.timeout_s < LONGEST_RESTART_S else LONGEST_RESTART_S)
        self._restarts.append(_Restart(client, op.request, watched, len(self.state.workers), until))
        for nanny in self.state.nannies.values():
            nanny.outbox.add(RestartWorkers())
        self._finish_restarts()

    def worker_joined(self) -> None:
        """A restart may be complete."""
        self._finish_restarts()

    def _finish_restarts(self) -> None:
        for restart in list(self._restarts):
            present = {i: w for i, w in self.state.worker_instances.items() if not w.preparing}
            back = len(present) >= restart.wanted and not restart.old & present.keys()
            late = self.state.now >= restart.until
            if not back and not late:
                continue
            self._restarts.remove(restart)
            error = "" if back else f"only {len(present)} of {restart.wanted} workers are back in time"
            restart.client.outbox.add(QueryAnswered(restart.request, msgspec.msgpack.encode(len(present)), error))

    @property
    def under_way(self) -> bool:
        """Whether there is anything to look after."""
        return bool(self._calls or self._restarts)

    # --- time -------------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `tick` wants to be called."""
        if self._calls:
            return self.state.now + 0.5
        return min((r.until for r in self._restarts), default=None)

    def tick(self) -> None:
        """Answers for workers that left, and for restarts that take too long."""
        if self._calls:
            self._drop_gone()
        if self._restarts:
            self._finish_restarts()
