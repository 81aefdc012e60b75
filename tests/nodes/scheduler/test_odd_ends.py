"""What happens seldom: answers that cross cancellations, inputs that nobody has, clients that leave half-way, lying peers."""

from __future__ import annotations

import pytest

from tests.nodes.scheduler.cluster import Cluster, F
from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol import ops


def join(cluster, name=b"other"):
    """Another client; its outbox is read by nobody."""
    client = cluster.machine.client_joined(name, ops.ClientIntroduction(name.decode(), 1, "here"), cluster.now)
    cluster.flush()
    return client


def tell(cluster, client, *sent):
    cluster.machine.receive(client, sent, cluster.now)
    cluster.flush()


def runs_of(worker):
    return [run for op in worker.inbox if isinstance(op, ops.ComputeTasks) for run in op.run_ids]


def test_a_client_cannot_release_what_only_another_one_wants():
    cluster = Cluster()
    cluster.add_worker("a")
    key = cluster.submit(b"1", key="x")
    cluster.run()
    other = join(cluster)
    tell(cluster, other, ops.ReleaseKeys([key]))
    assert key in cluster.machine.state.tasks
    tell(cluster, other, ops.CancelTasks([key]))
    assert key in cluster.machine.state.tasks


def test_a_result_that_crosses_its_cancellation_is_dropped_by_the_worker():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    key = cluster.submit()
    (run,) = runs_of(worker)
    worker.inbox.clear()
    cluster.to_client(ops.CancelTasks([key]))
    cluster.from_worker(worker, ops.TasksFinished([run], [1], b"1", [10]))
    cluster.pass_time(0.1)
    assert ops.FreeKeys([key]) in worker.inbox
    assert not worker.state.abandoned


def test_a_late_result_does_not_take_away_the_one_of_the_next_attempt():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.submit(key="x")
    (first,) = runs_of(worker)
    worker.inbox.clear()
    cluster.to_client(ops.CancelTasks(["x"]))
    cluster.submit(key="x")
    cluster.from_worker(worker, ops.TasksFinished([first], [1], b"1", [10]))
    cluster.pass_time(0.1)
    assert not any(isinstance(op, ops.FreeKeys) for op in worker.inbox)
    cluster.run()
    assert "x" in worker.values


def test_data_finds_its_place_when_the_link_of_the_only_worker_is_back():
    cluster = Cluster(grace_s=10.0)
    worker = cluster.add_worker("a")
    cluster.machine.link_lost(worker.session, cluster.now)
    cluster.to_client(ops.DeclareData(["d"], [10]))
    assert not any(isinstance(op, ops.PlaceData) for op in cluster.told)
    cluster.machine.link_resumed(worker.session, cluster.now)
    cluster.flush()
    assert cluster.told[-1] == ops.PlaceData(["d"], ["tcp://a:1"])


def test_a_result_computed_anew_lets_go_of_the_futures_in_the_lost_one():
    cluster = Cluster()
    a = cluster.add_worker("a")
    inner = cluster.submit(b"7")
    cluster.run()
    outer = cluster.submit()
    for op in a.inbox:
        a.take(op)
    a.inbox.clear()
    (run,) = a.runs
    a.runs.clear()
    cluster.from_worker(a, ops.TasksFinished([run], [1], b"1", [10], [], [1], [inner]))
    cluster.to_client(ops.ReleaseKeys([inner]))
    assert cluster.machine.state.tasks[inner].holds == 1
    cluster.add_worker("b")
    cluster.kill(a)
    assert inner not in cluster.machine.state.tasks
    cluster.run()
    cluster.to_client(ops.ReleaseKeys([outer]))
    assert not cluster.machine.state.tasks


def two_tasks_that_lack_an_input():
    """Worker b has been given two tasks, and their input went with worker a."""
    cluster = Cluster()
    a = cluster.add_worker("a")
    a.large = True
    x = cluster.submit(b"5")
    cluster.run()
    cluster.machine.link_lost(a.session, cluster.now)
    b = cluster.add_worker("b")
    cluster.machine.state.functions[F].duration_s = 10.0
    y, z = cluster.submit(b"1", [x]), cluster.submit(b"2", [x])
    assert len(b.state.processing) in (1, 2)
    b.step(0)
    cluster.kill(a)
    b.step(0)
    cluster.from_worker(b, ops.FetchFailed([x], a.state.number, False))
    return cluster, b, (x, y, z)


def test_runs_without_their_inputs_make_room_for_the_inputs():
    cluster, b, (x, y, z) = two_tasks_that_lack_an_input()
    states = {key: cluster.machine.state.tasks[key].state.name for key in (x, y, z)}
    assert states == {x: "PROCESSING", y: "WAITING", z: "WAITING"}
    cluster.run()
    assert cluster.results[y] == b"6"
    assert cluster.results[z] == b"7"
    assert not b.state.processing


def test_a_run_whose_input_fails_when_it_is_computed_again_fails_too():
    cluster, b, (x, y, z) = two_tasks_that_lack_an_input()
    run = cluster.machine.state.tasks[x].run_id
    cluster.from_worker(b, ops.TaskErred(run, ops.ErrorInfo("exception", "ValueError: no")))
    assert {key for op in cluster.told if isinstance(op, ops.KeysErred) for key in op.keys} == {x, y, z}


