"""Data that clients give, and the whereabouts of all values.

Bytes never come here: a client declares a key, is told the address of a worker, puts the bytes there, and the worker reports
them. Workers and clients that could not get a value from where it should be report that; they hear of another place, or the
value is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.placement import Placement
from zmqtasks.nodes.scheduler.state import (
    MEMORY,
    READY,
    WAITING,
    ClientState,
    DataInfo,
    SchedulerState,
    TaskState,
    WorkerState,
)
from zmqtasks.protocol.ops import (
    DataAdded,
    DeclareData,
    FetchFailed,
    KeysCancelled,
    Locations,
    PlaceData,
    PlacementFailed,
    ReportMissing,
    RequestLocations,
    UpdateLocations,
)

ASK_AGAIN_S = 0.5
"""A worker that could not reach the only holder of a value asks it again after this."""


class DataBook:
    """Who is to hold what, and who asked for what could not be found."""

    def __init__(self, state: SchedulerState, placement: Placement, lifecycle: Lifecycle) -> None:
        self.state = state
        self.placement = placement
        self.lifecycle = lifecycle
        self._unplaced: dict[Key, TaskState] = {}
        """Declared, and no worker to take it yet."""
        self._awaiting: dict[Key, set[WorkerState]] = {}
        """Workers that wait to hear where a value is."""
        self._ask_again: list[tuple[float, WorkerState, Key]] = []

    @property
    def deadline(self) -> float | None:
        """When `tick` wants to be called."""
        return self._ask_again[0][0] if self._ask_again else None

    # --- from clients -----------------------------------------------------------------------------------------------

    def declare(self, client: ClientState, op: DeclareData) -> None:
        """New data of a client."""
        if len(op.keys) != len(op.sizes):
            raise RemoteProtocolError(f"DeclareData: {len(op.sizes)} sizes for {len(op.keys)} keys")
        placed: list[TaskState] = []
        for key, size in zip(op.keys, op.sizes, strict=True):
            ts = self.state.tasks.get(key)
            if ts is not None:
                self.lifecycle.want(client, ts)
                continue
            ts = TaskState(key, None, WAITING, 0, b"", (), client)
            ts.size = size
            ts.extra().data = DataInfo(client, op.retained, op.workers, op.copies)
            self.state.tasks[key] = ts
            placed.append(ts)
        self.place(placed)

    def place(self, tasks: Iterable[TaskState]) -> None:
        """Tells clients where to put data; what no worker can take waits for one."""
        targets: dict[tuple[ClientState, tuple[WorkerState, ...]], list[Key]] = {}
        planned: dict[WorkerState, int] = {}
        for ts in tasks:
            data = ts.rare.data if ts.rare is not None else None
            if ts.state is not WAITING or data is None:
                continue
            workers = self._choose(data, planned)
            if not workers:
                data.pending = True
                self._unplaced[ts.key] = ts
                continue
            data.pending = False
            data.targets = workers
            self._unplaced.pop(ts.key, None)
            for worker in workers:
                worker.outbox.drop_now()  # it may have been told to drop a value of this very key
                planned[worker] = planned.get(worker, 0) + ts.size + 1
            targets.setdefault((data.client, workers), []).append(ts.key)
        for (client, workers), keys in targets.items():
            client.outbox.add(PlaceData(keys, [w.address for w in workers]))

    def _choose(self, data: DataInfo, planned: dict[WorkerState, int]) -> tuple[WorkerState, ...]:
        allowed = [w for w in self.state.workers.values() if w.usable]
        if data.workers:
            allowed = [w for w in allowed if any(r in (w.name, w.address, w.host) for r in data.workers)]
        if data.copies < 0:
            return tuple(allowed)
        allowed.sort(key=lambda w: (w.stored_bytes + planned.get(w, 0), w.number))
        return tuple(allowed[: data.copies])

    def placement_failed(self, client: ClientState, op: PlacementFailed) -> None:
        """A client could not put data where it was told to."""
        self.state.note(op.address, f"client {client.name} could not put data there: {op.reason}")
        again = []
        for key in op.keys:
            ts = self.state.tasks.get(key)
            if ts is not None and ts.state is WAITING and ts.rare is not None and ts.rare.data is not None:
                worker = self.state.worker_addresses.get(op.address)
                if worker is not None and ts.rare.data.copies > 0 and len(self.state.workers) > 1:
                    worker.stored_bytes += 1  # the others come first now
                again.append(ts)
        self.place(again)

    def needed_again(self, tasks: Iterable[TaskState]) -> None:
        """Lost data: its client sends it again where it has kept the bytes; else it is gone for good."""
        gone = []
        for ts in tasks:
            data = ts.rare.data if ts.rare is not None else None
            if ts.state is not WAITING:
                continue
            if data is not None and data.retained and data.client.session in self.state.clients:
                self.place([ts])
            else:
                gone.append(ts)
        if gone:
            doomed = list(gone)
            for ts in doomed:
                doomed += [t for t in ts.waiters or () if t.state is WAITING and t not in doomed]
            self.lifecycle.give_up(doomed, "the only worker that held the data is gone", "LostDataError")

    def locate(self, client: ClientState, op: RequestLocations) -> None:
        """Answers where values are."""
        tasks = self.state.tasks
        found = [tasks.get(key) for key in op.keys]
        holders = [[w.address for w in ts.holders()] if ts is not None else [] for ts in found]
        client.outbox.add(Locations(op.request, op.keys, holders))
        unknown = [key for key, ts in zip(op.keys, found, strict=True) if ts is None]
        if unknown:
            client.outbox.add(
                KeysCancelled(unknown, "unknown to the scheduler: released or cancelled", "LostDataError")
            )

    def client_misses(self, client: ClientState, op: ReportMissing) -> None:
        """A client did not get values from a worker."""
        worker = self.state.worker_addresses.get(op.address)
        if worker is not None and op.reachable:
            self._not_held(worker, op.keys)

    # --- from workers -----------------------------------------------------------------------------------------------

    def added(self, worker: WorkerState, op: DataAdded) -> None:
        """A worker holds values that clients put there, or that it fetched."""
        if len(op.keys) != len(op.sizes):
            raise RemoteProtocolError(f"DataAdded: {len(op.sizes)} sizes for {len(op.keys)} keys")
        for key, size in zip(op.keys, op.sizes, strict=True):
            ts = self.state.tasks.get(key)
            if ts is not None and ts.state is MEMORY:
                self.lifecycle.add_replica(worker, ts)
            elif ts is not None and (ts.wanted or ts.holds):
                self._unplaced.pop(key, None)
                self.lifecycle.adopt(worker, ts, size)
                self.lifecycle.regained.append(ts)
            else:
                worker.outbox.drop(key)

    def fetch_failed(self, worker: WorkerState, op: FetchFailed) -> None:
        """A worker did not get inputs from a peer."""
        holder = self.state.worker_numbers.get(op.holder)
        if holder is not None and op.reachable:
            self._not_held(holder, op.keys)
        for key in op.keys:
            ts = self.state.tasks.get(key)
            others = [w for w in ts.holders() if w is not holder] if ts is not None else []
            if ts is not None and others:
                self.tell_location(worker, ts)
            elif ts is not None and ts.who_has is not None:
                self._ask_again.append((self.state.now + ASK_AGAIN_S, worker, key))
            else:
                self._awaiting.setdefault(key, set()).add(worker)

    def tell_location(self, worker: WorkerState, ts: TaskState) -> None:
        """Says who holds a value now."""
        holders = list(ts.holders())
        for holder in holders:
            self.placement.introduce(worker, holder)
        worker.outbox.add(UpdateLocations([ts.key], [[w.number for w in holders]]))

    def _not_held(self, worker: WorkerState, keys: Iterable[Key]) -> None:
        """`worker` was thought to hold these, and does not."""
        lost: list[TaskState] = []
        for key in keys:
            ts = self.state.tasks.get(key)
            if ts is None or ts.state is not MEMORY or not ts.held_by(worker):
                continue
            self.state.note(ts.name, f"{worker.address} does not hold it")
            if self.remove_replica(ts, worker):
                lost.append(ts)
        if lost:
            self.lost(lost)

    @staticmethod
    def remove_replica(ts: TaskState, worker: WorkerState) -> bool:
        """Takes a worker from the holders; True when it was the last one."""
        if isinstance(ts.who_has, set):
            ts.who_has.discard(worker)
            if ts.who_has:
                return False
        ts.who_has = None
        return True

    def lost(self, lost: list[TaskState]) -> None:
        """These values have no holder left: tasks that counted on them wait again, and they are computed again."""
        gone = {id(ts) for ts in lost}
        for task in list(self.state.tasks.values()):
            if task.deps and (task.state is WAITING or task.state is READY):
                missing = [dep for dep in task.deps if id(dep) in gone]
                if missing:
                    self.lifecycle.wait_again(task, missing)
        self.lifecycle.lose(lost)

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Sends workers to holders that they could not reach before."""
        now = self.state.now
        due = [entry for entry in self._ask_again if entry[0] <= now]
        self._ask_again = [entry for entry in self._ask_again if entry[0] > now]
        for _, worker, key in due:
            ts = self.state.tasks.get(key)
            if worker.session not in self.state.workers or ts is None:
                continue
            if ts.who_has is not None:
                self.tell_location(worker, ts)
            else:
                self._awaiting.setdefault(key, set()).add(worker)

    def settle(self) -> None:
        """Before a flush: data that became needed, and whereabouts that became known."""
        lifecycle = self.lifecycle
        while lifecycle.on_data_needed:
            needed, lifecycle.on_data_needed = lifecycle.on_data_needed, []
            self.needed_again(needed)
        if lifecycle.regained:
            regained, lifecycle.regained = lifecycle.regained, []
            if self._awaiting:
                for ts in regained:
                    for worker in self._awaiting.pop(ts.key, ()):
                        if worker.session in self.state.workers and ts.state is MEMORY:
                            self.tell_location(worker, ts)

    def worker_joined(self) -> None:
        """Data that no worker could take may find one now."""
        if self._unplaced:
            waiting = [ts for ts in self._unplaced.values() if ts.state is WAITING]
            self._unplaced.clear()
            self.place(waiting)

    def forget_worker(self, worker: WorkerState) -> None:
        """A worker is gone: nothing to tell it, and data on its way to it is placed anew."""
        on_the_way = [
            ts
            for ts in self.state.tasks.values()
            if ts.spec is None
            and ts.state is WAITING
            and (data := ts.extra().data) is not None
            and worker in data.targets
        ]
        self.place(on_the_way)
        for workers in self._awaiting.values():
            workers.discard(worker)
        self._awaiting = {key: workers for key, workers in self._awaiting.items() if workers}
        self._ask_again = [entry for entry in self._ask_again if entry[1] is not worker]
