"""A scheduler machine with clients and workers that speak ops, in one thread, with a seeded order of events."""

from __future__ import annotations

from random import Random

from zmqtasks.config import Config
from zmqtasks.ids import Key, first_key_of_client
from zmqtasks.nodes.scheduler.machine import SchedulerMachine
from zmqtasks.protocol import ops
from zmqtasks.testing.scheduler_checks import check_scheduler

F = b"f" * 16


class SimulatedWorker:
    """Holds values, runs tasks when told to; a value is the sum of its inputs plus the number in its arguments."""

    def __init__(self, cluster: Cluster, name: str, **options) -> None:
        self.session = self.instance = name.encode()
        intro = ops.WorkerIntroduction(
            name,
            1,
            options.get("host", "here"),
            f"tcp://{name}:1",
            options.get("nthreads", 1),
            0,
            options.get("resources", {}),
            options.get("nanny", b""),
        )
        self.state = cluster.machine.worker_joined(self.session, self.instance, intro, cluster.now)
        self.cluster = cluster
        self.values: dict[Key, int] = {}
        self.inbox: list[ops.Op] = []
        self.runs: dict[int, tuple[Key, bytes, list[Key]]] = {}
        self.peers: dict[int, str] = {}
        self.rides: dict[Key, int] = {}
        self.large = False

    def take(self, op: ops.Op) -> None:
        """Handles one op as a worker does, without running anything."""
        match op:
            case ops.ComputeTasks():
                args, dep, offset, first = (
                    op.args_lengths or [0] * len(op.keys),
                    op.dep_counts or [0] * len(op.keys),
                    0,
                    0,
                )
                for key, run, n, k in zip(op.keys, op.run_ids, args, dep, strict=True):
                    self.runs[run] = (key, op.args[offset : offset + n], op.deps[first : first + k])
                    offset, first = offset + n, first + k
            case ops.FreeKeys():
                for key in op.keys:
                    self.values.pop(key, None)
            case ops.Peers():
                self.peers.update(zip(op.numbers, op.addresses, strict=True))
            case ops.Inputs():
                offset = 0
                for key, n in zip(op.keys, op.lengths, strict=True):
                    if n >= 0:
                        self.rides[key] = int(op.values[offset : offset + n])
                        offset += n
            case ops.RetractRuns() | ops.CancelRuns():
                gone = [run for run in op.run_ids if self.runs.pop(run, None)]
                if gone:
                    self.cluster.from_worker(self, ops.RunsDropped(gone))

    def step(self, count: int = 1) -> None:
        """Takes all that has arrived, then runs up to `count` tasks."""
        while self.inbox:
            self.take(self.inbox.pop(0))
        for run in list(self.runs)[:count]:
            key, args, deps = self.runs[run]
            found = [self._value(dep) for dep in deps]
            if None in found:
                continue  # a peer has died: the scheduler will hear of it, or say so
            del self.runs[run]
            value = sum(found) + int(args or b"0")
            self.values[key] = value
            text = b"" if self.large else b"%d" % value
            lengths, sizes = ([-1], [100_000]) if self.large else ([len(text)], [])
            self.cluster.from_worker(self, ops.TasksFinished([run], lengths, text, [10], sizes))

    def _value(self, key: Key) -> int | None:
        if key in self.values:
            return self.values[key]
        if key in self.rides:
            return self.rides[key]
        return next((w.values[key] for w in self.cluster.workers if key in w.values), None)


class Cluster:
    """The machine, and everybody around it."""

    def __init__(self, seed: int = 0, **config) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.machine = SchedulerMachine(epoch=1, config=Config(**config))
        self.client = self.machine.client_joined(b"client", ops.ClientIntroduction("c", 1, "here"), 0.0)
        self.workers: list[SimulatedWorker] = []
        self.told: list[ops.Op] = []
        self.results: dict[Key, bytes | None] = {}
        self.next_key = first_key_of_client(self.client.number)
        self.to_client(ops.PutFunctions([F], [b"code"]))

    def add_worker(self, name: str, **options) -> SimulatedWorker:
        worker = SimulatedWorker(self, name, **options)
        self.workers.append(worker)
        self.flush()
        return worker

    def to_client(self, *sent: ops.Op) -> None:
        """The client sends ops."""
        self.machine.receive(self.client, sent, self.now)
        self.flush()

    def from_worker(self, worker: SimulatedWorker, *sent: ops.Op) -> None:
        """A worker sends ops."""
        self.machine.receive(worker.state, sent, self.now)
        self.flush()

    def submit(self, args: bytes = b"1", deps: list[Key] | None = None, key: Key | None = None, **options) -> Key:
        """One task."""
        if key is None:
            key = self.next_key
            self.next_key += 1
        deps = deps or []
        self.to_client(
            ops.SubmitTasks(
                F, "f", keys=[key], args=args, args_lengths=[len(args)], dep_counts=[len(deps)], deps=deps,
                options=ops.TaskOptions(**options),
            )
        )  # fmt: skip
        return key

    def flush(self) -> None:
        """Delivers what the machine has to say, and checks its books."""
        for session, sent in self.machine.flush():
            if session == self.client.session:
                for op in sent:
                    self.hear(op)
                continue
            worker = next((w for w in self.workers if w.session == session), None)
            if worker is not None:
                worker.inbox += sent
        check_scheduler(self.machine)

    def hear(self, op: ops.Op) -> None:
        """What the client is told."""
        self.told.append(op)
        match op:
            case ops.KeysInMemory():
                offset = 0
                for key, n in zip(op.keys, op.lengths, strict=True):
                    self.results[key] = op.values[offset : offset + n] if n >= 0 else None
                    offset += max(n, 0)
            case ops.KeysRecomputing():
                for key in op.keys:
                    self.results.pop(key, None)

    def kill(self, worker: SimulatedWorker, executing: list[int] | None = None) -> None:
        """The process of a worker is gone; its nanny says so."""
        self.workers.remove(worker)
        op = ops.WorkerExited(worker.instance, -9, "killed by SIGKILL", executing or [])
        self.machine.membership.worker_exited(op)
        self.flush()

    def pass_time(self, seconds: float) -> None:
        """The clock goes on, with all deadlines on the way."""
        until = self.now + seconds
        while (deadline := self.machine.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.machine.tick(self.now)
            self.flush()
        self.now = until

    def run(self, until=None, turns: int = 10_000) -> None:
        """Workers take turns in random order until nothing moves (or `until()` holds)."""
        for _ in range(turns):
            if until is not None and until():
                return
            busy = [w for w in self.workers if w.inbox or w.runs]
            if not busy:
                if until is None:
                    return
                self.pass_time(0.01)
                continue
            self.random.choice(busy).step(self.random.randint(1, 4))
            self.now += 1e-5
        raise AssertionError("the simulation does not come to an end")
