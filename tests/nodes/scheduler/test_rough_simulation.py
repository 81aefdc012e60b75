"""A random life with all that can cross: cancellations, failures, retries, resources, data, blocked tasks, retractions, deaths."""

from __future__ import annotations

import pytest

from tests.nodes.scheduler.rough_cluster import MAY_RAISE, RAISES, RoughCluster
from zmqtasks.protocol import ops


class Life:
    """A client that does this and that, and knows what should come of it."""

    def __init__(self, seed: int) -> None:
        self.cluster = RoughCluster(seed, grace_s=1.0, allowed_failures=10**6, heartbeat_s=0.05)
        self.random = self.cluster.random
        self.expected: dict[object, int | None] = {}
        self.inputs: dict[object, list[object]] = {}
        self.fragile: set[object] = set()
        """Keys that may be cancelled: by the client, or for data that nobody has any more."""
        self.wanted: list[object] = []
        self.born = 0
        self.add_worker(gpu=True)

    def add_worker(self, *, gpu: bool) -> None:
        self.born += 1
        resources = {"GPU": 2.0} if gpu else {}
        worker = self.cluster.add_worker(f"w{self.born}", nthreads=self.random.randint(1, 3), resources=resources)
        worker.large = self.random.random() < 0.5

    def submit(self) -> None:
        usable = [key for key in self.wanted if key not in self.cluster.cancelled]
        deps = self.random.sample(usable, min(len(usable), self.random.choice([0, 0, 1, 2, 5])))
        number = self.random.randint(0, 9)
        args = self.random.choice([b"%d" % number] * 8 + [MAY_RAISE + b"%d" % number, RAISES])
        options: dict[str, object] = {"priority": self.random.choice([0, 0, 0, 3, -3])}
        if args.startswith(MAY_RAISE):
            options["retries"] = 10**6
        match self.random.randint(0, 9):
            case 0:
                options["resources"] = {"GPU": self.random.choice([0.0, 1.0, 2.0])}
            case 1:
                options |= {"workers": [f"w{self.born}"], "allow_other_workers": True}
        key = self.cluster.submit(args, deps, **options)
        values = [self.expected[dep] for dep in deps]
        self.expected[key] = None if None in values or args == RAISES else number + sum(values)
        self.inputs[key] = deps
        if any(dep in self.fragile for dep in deps):
            self.fragile.add(key)
        self.wanted.append(key)

    def scatter(self) -> None:
        key = f"d{len(self.expected)}"
        retained = self.random.random() < 0.5
        self.expected[key] = self.random.randint(0, 9)
        if not retained:
            self.fragile.add(key)
        self.wanted.append(key)
        self.cluster.declare(key, self.expected[key], retained=retained)

    def cancel(self) -> None:
        doomed = self.random.choice(self.wanted)
        self.fragile.add(doomed)
        for key, deps in self.inputs.items():  # in the order of submission
            if any(dep in self.fragile for dep in deps):
                self.fragile.add(key)
        self.cluster.to_client(ops.CancelTasks([doomed]))
        self.cluster.cancelled.add(doomed)

    def retry(self) -> None:
        key = self.random.choice(sorted(self.cluster.errors & set(self.wanted), key=str))
        self.cluster.to_client(ops.RetryTasks([key]))

    def cut(self) -> None:
        worker = self.random.choice(self.cluster.workers)
        self.cluster.machine.link_lost(worker.session, self.cluster.now)
        self.cluster.flush()
        self.cluster.pass_time(self.random.uniform(0, 0.9))
        self.cluster.machine.link_resumed(worker.session, self.cluster.now)
        self.cluster.flush()

    def turn(self) -> None:
        kinds = ["submit", "work", "release", "die", "join", "cut", "time", "scatter", "cancel", "retry"]
        cluster = self.cluster
        match self.random.choices(kinds, [8, 12, 4, 1, 1, 1, 2, 2, 1, 1])[0]:
            case "submit":
                self.submit()
            case "work":
                for worker in list(cluster.workers):
                    worker.step(self.random.randint(0, 3))
            case "release" if self.wanted:
                cluster.to_client(ops.ReleaseKeys([self.wanted.pop(self.random.randrange(len(self.wanted)))]))
            case "die" if len(cluster.workers) > 1:
                worker = self.random.choice(cluster.workers)
                cluster.kill(worker, list(worker.runs)[:1])
            case "join" if len(cluster.workers) < 5:
                self.add_worker(gpu=self.random.random() < 0.5)
            case "cut":
                self.cut()
            case "time":
                cluster.pass_time(0.05)
            case "scatter":
                self.scatter()
            case "cancel" if self.wanted:
                self.cancel()
            case "retry" if cluster.errors & set(self.wanted):
                self.retry()

    def told(self, key: object) -> bool:
        cluster = self.cluster
        return key in cluster.cancelled or key in cluster.errors or key in cluster.results


@pytest.mark.parametrize("seed", range(100))
def test_rough_life(seed):
    life = Life(seed)
    cluster = life.cluster
    for _ in range(200):
        life.turn()
    life.add_worker(gpu=True)
    cluster.settle(lambda: all(map(life.told, life.wanted)))
    for key in life.wanted:
        if key in cluster.cancelled:
            assert key in life.fragile, f"{key} was cancelled for no reason"
        elif key in cluster.errors:
            assert life.expected[key] is None or key in life.fragile, f"{key} failed for no reason"
        elif cluster.results[key] is not None and key not in cluster.data:
            assert int(cluster.results[key]) == life.expected[key], f"{key} has a wrong result"
    cluster.to_client(ops.ReleaseKeys(life.wanted))
    assert not cluster.machine.state.tasks
    cluster.settle(lambda: not any(w.inbox or w.said or w.state.processing for w in cluster.workers))
    cluster.pass_time(1.0)
    cluster.settle(lambda: not any(w.inbox or w.said for w in cluster.workers))
    for worker in cluster.workers:
        state = worker.state
        assert not worker.values, f"{state.name} keeps {worker.values}"
        assert not any((state.held, state.parked, state.retracting, state.abandoned))
        assert state.available == state.resources
        assert (state.stored_keys, state.load_s) == (0, 0.0), f"{state.name}: {state.stored_keys} keys are stored"
    assert not cluster.machine.data._ask_again
