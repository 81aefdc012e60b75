"""Random graphs, deaths, cancellations and lost links: the books balance after every op, and the results are right."""

from __future__ import annotations

import pytest

from tests.nodes.scheduler.cluster import Cluster
from zmqtasks.protocol import ops


@pytest.mark.parametrize("seed", range(60))
def test_random_life(seed):
    cluster = Cluster(seed, grace_s=1.0, allowed_failures=10**6)
    rng = cluster.random
    born = 0
    expected: dict[int, int] = {}
    wanted: list[int] = []

    def add_worker():
        nonlocal born
        born += 1
        cluster.add_worker(f"w{born}", nthreads=rng.randint(1, 3)).large = rng.random() < 0.5

    add_worker()
    for _ in range(200):
        match rng.choices(["submit", "work", "release", "die", "join", "cut", "time"], [8, 10, 4, 1, 1, 1, 2])[0]:
            case "submit":
                deps = rng.sample(wanted, min(len(wanted), rng.choice([0, 0, 1, 2, 5])))
                number = rng.randint(0, 9)
                key = cluster.submit(b"%d" % number, deps, priority=rng.choice([0, 0, 0, 3, -3]))
                expected[key] = number + sum(expected[d] for d in deps)
                wanted.append(key)
            case "work":
                for worker in cluster.workers:
                    worker.step(rng.randint(0, 3))
            case "release" if wanted:
                key = wanted.pop(rng.randrange(len(wanted)))
                cluster.to_client(ops.ReleaseKeys([key]))
            case "die" if len(cluster.workers) > 1:
                worker = rng.choice(cluster.workers)
                cluster.kill(worker, list(worker.runs)[:1])
            case "join" if len(cluster.workers) < 5:
                add_worker()
            case "cut":
                worker = rng.choice(cluster.workers)
                cluster.machine.link_lost(worker.session, cluster.now)
                cluster.flush()
                cluster.pass_time(rng.uniform(0, 0.9))
                cluster.machine.link_resumed(worker.session, cluster.now)
                cluster.flush()
            case "time":
                cluster.pass_time(0.05)
    cluster.run(lambda: all(key in cluster.results for key in wanted))
    for key in wanted:
        value = cluster.results[key]
        found = int(value) if value is not None else next(w.values[key] for w in cluster.workers if key in w.values)
        assert found == expected[key], f"seed {seed}, task {key}"
    cluster.to_client(ops.ReleaseKeys(wanted))
    cluster.run()
    cluster.pass_time(0.1)  # values that are not needed are dropped a little later
    assert not cluster.machine.state.tasks
    for worker in cluster.workers:
        worker.step(0)
        assert not worker.values, f"seed {seed}: {worker.session!r} keeps {worker.values}"
