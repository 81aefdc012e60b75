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
    PROCESSING,
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
    DropData,
    ErrorInfo,
    FetchFailed,
    KeysCancelled,
    Locations,
    PlaceData,
    PlacementFailed,
    ReportMissing,
    RequestLocations,
    UpdateLocations,
)

PLACEMENTS = 20
"""Data that could not be put on a worker so often is given up."""
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
                self._declare_again(client, ts, op)
                if ts.state is WAITING and ts.spec is None:
                    placed.append(ts)
                continue
            ts = TaskState(key, None, WAITING, 0, b"", (), client)
            ts.size = size
            ts.extra().data = DataInfo(client, op.retained, op.workers, op.copies)
            self.state.tasks[key] = ts
            placed.append(ts)
        self.place(placed)

    def _declare_again(self, client: ClientState, ts: TaskState, op: DeclareData) -> None:
        """A client has data that is known already: it is the source from now on, unless a worker holds the value."""
        if ts.spec is None and ts.state is not MEMORY:
            rare = ts.extra()
            if rare.data is not None and rare.data.retained and rare.data.client is not client:
                rare.data.client.outbox.add(DropData([ts.key]))
            rare.data = DataInfo(client, op.retained, op.workers, op.copies)
        self.lifecycle.want(client, ts)
        if ts in self.lifecycle.on_data_needed:
            self.lifecycle.on_data_needed.remove(ts)

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
                if len(self._unplaced) > len(self.state.tasks):
                    self._unplaced = {k: t for k, t in self._unplaced.items() if t.state is WAITING}
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
        allowed.sort(key=lambda w: (w in data.avoided, w.stored_bytes + planned.get(w, 0), w.number))
        return tuple(allowed[: max(1, data.copies)])

    def placement_failed(self, client: ClientState, op: PlacementFailed) -> None:
        """A client could not put data where it was told to."""
        self.state.note(op.address, f"client {client.name} could not put data there: {op.reason}")
        again: list[TaskState] = []
        hopeless: list[TaskState] = []
        worker = self.state.worker_addresses.get(op.address)
        for key in op.keys:
            ts = self.state.tasks.get(key)
            data = ts.rare.data if ts is not None and ts.rare is not None else None
            if ts is None or data is None or ts.state is not WAITING or data.client is not client:
                continue
            if worker is not None:
                data.avoided = (*data.avoided, worker)
            (again if len(data.avoided) < PLACEMENTS else hopeless).append(ts)
        self.place(again)
        self._lost_for_good(hopeless, f"its client could not put it on a worker, {PLACEMENTS} times: {op.reason}")

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
        self._lost_for_good(gone, "the only worker that held the data is gone")

    def _lost_for_good(self, gone: list[TaskState], reason: str) -> None:
        """Data that cannot come back is given up, with the tasks that wait for it."""
        doomed = {id(ts): ts for ts in gone}
        stack = list(gone)
        while stack:
            ts = stack.pop()
            for waiter in ts.waiters or ():
                if waiter.state is WAITING and id(waiter) not in doomed:
                    doomed[id(waiter)] = waiter
                    stack.append(waiter)
        if doomed:
            self.lifecycle.give_up(list(doomed.values()), reason, "LostDataError")
        for ts in gone:
            if ts.state is WAITING:  # runs under way have perhaps fetched it; those that come back for it fail
                text = f"{ts.name} is needed and lost: {reason}"
                self.lifecycle.fail([ts], ErrorInfo("LostDataError", text, key=ts.key, name="data"))

    def client_left(self, client: ClientState) -> None:
        """Data that a client had not put anywhere yet will not come."""
        gone = [
            ts
            for ts in self.state.tasks.values()
            if ts.spec is None and ts.state is WAITING and ts.rare is not None and ts.rare.data is not None
            if ts.rare.data.client is client
        ]
        self._lost_for_good(gone, f"client {client.name} left before it had put the data on a worker")

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
            elif ts is not None and ts.state in (WAITING, READY, PROCESSING):
                self._unplaced.pop(key, None)
                if ts.rare is not None and ts.rare.data is not None:
                    ts.rare.data.avoided = ()
                self.lifecycle.adopt(worker, ts, size)
            else:
                worker.outbox.drop([key], size)

    def fetch_failed(self, worker: WorkerState, op: FetchFailed) -> None:
        """A worker did not get inputs from a peer."""
        holder = self.state.worker_numbers.get(op.holder)
        if holder is not None and op.reachable:
            self._not_held(holder, op.keys)
        nowhere: list[TaskState] = []
        for key in op.keys:
            ts = self.state.tasks.get(key)
            if ts is None:
                continue  # no task needs it any more: `CancelRuns` is on its way
            if any(w is not holder for w in ts.holders()):
                self.tell_location(worker, ts)
            elif ts.who_has is not None:
                self._ask_again.append((self.state.now + ASK_AGAIN_S, worker, key))
            else:
                nowhere.append(ts)
        self._take_back_runs(worker, nowhere)

    def _take_back_runs(self, worker: WorkerState, nowhere: list[TaskState]) -> None:
        """Runs of a worker that lack values which nobody holds: their tasks wait here for the values, or share their fate.

        Left with the worker they would take the room in which the values are to be computed again.
        """
        if not nowhere:
            return
        missing = {id(ts) for ts in nowhere}
        for run_id, task in list(worker.processing.items()):
            if task is None or task.run_id != run_id or task.state is not PROCESSING or task.worker is not worker:
                continue
            if any(id(dep) in missing for dep in task.deps):
                self.lifecycle.take_back(task)

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
            worker.stored_keys -= 1
            worker.stored_bytes -= ts.size
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
        self._wait_for_lost(lost)
        self.lifecycle.lose(lost)

    def _wait_for_lost(self, lost: list[TaskState]) -> None:
        gone = {id(ts) for ts in lost}
        for task in list(self.state.tasks.values()):
            if task.deps and (task.state is WAITING or task.state is READY):
                missing = [dep for dep in task.deps if id(dep) in gone]
                if missing:
                    self.lifecycle.wait_again(task, missing)

    def actors_lost(self, worker: WorkerState, actors: list[TaskState], cause: str) -> None:
        """The worker of these actors is gone: nobody needs what stood for them, and what waits for them shares their fate."""
        for ts in actors:
            for holder in ts.holders():
                if holder is not worker:
                    holder.outbox.drop([ts.key], ts.size)
                    holder.stored_keys -= 1
                    holder.stored_bytes -= ts.size
        self._wait_for_lost(actors)
        self.lifecycle.lose_actors(worker, actors, cause)

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Sends workers to holders that they could not reach before."""
        if not self._ask_again:
            return
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
                self._take_back_runs(worker, [ts])

    def settle(self) -> None:
        """Before a flush: data that became needed."""
        lifecycle = self.lifecycle
        while lifecycle.on_data_needed:
            needed, lifecycle.on_data_needed = lifecycle.on_data_needed, []
            self.needed_again(needed)

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
        self._ask_again = [entry for entry in self._ask_again if entry[1] is not worker]
