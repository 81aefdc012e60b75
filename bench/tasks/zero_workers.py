"""What the scheduler itself costs: simulated workers that answer at once, no sockets, real messages.

The scheduler's part of each turn is timed alone, in CPU time: decoding what arrived, the machine, encoding what goes out. The
simulated client submits in batches as a real one does, receives all results and releases all keys; the simulated workers
answer each message with one message. A turn takes all messages that are there, as one turn of the event loop does.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from array import array
from typing import Any

from zmqtasks.config import Config
from zmqtasks.deploy.serve import calm_collector
from zmqtasks.ids import first_key_of_client
from zmqtasks.nodes.scheduler.machine import SchedulerMachine
from zmqtasks.nodes.scheduler.node import give_memory_back
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.ops import (
    ClientIntroduction,
    ClientToScheduler,
    ComputeTasks,
    Op,
    PutFunctions,
    ReleaseKeys,
    SchedulerToClient,
    SchedulerToWorker,
    SubmitTasks,
    TasksFinished,
    WorkerIntroduction,
    WorkerToScheduler,
)

FUNCTION = b"\x01" * 16
ARGS = b"\x01" + b"\x80\x05K\x07\x85\x94}\x94\x86\x94."  # an inline payload of ((7,), {}), never opened here
VALUE = b"\x01\x80\x05K\x08."
BATCH = 2_000
TASK_US = 12


class SimulatedCluster:
    """A scheduler machine with one client and `n_workers` workers."""

    def __init__(self, n_workers: int) -> None:
        self.machine = SchedulerMachine(epoch=1, config=Config())
        self.cpu_s = 0.0
        self.messages = 0
        # Numbers of the simulation that last: as objects they would each keep an arena (see `resting`).
        self._time = array("d", [0.0])
        self._next_key = array("q", [0])
        self._from_client = Codec(ClientToScheduler)
        self._from_worker = Codec(WorkerToScheduler)
        self._at_client = Codec(SchedulerToClient)
        self._at_worker = Codec(SchedulerToWorker)
        self.client = self.machine.client_joined(b"client", ClientIntroduction("bench", 1, "host"), 0.0)
        self.workers = {}
        for i in range(n_workers):
            intro = WorkerIntroduction(f"w{i}", 1, f"host{i}", f"tcp://10.0.0.1:{i}", 1, 0, {})
            session = b"w%d" % i
            self.workers[session] = self.machine.worker_joined(session, session, intro, 0.0)
        self.results = 0
        self._from_workers: list[tuple[bytes, bytes]] = []
        self._next_key[0] = first_key_of_client(self.client.number)
        self.send(PutFunctions([FUNCTION], [b"code"]))

    def send(self, *ops: Op) -> None:
        """The client sends one message; the scheduler takes a turn."""
        self._turn([(b"client", self._from_client.encode(1, 0, ops))])

    def _turn(self, arrived: list[tuple[bytes, bytes]]) -> None:
        now = self._time[0] = self._time[0] + 0.0001
        started = time.process_time()
        for session, data in arrived:
            if session == b"client":
                self.machine.receive(self.client, self._from_client.decode_untrusted(data)[2], now)
            else:
                ops = self._from_worker.decode_untrusted(data)[2]
                self.machine.receive(self.workers[session], ops, now)
        out = [(session, self._from_client.encode(1, 1, ops)) for session, ops in self.machine.flush()]
        deadline = self.machine.deadline()
        if deadline is not None and deadline <= now:
            self.machine.tick(now)
        self.cpu_s += time.process_time() - started
        self.messages += len(arrived) + len(out)
        for session, data in out:
            if session == b"client":
                ops = self._at_client.decode_untrusted(data)[2]
                self.results += sum(len(op.keys) for op in ops if type(op).__name__ == "KeysInMemory")
            else:
                self._answer(session, data)

    def _answer(self, session: bytes, data: bytes) -> None:
        done = [
            TasksFinished(
                op.run_ids, [len(VALUE)] * len(op.run_ids), VALUE * len(op.run_ids), [TASK_US] * len(op.run_ids)
            )
            for op in self._at_worker.decode_untrusted(data)[2]
            if isinstance(op, ComputeTasks)
        ]
        if done:
            self._from_workers.append((session, self._from_worker.encode(1, 1, done)))

    def run_until(self, results: int) -> None:
        """Turns until the client has so many results."""
        while self.results < results:
            arrived, self._from_workers = self._from_workers, []
            if not arrived:
                raise RuntimeError(f"the simulation stands still at {self.results} of {results} results")
            self._turn(arrived)

    def rest(self) -> None:
        """What is left to be said is said, and the simulation's own numbers are none of the scheduler's memory."""
        if (deadline := self.machine.deadline()) is not None:
            self.machine.tick(deadline)
            self.machine.flush()
        self.cpu_s, self.messages, self.results = 0.0, 0, 0

    def submit(self, n: int, deps: list[int] | None = None, per_task: int = 0) -> range:
        """`n` tasks with `per_task` of `deps` each, in batches."""
        first_key = self._next_key[0]
        keys = range(first_key, first_key + n)
        self._next_key[0] += n
        for first in range(0, n, BATCH):
            count = min(BATCH, n - first)
            if deps is None:
                op = SubmitTasks(FUNCTION, "inc", keys[first], count, [], ARGS * count, [len(ARGS)] * count)
            else:
                part = deps[first * per_task : (first + count) * per_task]
                op = SubmitTasks(FUNCTION, "add", keys[first], count, dep_counts=[per_task] * count, deps=part)
            self.send(op)
        return keys

    def release(self, keys: list[int]) -> None:
        """The client lets go of keys, in batches."""
        for first in range(0, len(keys), BATCH):
            self.send(ReleaseKeys(keys[first : first + BATCH]))


def run_map(cluster: SimulatedCluster, n: int) -> int:
    """Independent tasks."""
    target = cluster.results + n
    keys = cluster.submit(n)
    cluster.run_until(target)
    cluster.release(list(keys))
    return n


def run_merge(cluster: SimulatedCluster, n: int) -> int:
    """Independent tasks and one that takes all their results."""
    target = cluster.results + n
    leaves = list(cluster.submit(n - 1))
    last = list(cluster.submit(1, leaves, n - 1))
    cluster.run_until(target)
    cluster.release(leaves + last)
    return n


def run_tree(cluster: SimulatedCluster, n: int) -> int:
    """A binary reduction with about `n` tasks."""
    leaves = 1 << max(1, (n + 1).bit_length() - 2)
    total = 2 * leaves - 1
    target = cluster.results + total
    level = list(cluster.submit(leaves))
    every = list(level)
    while len(level) > 1:
        level = list(cluster.submit(len(level) // 2, level, 2))
        every += level
    cluster.run_until(target)
    cluster.release(every)
    return total


WORKLOADS = {"map": run_map, "merge": run_merge, "tree": run_tree}


def rss_bytes() -> int:
    """Resident memory of this process that is its own (RssAnon): pages of program files come and go as the system likes."""
    with open("/proc/self/status") as stream:
        line = next(line for line in stream if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def measure_cost(workload: str, n: int, n_workers: int) -> dict[str, Any]:
    """CPU time of the scheduler per task."""
    calm_collector()  # as the scheduler's process does
    cluster = SimulatedCluster(n_workers)
    WORKLOADS[workload](cluster, 4 * BATCH)  # warm: code paths, the estimate of the duration
    cluster.cpu_s, cluster.messages = 0.0, 0
    total, rounds = 0, max(1, 50_000 // n)
    for _ in range(rounds):
        total += WORKLOADS[workload](cluster, n)
    left = len(cluster.machine.state.tasks)
    return {
        "workload": workload,
        "tasks": n,
        "workers": n_workers,
        "us_per_task": cluster.cpu_s / total * 1e6,
        "messages_per_task": cluster.messages / total,
        "tasks_left": left,
    }


def measure_memory(workload: str, n: int) -> dict[str, Any]:
    """Scheduler memory per waiting task: submitted, and no worker there."""
    calm_collector()
    cluster = SimulatedCluster(0)
    cluster.submit(BATCH)
    gc.collect()
    before = rss_bytes()
    if workload == "map":
        cluster.submit(n)
    else:
        level = list(cluster.submit(n // 2))
        while len(level) > 1:
            level = list(cluster.submit(len(level) // 2, level, 2))
    gc.collect()
    return {"workload": workload, "tasks": n, "bytes_per_waiting_task": (rss_bytes() - before) / n}


def measure_rounds(n: int = 100_000, rounds: int = 10) -> dict[str, Any]:
    """Memory after each of several rounds of tasks, all released."""
    calm_collector()
    cluster = SimulatedCluster(24)
    after = array("d", [0.0] * rounds)  # a float object made at a peak and kept would hold an arena itself
    for i in range(rounds):
        run_map(cluster, n)
        cluster.rest()
        give_memory_back(cluster.machine)  # as the node does after a moment of rest
        after[i] = rss_bytes() / 2**20
    return {"rounds": rounds, "tasks": n, "rss_mib": list(after), "growth": after[-1] / after[0] - 1}


MEASURES = {"cost": measure_cost, "memory": measure_memory, "rounds": measure_rounds}


def in_own_process(what: str, *args: Any) -> dict[str, Any]:
    """Runs one measurement in a fresh interpreter."""
    command = [sys.executable, "-m", "bench.tasks.zero_workers", what, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(
    tasks: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000), workers: tuple[int, ...] = (2, 24, 200, 2_000)
) -> list[dict[str, Any]]:
    """Cost by number of tasks (24 workers) and by number of workers (100,000 tasks), and memory."""
    rows = [in_own_process("cost", w, n, 24) for w in WORKLOADS for n in tasks]
    rows += [in_own_process("cost", w, 100_000, k) for w in WORKLOADS for k in workers if k != 24]
    rows += [in_own_process("memory", w, 200_000) for w in ("map", "tree")]
    rows.append(in_own_process("rounds"))
    return rows


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(MEASURES[what](*(int(a) if a.isdigit() else a for a in rest))))