def test_a_run_whose_scattered_input_is_gone_is_given_up():
    cluster = Cluster()
    a = cluster.add_worker("a")
    cluster.to_client(ops.DeclareData(["d"], [1000]))
    a.values["d"] = 5
    cluster.from_worker(a, ops.DataAdded(["d"], [1000]))
    cluster.machine.link_lost(a.session, cluster.now)
    b = cluster.add_worker("b")
    y = cluster.submit(b"1", ["d"])
    b.step(0)
    cluster.kill(a)
    cluster.from_worker(b, ops.FetchFailed(["d"], a.state.number, False))
    assert [op.kind for op in cluster.told if isinstance(op, ops.KeysCancelled)] == ["LostDataError"]
    failed = cluster.told[-1]
    assert isinstance(failed, ops.KeysErred)
    assert (failed.keys, failed.error.kind) == ([y], "LostDataError")
    cluster.to_client(ops.ReleaseKeys([y]))
    assert not cluster.machine.state.tasks


def test_a_replica_of_a_failed_task_is_dropped():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    key = cluster.submit()
    (run,) = runs_of(worker)
    cluster.from_worker(worker, ops.TaskErred(run, ops.ErrorInfo("exception", "no")))
    cluster.from_worker(worker, ops.DataAdded([key], [8]))
    cluster.pass_time(0.1)
    assert worker.inbox[-1] == ops.FreeKeys([key])


def test_data_of_a_client_that_left_before_it_had_put_it_is_lost():
    cluster = Cluster()
    cluster.add_worker("a")
    other = join(cluster)
    tell(cluster, other, ops.DeclareData(["d"], [10]))
    cluster.to_client(ops.WantKeys(["d"]))
    cluster.machine.session_ended(other.session, None, cluster.now)
    cluster.flush()
    lost = cluster.told[-1]
    assert isinstance(lost, ops.KeysCancelled)
    assert (lost.keys, lost.kind) == (["d"], "LostDataError")


def test_a_client_that_declares_known_data_is_asked_for_it_when_nobody_holds_it():
    cluster = Cluster()
    cluster.add_worker("a")
    other = join(cluster)
    tell(cluster, other, ops.DeclareData(["d"], [10]))
    cluster.to_client(ops.DeclareData(["d"], [10]))
    assert cluster.told[-1] == ops.PlaceData(["d"], ["tcp://a:1"])
    cluster.machine.session_ended(other.session, None, cluster.now)
    cluster.flush()
    assert "d" in cluster.machine.state.tasks


def test_data_that_cannot_be_put_anywhere_is_given_up_after_trying_all():
    cluster = Cluster()
    cluster.add_worker("a")
    cluster.add_worker("b")
    cluster.to_client(ops.DeclareData(["d"], [10]))
    tried = []
    while isinstance(placing := cluster.told[-1], ops.PlaceData):
        tried += placing.addresses
        cluster.to_client(ops.PlacementFailed(["d"], placing.addresses[0], "no route"))
    assert {"tcp://a:1", "tcp://b:1"} == set(tried[:2])
    assert "no route" in cluster.told[-1].reason
    assert not cluster.machine.state.tasks


def test_functions_of_a_client_that_left_are_forgotten_when_no_task_needs_them():
    cluster = Cluster()
    other = join(cluster)
    tell(cluster, other, ops.PutFunctions([F, b"g" * 16], [b"code", b"other"]))
    cluster.machine.session_ended(other.session, None, cluster.now)
    assert cluster.machine.state.functions.keys() == {F}


def test_lengths_that_do_not_fit_the_values_are_the_workers_fault():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.submit()
    (run,) = runs_of(worker)
    with pytest.raises(RemoteProtocolError, match="lengths"):
        cluster.machine.receive(worker.state, [ops.TasksFinished([run], [100], b"1", [10])], 0.0)
    cluster.machine.session_ended(worker.session, "it lied", 0.0)
    cluster.flush()


def test_a_task_with_inputs_that_was_taken_back_goes_to_an_idle_worker():
    cluster = Cluster()
    a = cluster.add_worker("a")
    a.large = True
    x = cluster.submit(b"1")
    cluster.run()
    y, z = cluster.submit(b"1", [x]), cluster.submit(b"2", [x])
    a.step(0)
    b = cluster.add_worker("b")
    asked = 0
    for _ in range(20):  # the first task takes long
        cluster.pass_time(0.01)
        for op in [op for op in a.inbox if isinstance(op, ops.RetractRuns)]:
            asked += 1
            a.inbox.remove(op)
            ahead = [run for run in op.run_ids if a.runs[run][0] == z]
            for run in ahead:
                del a.runs[run]
            cluster.from_worker(a, ops.RunsDropped(ahead))
    assert asked == 1
    b.step()
    assert z in b.values
    cluster.run()
    assert cluster.results.keys() == {x, y, z}


def test_resources_of_nothing_are_no_resources():
    cluster = Cluster()
    cluster.add_worker("a")
    key = cluster.submit(resources={"GPU": 0.0})
    cluster.run()
    assert cluster.results[key] == b"1"
    with pytest.raises(RemoteProtocolError, match="at least 0"):
        cluster.submit(resources={"GPU": -1.0})
