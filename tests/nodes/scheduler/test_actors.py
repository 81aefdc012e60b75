"""Actors in the scheduler's machine: where calls go, in what order, and that nothing happens twice."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.nodes.scheduler.cluster import Cluster, F, SimulatedWorker
from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol import ops

MAKES, CALLS = 1, 2


def make(cluster: Cluster, **options) -> int:
    key = cluster.submit(actor=MAKES, **options)
    cluster.run(lambda: key in cluster.results)
    return key


def home_of(cluster: Cluster, actor: int) -> SimulatedWorker:
    return next(w for w in cluster.workers if actor in w.values)


def computed(worker: SimulatedWorker) -> list[int]:
    return [key for op in worker.inbox if isinstance(op, ops.ComputeTasks) for key in op.keys]


def errors(cluster: Cluster) -> dict[int, ops.ErrorInfo]:
    return {key: op.error for op in cluster.told if isinstance(op, ops.KeysErred) for key in op.keys}


def test_calls_go_to_the_actor_at_once_in_order_and_take_no_room_from_tasks():
    cluster = Cluster()
    workers = [cluster.add_worker(name) for name in "ab"]
    actor = make(cluster)
    home = home_of(cluster, actor)
    long = [cluster.submit(workers=[home.state.name]) for _ in range(3)]
    home.step(0)
    busy = home.state.busy
    calls = [cluster.submit(deps=[actor], actor=CALLS) for _ in range(5)]
    assert computed(home) == calls
    (compute, *_) = [op for op in home.inbox if isinstance(op, ops.ComputeTasks)]
    assert (compute.actor, compute.deps, compute.name) == (CALLS, [actor], "f")
    assert home.state.busy == busy
    other = next(w for w in workers if w is not home)
    assert not computed(other)
    assert not any(isinstance(op, ops.RetractRuns) for op in home.inbox)
    cluster.run()
    assert cluster.results.keys() >= {*calls, *long}


def test_a_call_waits_for_its_inputs_and_others_pass_it():
    cluster = Cluster()
    cluster.add_worker("a")
    actor = make(cluster)
    gone = cluster.submit(workers=["nowhere"])
    waiting = cluster.submit(deps=[gone, actor], actor=CALLS)
    quick = cluster.submit(deps=[actor], actor=CALLS)
    cluster.run(lambda: quick in cluster.results)
    assert waiting not in cluster.results
    cluster.add_worker("nowhere")
    cluster.run()
    assert waiting in cluster.results


def test_new_actors_go_to_the_worker_with_the_fewest():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    for _ in range(3):
        make(cluster, workers=["a"])
    actors = [cluster.submit(actor=MAKES) for _ in range(5)]
    cluster.run()
    assert (a.state.actors, b.state.actors) == (4, 4)
    cluster.to_client(ops.ReleaseKeys(actors))
    assert (a.state.actors, b.state.actors) == (3, 0)


def test_while_the_link_of_its_worker_is_lost_calls_are_kept_in_order():
    cluster = Cluster(grace_s=5.0)
    worker = cluster.add_worker("a")
    cluster.add_worker("b")
    actor = make(cluster, workers=["a"])
    cluster.machine.link_lost(worker.session, cluster.now)
    calls = [cluster.submit(deps=[actor], actor=CALLS) for _ in range(3)]
    cluster.machine.link_resumed(worker.session, cluster.now)
    cluster.flush()
    assert computed(worker) == calls
    cluster.run()
    assert cluster.results.keys() >= set(calls)


def test_with_its_worker_an_actor_is_lost_and_all_that_needs_it_fails():
    cluster = Cluster()
    home = cluster.add_worker("a")
    actor = make(cluster)
    done = cluster.submit(b"5", [actor], actor=CALLS)
    home.step()
    other = cluster.add_worker("b")
    running = cluster.submit(deps=[actor], actor=CALLS)
    blocked = cluster.submit(deps=[cluster.submit(workers=["nowhere"]), actor], actor=CALLS)
    user = cluster.submit(deps=[actor], workers=["nowhere"])
    cluster.kill(home)
    failed = errors(cluster)
    assert failed.keys() >= {actor, running, blocked, user}
    assert {failed[key].kind for key in (actor, running, blocked, user)} == {"ActorLostError"}
    assert "lost with its worker a at tcp://a:1: killed by SIGKILL" in failed[actor].text
    late = cluster.submit(deps=[actor], actor=CALLS)
    assert late in errors(cluster)
    assert not computed(other)
    # The result of the call is not computed again either, but those that have it keep it.
    assert errors(cluster)[done].kind == "ActorLostError"
    # A client may ask for a new one.
    cluster.told.clear()
    cluster.to_client(ops.RetryTasks([actor]))
    cluster.run(lambda: actor in cluster.results)
    assert home_of(cluster, actor) is other
    again = cluster.submit(b"7", [actor], actor=CALLS)
    cluster.run(lambda: again in cluster.results)


def test_a_replica_of_what_stands_for_an_actor_does_not_keep_it_alive():
    cluster = Cluster()
    home = cluster.add_worker("a")
    home.large = True
    actor = make(cluster)
    other = cluster.add_worker("b")
    cluster.from_worker(other, ops.DataAdded([actor], [1]))
    other.values[actor] = 1
    cluster.kill(home)
    assert errors(cluster)[actor].kind == "ActorLostError"
    cluster.pass_time(0.1)
    assert [op.keys for op in other.inbox if isinstance(op, ops.FreeKeys)] == [[actor]]


def test_what_is_no_actor_cannot_be_called():
    cluster = Cluster()
    cluster.add_worker("a")
    task = cluster.submit()
    call = cluster.submit(deps=[task], actor=CALLS)
    (told,) = [op for op in cluster.told if isinstance(op, ops.KeysCancelled)]
    assert (told.keys, told.kind) == ([call], "ActorLostError")
    assert "is no actor" in told.reason
    op = ops.SubmitTasks(F, "f", keys=["x"], options=ops.TaskOptions(actor=CALLS))
    with pytest.raises(RemoteProtocolError):
        cluster.to_client(op)


@pytest.mark.parametrize("seed", range(40))
def test_random_life_of_actors(seed):
    """Every call ends, runs once at most, and runs once exactly when its actor was not lost."""
    cluster = Cluster(seed, grace_s=1.0, allowed_failures=10**6)
    rng = cluster.random
    executed: Counter[int] = Counter()
    born = 0
    actors: list[int] = []
    calls: list[int] = []
    calls_of: dict[int, int] = {}

    def add_worker():
        nonlocal born
        born += 1
        worker = cluster.add_worker(f"w{born}", nthreads=rng.randint(1, 2))
        worker.large = rng.random() < 0.5
        told = cluster.from_worker

        def counted(of, *sent):
            for op in sent:
                if isinstance(op, ops.TasksFinished):
                    executed.update(ts.key for run in op.run_ids if (ts := of.state.processing.get(run)) is not None)
            told(of, *sent)

        worker.cluster = type("Counting", (), {"from_worker": staticmethod(counted), "workers": cluster.workers})()

    add_worker()
    for _ in range(150):
        match rng.choices(["make", "call", "task", "work", "release", "die", "join", "cut"], [2, 8, 2, 8, 3, 1, 1, 1])[
            0
        ]:
            case "make":
                actors.append(cluster.submit(actor=MAKES))
            case "call" if actors:
                actor = rng.choice(actors)
                inputs = rng.sample(calls, min(len(calls), rng.choice([0, 0, 1, 2])))
                key = cluster.submit(b"1", [*inputs, actor], actor=CALLS)
                calls.append(key)
                calls_of[key] = actor
            case "task" if actors:
                calls.append(cluster.submit(b"1", [rng.choice(actors), *rng.sample(calls, min(len(calls), 1))]))
            case "work":
                for worker in cluster.workers:
                    worker.step(rng.randint(0, 3))
            case "release":
                wanted = rng.choice([actors, calls])
                if wanted:
                    cluster.to_client(ops.ReleaseKeys([wanted.pop(rng.randrange(len(wanted)))]))
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

    def over(key):
        return key in cluster.results or key in errors(cluster)

    for _ in range(500):
        if all(map(over, calls)):
            break
        for worker in cluster.workers:
            worker.step(4)
            deps = {dep for _, _, deps in worker.runs.values() for dep in deps}
            if missing := [dep for dep in deps if worker._value(dep) is None]:
                cluster.from_worker(worker, ops.FetchFailed(missing, 0, False))
        cluster.pass_time(0.01)
    assert all(map(over, calls)), f"seed {seed}: {[key for key in calls if not over(key)]} do not end"
    for key, actor in calls_of.items():
        assert executed[key] <= 1, f"seed {seed}: call {key} ran {executed[key]} times"
        if key in calls and actor not in errors(cluster) and key not in errors(cluster):
            assert executed[key] == 1, f"seed {seed}: call {key}"
    cluster.to_client(ops.ReleaseKeys([*actors, *calls]))
    cluster.run()
    cluster.pass_time(0.1)
    assert not cluster.machine.state.tasks
    assert [w.state.actors for w in cluster.workers] == [0] * len(cluster.workers)
