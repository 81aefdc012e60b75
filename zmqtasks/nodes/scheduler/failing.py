"""Tasks that will not come true: they failed, or were given up. What waits for them shares their fate."""

from __future__ import annotations

from collections.abc import Sequence

from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.releasing import Releasing
from zmqtasks.nodes.scheduler.state import (
    ERRED,
    FORGOTTEN,
    WAITING,
    ClientState,
    TaskState,
    WorkerState,
)
from zmqtasks.nodes.scheduler.transitions import check
from zmqtasks.protocol.ops import ErrorInfo, KeysCancelled, KeysErred


class Failing(Releasing):
    """Ends tasks without a result."""

    def end_run(self, worker: WorkerState, run_id: int) -> TaskState | None:
        """Takes a run off the worker's list; returns its task, None when nobody waits for it."""
        ts = worker.processing.pop(run_id, None)
        worker.parked.pop(run_id, None)
        worker.executing.discard(run_id)
        worker.retracting.pop(run_id, None)
        worker.abandoned.pop(run_id, None)
        if (bucket := worker.held.pop(run_id, None)) is not None:
            bucket.give_back(worker)
        if ts is not None and ts.run_id == run_id and ts.worker is worker:
            worker.load_s -= ts.estimate_s
        return ts

    def fail(self, tasks: list[TaskState], error: ErrorInfo) -> None:
        """These tasks have failed, and with them all that waits for them."""
        told: dict[ClientState, list[Key]] = {}
        failed: list[TaskState] = []
        stack = list(tasks)
        while stack:
            ts = stack.pop()
            if ts.state is ERRED or ts.state is FORGOTTEN:
                continue
            check(self.state, ts, ERRED)
            ts.worker = None
            ts.extra().error = error
            failed.append(ts)
            for client in ts.wanters():
                told.setdefault(client, []).append(ts.key)
            if ts.waiters is not None:
                stack += [t for t in ts.waiters if t.state is WAITING]
                ts.waiters = None
        self.state.counters["erred"] += len(failed)
        for client, keys in told.items():
            client.outbox.add(KeysErred(keys, error))
        for ts in failed:
            released: list[TaskState] = []
            self._let_go(ts.deps, released)
            if ts.rare is not None:
                self._let_go(ts.rare.references, released)
            for dep in released:
                self.reconsider(dep)
        for ts in failed:
            self.reconsider(ts)

    def give_up(self, tasks: Sequence[TaskState], reason: str, kind: str) -> None:
        """Tells all who want these tasks that they will not come true, and drops them."""
        told: dict[ClientState, list[Key]] = {}
        for ts in tasks:
            for client in ts.wanters():
                told.setdefault(client, []).append(ts.key)
            ts.wanted_by = None
        for client, keys in told.items():
            client.outbox.add(KeysCancelled(keys, reason, kind))
        for ts in reversed(tasks):
            self.reconsider(ts)
