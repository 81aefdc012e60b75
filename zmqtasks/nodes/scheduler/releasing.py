"""What nobody needs any more goes: values, attempts, records.

Theory of operation
-------------------
Two counters decide how long things live. `holds` counts the reasons to keep a *value*: dependents that are not done,
references from other tasks. `dependents` counts the tasks that may need the *spec* again, to compute a lost result anew. A
value goes when no client wants it and nothing holds it; the record goes when, besides, nothing depends on it. Chains are
walked with a list, never by recursion: a graph may be a million tasks deep.
"""

from __future__ import annotations

from collections.abc import Iterable

from zmqtasks.nodes.scheduler.actors import makes_actor
from zmqtasks.nodes.scheduler.placement import Placement
from zmqtasks.nodes.scheduler.state import (
    ERRED,
    FORGOTTEN,
    MEMORY,
    PROCESSING,
    RELEASED,
    WAITING,
    SchedulerState,
    TaskState,
    WorkerState,
)
from zmqtasks.nodes.scheduler.transitions import check
from zmqtasks.protocol.ops import CancelRuns, DropData


class Releasing:
    """Lets go of tasks that have lost a reason to be kept."""

    def __init__(self, state: SchedulerState, placement: Placement) -> None:
        self.state = state
        self.placement = placement

    def reconsider(self, ts: TaskState) -> None:
        """`reconsider_all` for one."""
        self.reconsider_all([ts])

    def reconsider_all(self, stack: list[TaskState]) -> None:
        """After a reason to keep these has gone: drops values, attempts, records, and so on up the graph. Empties the list.

        Each worker hears at the end of all the values that it is to drop.
        """
        records = self.state.tasks
        dropped: dict[WorkerState, list[TaskState]] = {}
        last: WorkerState | None = None
        inline = 0
        while stack:
            ts = stack.pop()
            state = ts.state
            if ts.wanted_by is not None or ts.holds or state is FORGOTTEN:
                continue
            if state is MEMORY:
                holder = ts.who_has
                if ts.rare is None and type(holder) is WorkerState:
                    if holder is not last:  # neighbours were mostly sent together
                        last = holder
                        lost = dropped.setdefault(holder, [])
                    lost.append(ts)
                    ts.who_has = None
                    if ts.inline is not None:
                        inline += len(ts.inline)
                        ts.inline = None
                    ts.state = RELEASED
                    if not ts.deps and not ts.dependents:  # `_forget` for what has nothing to let go of
                        ts.state = FORGOTTEN
                        del records[ts.key]
                        continue
                else:
                    for worker in ts.holders():
                        dropped.setdefault(worker, []).append(ts)
                    self._drop_value(ts, stack)
                    check(self.state, ts, RELEASED)
            elif state is not RELEASED and state is not ERRED:
                self._stop(ts, stack)
            if not ts.dependents:
                self._forget(ts, stack)
        self.state.inline_bytes -= inline
        for worker, lost in dropped.items():
            size = sum([ts.size for ts in lost])
            worker.outbox.drop([ts.key for ts in lost], size)
            worker.stored_keys -= len(lost)
            worker.stored_bytes -= size

    def _drop_value(self, ts: TaskState, stack: list[TaskState]) -> None:
        if ts.rare is not None and ts.rare.home is not None and makes_actor(ts):
            ts.rare.home.actors -= 1
        ts.who_has = None
        self._drop_inline(ts)
        self._drop_contained(ts, stack)

    def _drop_contained(self, ts: TaskState, stack: list[TaskState]) -> None:
        if ts.rare is not None and ts.rare.contains:
            contained, ts.rare.contains = ts.rare.contains, ()
            self._let_go(contained, stack)

    def _drop_inline(self, ts: TaskState) -> None:
        if ts.inline is not None:
            self.state.inline_bytes -= len(ts.inline)
            ts.inline = None

    def _stop(self, ts: TaskState, stack: list[TaskState]) -> None:
        """Ends an unfinished task that nobody needs."""
        if ts.state is PROCESSING:
            self._abandon_run(ts)
        elif ts.state is WAITING:
            ts.recount = True
        ts.waiters = None  # nothing waits for what nobody needs: these have been stopped before
        check(self.state, ts, RELEASED)
        self._let_go(ts.deps, stack)
        if ts.rare is not None:
            self._let_go(ts.rare.references, stack)

    def _abandon_run(self, ts: TaskState) -> None:
        worker = ts.worker
        assert worker is not None
        if worker.processing.get(ts.run_id) is ts:
            worker.processing[ts.run_id] = None
            worker.abandoned[ts.run_id] = ts.key
            worker.load_s -= ts.estimate_s
            worker.outbox.add(CancelRuns([ts.run_id]))
            self.placement.update_room(worker)
        ts.worker = None

    @staticmethod
    def _let_go(held: Iterable[TaskState], stack: list[TaskState]) -> None:
        for dep in held:
            dep.holds -= 1
            if not dep.holds:
                stack.append(dep)

    def _forget(self, ts: TaskState, stack: list[TaskState]) -> None:
        """RELEASED or ERRED -> FORGOTTEN."""
        ts.state = FORGOTTEN
        del self.state.tasks[ts.key]
        if ts.deps:
            for dep in ts.deps:
                dep.dependents -= 1
                if not dep.dependents and not dep.holds:
                    stack.append(dep)
            ts.deps = ()
        rare = ts.rare
        if rare is not None and rare.data is not None and rare.data.retained:
            rare.data.client.outbox.add(DropData([ts.key]))
        ts.args = b""  # a queue may keep the record for a while
        ts.waiters = ts.rare = ts.worker = None
