"""Tasks that are planned, and planned again: attempts that were given back, results that got lost, failures retried.

A value that is lost is computed again in the way of a new task: released tasks that are needed are revived, and so are the
released tasks that they depend on. Data has no task to run: it is asked for where it came from (`on_data_needed`).
"""

from __future__ import annotations

from collections.abc import Iterable

from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.actors import actor_lost, happened_already
from zmqtasks.nodes.scheduler.failing import Failing
from zmqtasks.nodes.scheduler.placement import Placement
from zmqtasks.nodes.scheduler.state import (
    ERRED,
    MEMORY,
    READY,
    RELEASED,
    WAITING,
    ClientState,
    SchedulerState,
    TaskState,
    WorkerState,
)
from zmqtasks.nodes.scheduler.transitions import check
from zmqtasks.protocol.ops import KeysRecomputing


class Recovering(Failing):
    """Plans tasks whose inputs are or are not in memory."""

    def __init__(self, state: SchedulerState, placement: Placement) -> None:
        super().__init__(state, placement)
        self.on_data_needed: list[TaskState] = []
        """Released data that is needed again and that a client may still have."""

    def requeue(self, ts: TaskState) -> None:
        """PROCESSING -> READY or WAITING: another attempt, as soon as the inputs are in memory."""
        ts.worker = None
        missing = [dep for dep in ts.deps if dep.state is not MEMORY]
        if not missing:
            check(self.state, ts, READY)
            self.placement.enqueue(ts)
            return
        check(self.state, ts, WAITING)
        self.wait_for(ts, missing)

    def take_back(self, ts: TaskState) -> None:
        """PROCESSING -> READY or WAITING: its run is cancelled, for another attempt."""
        self._abandon_run(ts)
        self.requeue(ts)

    def wait_again(self, ts: TaskState, missing: list[TaskState]) -> None:
        """READY or WAITING -> WAITING: inputs that were in memory are about to be lost (the caller then calls `lose`)."""
        if ts.state is READY:
            check(self.state, ts, WAITING)
            ts.waiting_on = 0
        ts.waiting_on += len(missing)
        for dep in missing:
            if dep.waiters is None:
                dep.waiters = []
            dep.waiters.append(ts)

    def wait_for(self, ts: TaskState, missing: list[TaskState]) -> None:
        """A task that has become WAITING waits for these inputs, which were in memory and got lost meanwhile."""
        ts.waiting_on = len(missing)
        for dep in missing:
            if dep.state is ERRED:
                continue
            if dep.waiters is None:
                dep.waiters = []
            dep.waiters.append(ts)
        self._revive_inputs(ts, [dep for dep in missing if dep.state is RELEASED])

    def _revive_inputs(self, ts: TaskState, released: list[TaskState]) -> None:
        """Has the released inputs of a task that waits computed; it fails when one of its inputs has failed."""
        for dep in released:
            self.revive(dep)
        failed = next((dep for dep in ts.deps if dep.state is ERRED), None)
        if failed is not None and ts.state is WAITING:
            assert failed.rare is not None
            assert failed.rare.error is not None
            self.fail([ts], failed.rare.error)

    def _plan(self, ts: TaskState) -> None:
        """Takes up the inputs of a new (WAITING) task; it becomes READY, stays WAITING, or fails at once."""
        waiting, failed = 0, False
        released: list[TaskState] | None = None
        for dep in ts.deps:
            dep.dependents += 1
            dep.holds += 1
            if dep.state is MEMORY:
                continue
            waiting += 1
            if dep.state is ERRED:
                failed = True
                continue
            if dep.waiters is None:
                dep.waiters = [ts]
            else:
                dep.waiters.append(ts)
            if dep.state is RELEASED:
                released = [dep] if released is None else [*released, dep]
        if ts.rare is not None:
            for reference in ts.rare.references:
                reference.holds += 1
        ts.waiting_on = waiting
        if failed or released is not None:
            self._revive_inputs(ts, released or [])  # last: all inputs are held by now
        elif not waiting:
            check(self.state, ts, READY)
            self.placement.enqueue(ts)

    def revive(self, ts: TaskState) -> None:
        """A RELEASED task is needed: computed (again), with all released tasks that it needs."""
        stack = [ts]
        order: list[TaskState] = []
        while stack:
            task = stack.pop()
            if task.state is not RELEASED:
                continue
            check(self.state, task, WAITING)
            order.append(task)
            stack += [dep for dep in task.deps if dep.state is RELEASED]
        for task in order:  # all take up their inputs before one of them fails and lets go of its own
            self._take_up(task)
        for task in reversed(order):
            if task.state is not WAITING:
                continue
            if task.spec is None:
                self.on_data_needed.append(task)
                continue
            if (error := happened_already(task)) is not None:
                self.fail([task], error)
                continue
            self.state.counters["recomputed"] += 1
            self._revive_inputs(task, [])
            if task.state is WAITING and not task.waiting_on:
                check(self.state, task, READY)
                self.placement.enqueue(task)

    @staticmethod
    def _take_up(ts: TaskState) -> None:
        """Holds the inputs of a task that has become WAITING, and has it told of them."""
        ts.waiting_on = 0
        for dep in ts.deps:
            dep.holds += 1
            if dep.state is not MEMORY:
                ts.waiting_on += 1
                if dep.state is not ERRED:
                    if dep.waiters is None:
                        dep.waiters = []
                    dep.waiters.append(ts)
        if ts.rare is not None:
            for reference in ts.rare.references:
                reference.holds += 1

    def retry(self, keys: Iterable[Key]) -> None:
        """Failed tasks are tried again, with the failed tasks that they depend on."""
        for key in keys:
            ts = self.state.tasks.get(key)
            if ts is None or ts.state is not ERRED or ts.wanted_by is None:
                continue
            stack, chain = [ts], []
            while stack:
                task = stack.pop()
                if task.state is ERRED:
                    check(self.state, task, RELEASED)
                    rare = task.extra()
                    rare.error, rare.attempts_erred, rare.deaths, rare.home = None, 0, 0, None
                    task.recount = True
                    chain.append(task)
                    stack += task.deps
            for task in chain:
                for client in task.wanters():
                    client.outbox.add(KeysRecomputing([task.key]))
            self.revive(ts)

    def actor_settled(self, ts: TaskState) -> None:
        """An actor has been made: where it is, it stays."""
        if isinstance(ts.who_has, WorkerState):
            ts.extra().home = ts.who_has
            ts.who_has.actors += 1

    def lose_actors(self, worker: WorkerState, actors: list[TaskState], cause: str) -> None:
        """A worker is gone, and its actors with it: they have failed, and so have all calls that are not over.

        The caller has made what waits for them wait again (`DataBook.lost`).
        """
        inner: list[TaskState] = []
        for ts in actors:
            self._drop_inline(ts)
            ts.who_has = None
            check(self.state, ts, RELEASED)
            self._drop_contained(ts, inner)
            check(self.state, ts, WAITING)
            self._take_up(ts)
            self.fail([ts], actor_lost(ts, worker, cause))
        for ts in inner:
            self.reconsider(ts)

    def lose(self, tasks: list[TaskState]) -> None:
        """The last replicas of these values are gone: compute again what is needed."""
        told: dict[ClientState, list[Key]] = {}
        inner: list[TaskState] = []
        for ts in tasks:
            self._drop_inline(ts)
            ts.who_has = None
            check(self.state, ts, RELEASED)
            self._drop_contained(ts, inner)
            for client in ts.wanters():
                told.setdefault(client, []).append(ts.key)
        for client, keys in told.items():
            client.outbox.add(KeysRecomputing(keys))
        for ts in tasks:
            if ts.state is RELEASED and (ts.wanted_by is not None or ts.holds):
                self.revive(ts)
            else:
                self.reconsider(ts)
        for ts in inner:
            self.reconsider(ts)
