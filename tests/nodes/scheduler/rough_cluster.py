"""A simulated cluster in which messages cross each other, inputs are really fetched, and tasks raise, block and secede."""

from __future__ import annotations

from tests.nodes.scheduler.cluster import Cluster, SimulatedWorker
from zmqtasks.ids import Key
from zmqtasks.protocol import ops

RAISES, MAY_RAISE = b"!", b"?"


class RoughWorker(SimulatedWorker):
    """Answers late, and fetches from the workers that it was told of."""

    def __init__(self, cluster: RoughCluster, name: str, **options) -> None:
        super().__init__(cluster, name, **options)
        self.rough = cluster
        self.said: list[ops.Op] = []
        self.places: dict[Key, list[int]] = {}
        self.asked: set[Key] = set()
        self.started: dict[int, str] = {}

    def say(self, op: ops.Op) -> None:
        """Sends an op, which arrives some time later."""
        self.said.append(op)

    def deliver(self, count: int) -> None:
        """Lets the scheduler hear the next ops."""
        batch, self.said = self.said[:count], self.said[count:]
        if batch:
            self.rough.from_worker(self, *batch)

    def take(self, op: ops.Op) -> None:
        match op:
            case ops.RetractRuns():
                self._give_back([run for run in op.run_ids if run in self.runs and run not in self.started])
            case ops.CancelRuns():
                self._give_back([run for run in op.run_ids if run in self.runs])
            case ops.UpdateLocations():
                for key, numbers in zip(op.keys, op.holders, strict=True):
                    self.places[key] = list(numbers)
                    if numbers:
                        self.asked.discard(key)
            case ops.Inputs():
                super().take(op)
                for key, numbers in zip(op.keys, op.holders, strict=True):
                    self.places[key] = list(numbers)
                    self.asked.discard(key)
            case _:
                super().take(op)

    def _give_back(self, runs: list[int]) -> None:
        for run in runs:
            del self.runs[run]
            self.started.pop(run, None)
        self.asked &= {dep for _, _, deps in self.runs.values() for dep in deps}
        if runs:
            self.say(ops.RunsDropped(runs))

    def step(self, count: int = 1) -> None:
        random = self.rough.random
        if random.random() < 0.6:
            while self.inbox:
                self.take(self.inbox.pop(0))
        for run in list(self.runs)[:count]:
            self._work_at(run)
        self.deliver(random.randint(0, 4))

    def _work_at(self, run: int) -> None:
        random = self.rough.random
        _, args, deps = self.runs[run]
        if None in [self._value(dep) for dep in deps]:
            return
        stage = self.started.get(run)
        if stage is None and random.random() < 0.2:
            self.started[run] = random.choice(["blocked", "seceded"])
            self.say((ops.TaskBlocked if self.started[run] == "blocked" else ops.TaskSeceded)(run))
            return
        if stage == "blocked":
            self.started[run] = "resumed"
            self.say(ops.TaskResumed(run))
            return
        self._end(run, args, [self._value(dep) for dep in deps])

    def _end(self, run: int, args: bytes, found: list[int | None]) -> None:
        key = self.runs.pop(run)[0]
        self.started.pop(run, None)
        if args == RAISES or (args.startswith(MAY_RAISE) and self.rough.random.random() < 0.5):
            self.say(ops.TaskErred(run, ops.ErrorInfo("exception", "ValueError: no")))
            return
        value = sum(v for v in found if v is not None) + int(args.removeprefix(MAY_RAISE) or b"0")
        self.values[key] = value
        text = b"" if self.large else b"%d" % value
        lengths, sizes = ([-1], [100_000]) if self.large else ([len(text)], [])
        self.say(ops.TasksFinished([run], lengths, text, [10], sizes))

    def _value(self, key: Key) -> int | None:
        if key in self.values:
            return self.values[key]
        if key in self.rides:
            return self.rides[key]
        if key in self.asked:
            return None
        holders, number, reachable = self.places.pop(key, []), -1, True
        for number in holders:
            peer = next((w for w in self.rough.workers if w.state.number == number), None)
            reachable = peer is not None
            if peer is not None and key in peer.values:
                self.values[key] = peer.values[key]
                self.say(ops.DataAdded([key], [100]))
                return self.values[key]
        self.asked.add(key)
        self.say(ops.FetchFailed([key], number, reachable))
        return None


class RoughCluster(Cluster):
    """The cluster around `RoughWorker`s; its client puts data, and keeps the retained."""

    def __init__(self, seed: int, **config) -> None:
        self.errors: set[Key] = set()
        self.cancelled: set[Key] = set()
        self.data: dict[Key, int] = {}
        self._to_put: list[ops.PlaceData] = []
        super().__init__(seed, **config)

    def add_worker(self, name: str, **options) -> RoughWorker:
        worker = RoughWorker(self, name, **options)
        self.workers.append(worker)
        self.flush()
        return worker

    def declare(self, key: Key, value: int, *, retained: bool) -> None:
        """Data of the client."""
        self.data[key] = value
        self.to_client(ops.DeclareData([key], [100], retained=retained))

    def flush(self) -> None:
        super().flush()
        while self._to_put:
            self._put(self._to_put.pop(0))

    def _put(self, op: ops.PlaceData) -> None:
        for address in op.addresses:
            worker = next((w for w in self.workers if w.state.address == address), None)
            if worker is None or self.random.random() < 0.1:
                self.to_client(ops.PlacementFailed(op.keys, address, "no luck"))
                continue
            for key in op.keys:
                worker.values[key] = self.data[key]
                worker.say(ops.DataAdded([key], [100]))

    def hear(self, op: ops.Op) -> None:
        super().hear(op)
        match op:
            case ops.PlaceData():
                self._to_put.append(op)
            case ops.KeysErred():
                self.errors.update(op.keys)
            case ops.KeysCancelled():
                self.cancelled.update(op.keys)
            case ops.KeysInMemory() | ops.KeysRecomputing():
                self.errors.difference_update(op.keys)

    def settle(self, until, turns: int = 5000) -> None:
        """Everybody goes on until the condition holds."""
        for turn in range(turns):
            if until():
                return
            self.random.choice(self.workers).step(self.random.randint(1, 4))
            self.pass_time(1e-5 if turn % 8 else 0.01)
        stuck = {key: ts.state.name for key, ts in self.machine.state.tasks.items()}
        raise AssertionError(f"the simulation does not come to an end: {stuck}")
