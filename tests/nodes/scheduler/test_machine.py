"""The scheduler's machine: what it emits for what it is told, and the state it is left in."""

from __future__ import annotations

import pytest

from tests.nodes.scheduler.cluster import Cluster, F
from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol import ops


def names(sent):
    return [type(op).__name__ for op in sent]


def test_a_task_is_sent_with_its_function_and_its_result_goes_to_the_client():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    key = cluster.submit(b"41")
    assert names(worker.inbox) == ["PutFunctions", "ComputeTasks"]
    worker.step()
    assert cluster.results == {key: b"41"}
    cluster.to_client(ops.ReleaseKeys([key]))
    assert not worker.inbox
    cluster.pass_time(0.1)
    assert worker.inbox == [ops.FreeKeys([key])]
    assert not cluster.machine.state.tasks


def test_the_function_goes_to_a_worker_only_once():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.submit()
    worker.step()
    cluster.submit()
    assert names(worker.inbox) == ["ComputeTasks"]


def test_a_small_result_rides_with_the_task_that_needs_it():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    x, y = cluster.submit(b"1"), cluster.submit(b"2")
    a.step()
    b.step()
    z = cluster.submit(b"", [x, y])
    cluster.run()
    assert cluster.results[z] == b"3"
    assert not any(isinstance(op, ops.UpdateLocations) for w in (a, b) for op in w.inbox)


def test_a_task_goes_where_its_large_input_is():
    cluster = Cluster()
    for name in "abc":
        cluster.add_worker(name).large = True
    x = cluster.submit()
    cluster.run()
    holder = next(w for w in cluster.workers if x in w.values)
    y = cluster.submit(b"", [x])
    assert [type(op).__name__ for op in holder.inbox] == ["ComputeTasks"]
    cluster.run()
    assert y in holder.values


def test_an_error_spreads_to_what_waits_for_it_and_names_the_first_task():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    x = cluster.submit()
    y = cluster.submit(b"", [x])
    z = cluster.submit(b"", [y])
    (compute,) = [op for op in worker.inbox if isinstance(op, ops.ComputeTasks)]
    cluster.from_worker(worker, ops.TaskErred(compute.run_ids[0], ops.ErrorInfo("exception", "ValueError: no")))
    erred = {key: op.error for op in cluster.told if isinstance(op, ops.KeysErred) for key in op.keys}
    assert erred.keys() == {x, y, z}
    assert {error.key for error in erred.values()} == {x}


def test_retries_are_made_and_counted():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    key = cluster.submit(retries=2)
    for _ in range(3):
        compute = next(op for op in worker.inbox if isinstance(op, ops.ComputeTasks))
        worker.inbox.clear()
        assert not any(isinstance(op, ops.KeysErred) for op in cluster.told)
        cluster.from_worker(worker, ops.TaskErred(compute.run_ids[0], ops.ErrorInfo("exception", "no")))
    assert [op.keys for op in cluster.told if isinstance(op, ops.KeysErred)] == [[key]]


def test_cancelled_tasks_vanish_with_what_waits_for_them():
    cluster = Cluster()
    x = cluster.submit()
    y = cluster.submit(b"", [x])
    cluster.to_client(ops.CancelTasks([x]))
    assert {k for op in cluster.told if isinstance(op, ops.KeysCancelled) for k in op.keys} == {x, y}
    assert not cluster.machine.state.tasks


def test_a_running_task_is_asked_to_stop():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    x = cluster.submit()
    worker.inbox.clear()
    cluster.to_client(ops.CancelTasks([x]))
    assert names(worker.inbox) == ["CancelRuns"]
    assert not cluster.machine.state.tasks


def test_tasks_of_one_op_run_in_the_order_that_it_gives():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.submit()
    cluster.to_client(ops.SubmitTasks(F, "f", 100, 3, args=b"123", args_lengths=[1, 1, 1], order=[5, 0, 2]))
    order = {key: ts.priority for key, ts in cluster.machine.state.tasks.items()}
    first = next(key for key in order if key not in (100, 101, 102))
    assert sorted(order, key=order.__getitem__) == [first, 101, 102, 100]
    worker.step()
    cluster.run()
    assert cluster.results.keys() >= {100, 101, 102}


def test_an_order_that_fits_no_tasks_is_refused():
    cluster = Cluster()
    for order in ([1], [0, 1 << 41]):
        op = ops.SubmitTasks(F, "f", 100, 2, args=b"12", args_lengths=[1, 1], order=order)
        with pytest.raises(RemoteProtocolError, match="do not fit"):
            cluster.machine.receive(cluster.client, [op], 0.0)


def test_a_key_that_exists_is_taken_as_it_is_when_the_client_says_so():
    cluster = Cluster()
    cluster.add_worker("a")
    cluster.submit(b"1", key="x")
    cluster.to_client(ops.SubmitTasks(F, "f", keys=["x"], args=b"2", args_lengths=[1], reuse=True))
    cluster.run()
    assert not any(isinstance(op, ops.KeysCancelled) for op in cluster.told)
    assert cluster.results["x"] == b"1"


def test_the_same_key_with_another_spec_is_refused_and_the_first_one_lives_on():
    cluster = Cluster()
    cluster.submit(b"1", key="x")
    cluster.submit(b"2", key="x")
    (refusal,) = [op for op in cluster.told if isinstance(op, ops.KeysCancelled)]
    assert refusal.kind == "KeyConflictError"
    cluster.add_worker("a")
    cluster.run()
    assert cluster.results["x"] == b"1"


def test_a_task_on_an_unknown_input_is_refused_by_name():
    cluster = Cluster()
    cluster.submit(b"", deps=["nowhere"])
    (refusal,) = [op for op in cluster.told if isinstance(op, ops.KeysCancelled)]
    assert "'nowhere'" in refusal.reason


def test_lost_results_are_computed_again_along_the_whole_chain():
    cluster = Cluster()
    a = cluster.add_worker("a")
    a.large = True
    x = cluster.submit(b"1")
    y = cluster.submit(b"10", [x])
    cluster.to_client(ops.ReleaseKeys([x]))
    cluster.run()
    cluster.kill(a)
    assert [op.keys for op in cluster.told if isinstance(op, ops.KeysRecomputing)] == [[y]]
    b = cluster.add_worker("b")
    cluster.run()
    assert cluster.results[y] == b"11"
    assert x not in b.values or cluster.machine.state.tasks[x].holds == 0


def test_only_tasks_that_were_executing_are_blamed():
    cluster = Cluster(allowed_failures=1)
    cluster.add_worker("w0")
    killer, innocent = cluster.submit(), cluster.submit()
    for i in range(2):
        worker = cluster.workers[0]
        for op in worker.inbox:
            worker.take(op)
        worker.inbox.clear()
        executing = [run for run, (key, _, _) in worker.runs.items() if key == killer]
        assert len(executing) == 1
        cluster.add_worker(f"w{i + 1}")
        cluster.kill(worker, executing)
    (op,) = [op for op in cluster.told if isinstance(op, ops.KeysErred)]
    assert op.keys == [killer]
    assert op.error.kind == "KilledWorker"
    assert "SIGKILL" in op.error.text
    cluster.run()
    assert cluster.results[innocent] == b"1"


def test_a_task_that_must_not_run_twice_fails_with_its_worker():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    key = cluster.submit(idempotent=False)
    worker.step(0)
    cluster.kill(worker, list(worker.runs))
    (op,) = [op for op in cluster.told if isinstance(op, ops.KeysErred)]
    assert op.keys == [key]
    assert "idempotent=False" in op.error.text


def test_a_lost_link_takes_nothing_away_until_the_grace_time_is_over():
    cluster = Cluster(grace_s=5.0)
    worker = cluster.add_worker("a")
    key = cluster.submit()
    cluster.machine.link_lost(worker.session, cluster.now)
    other = cluster.add_worker("b")
    cluster.pass_time(4.9)
    assert not other.inbox
    cluster.pass_time(0.2)
    cluster.run(lambda: key in cluster.results)
    assert key in other.values
    assert cluster.machine.take_departed() == [worker.session]


def test_a_link_that_comes_back_in_time_changes_nothing():
    cluster = Cluster(grace_s=5.0)
    worker = cluster.add_worker("a")
    key = cluster.submit()
    cluster.machine.link_lost(worker.session, cluster.now)
    other = cluster.add_worker("b")
    cluster.pass_time(4.0)
    cluster.machine.link_resumed(worker.session, cluster.now)
    cluster.pass_time(20.0)
    worker.step()
    assert cluster.results[key] == b"1"
    assert not other.runs


def test_what_is_ahead_on_a_busy_worker_is_taken_back_for_an_idle_one():
    cluster = Cluster()
    a = cluster.add_worker("a")
    cluster.submit()
    second = cluster.submit()
    a.step(0)
    assert len(a.runs) == 2
    b = cluster.add_worker("b")
    cluster.pass_time(0.02)
    a.step(0)
    cluster.flush()
    b.step()
    assert second in b.values


def test_short_tasks_go_ahead_in_order_as_many_as_there_is_room_for():
    cluster = Cluster(prefetch_s=0.001)
    worker = cluster.add_worker("a")
    first = cluster.submit()
    worker.step()  # it takes 10 us, so 100 of them are 1 ms
    some, other, more = list(range(100, 160)), 200, list(range(300, 400))
    cluster.to_client(
        ops.SubmitTasks(F, "f", some[0], len(some)),
        ops.SubmitTasks(F, "g", keys=[other], dep_counts=[1], deps=[first]),
        ops.SubmitTasks(F, "f", more[0], len(more), args=b"1" * len(more), args_lengths=[1] * len(more)),
    )
    worker.step(0)
    assert [key for key, _, _ in worker.runs.values()] == [*some, other, *more][:101]
    assert [run[1:] for run in worker.runs.values()][58:63] == [
        (b"", []),
        (b"", []),
        (b"", [first]),
        (b"1", []),
        (b"1", []),
    ]
    cluster.run()
    assert cluster.results.keys() == {first, *some, other, *more}


def test_tasks_with_small_inputs_go_out_together_with_the_values_that_the_worker_lacks():
    cluster = Cluster(prefetch_s=0.001)
    a = cluster.add_worker("a")
    mine = cluster.submit(b"1")
    a.step()
    b = cluster.add_worker("b")
    theirs = cluster.submit(b"2")
    (a if a.inbox else b).step()
    first = cluster.next_key
    pairs = [[mine, theirs], [theirs, mine], [mine, mine], [theirs], []] * 10
    cluster.to_client(
        ops.SubmitTasks(
            F, "f", first, len(pairs), dep_counts=[len(p) for p in pairs], deps=[k for p in pairs for k in p]
        )
    )
    sent = [op for w in (a, b) for op in w.inbox if isinstance(op, ops.ComputeTasks)]
    assert len(sent) <= 2  # the tasks of one function are one op for each worker
    for worker in (a, b):
        worker.step(0)
        lacking = {key for _, _, deps in worker.runs.values() for key in deps} - worker.values.keys()
        assert lacking == worker.rides.keys()
    runs = {key: deps for w in (a, b) for key, _, deps in w.runs.values()}
    assert runs == dict(zip(range(first, first + len(pairs)), pairs, strict=True))
    cluster.run()
    assert [cluster.results[key] for key in range(first, first + len(pairs))] == [b"3", b"3", b"2", b"2", b"0"] * 10


def test_results_in_one_op_go_to_those_who_want_each_of_them():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.submit()
    worker.step()  # how long it takes is known: more than one goes out
    other = cluster.machine.client_joined(b"other", ops.ClientIntroduction("d", 1, "here"), 0.0)
    keys = [cluster.submit() for _ in range(4)]
    cluster.machine.receive(other, [ops.WantKeys(keys[1:3])], 0.0)
    cluster.to_client(ops.ReleaseKeys([keys[2]]))
    cluster.pass_time(0.1)
    worker.step(0)
    by_key = {key: run for run, (key, _, _) in worker.runs.items()}
    runs = [by_key[key] for key in keys]
    cluster.machine.receive(
        worker.state, [ops.TasksFinished(runs, [2, -1, 3, 0], b"aaccc", [10] * 4, [2, 900, 3, 0])], 0.0
    )
    told = {session: sent for session, sent in cluster.machine.flush() if session != b"a"}
    assert told == {
        b"client": [ops.KeysInMemory([keys[0], keys[1], keys[3]], [2, 900, 0], [2, -1, 0], b"aa")],
        b"other": [ops.KeysInMemory([keys[1], keys[2]], [900, 3], [-1, 3], b"ccc")],
    }


def test_results_that_do_not_fit_their_columns_reach_nobody():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    cluster.submit()
    cluster.run()
    keys = [cluster.submit(), cluster.submit()]
    runs = {}
    for worker in (a, b):
        worker.step(0)
        runs.update({key: (worker, run) for run, (key, _, _) in worker.runs.items()})
    (one, run), (other, its_run) = (runs[key] for key in keys)
    with pytest.raises(RemoteProtocolError, match="lengths that do not sum to the 4 bytes of values"):
        cluster.machine.receive(one.state, [ops.TasksFinished([run], [2], b"aaXX", [10])], 0.0)
    cluster.from_worker(other, ops.TasksFinished([its_run], [3], b"bbb", [10]))
    assert cluster.results[keys[1]] == b"bbb"
    assert keys[0] not in cluster.results
    cluster.from_worker(one, ops.TasksFinished([run, run], [2, 2], b"aabb", [10, 10]))
    told = [op for op in cluster.told if isinstance(op, ops.KeysInMemory) and keys[0] in op.keys]
    assert told == [ops.KeysInMemory([keys[0]], [2], [2], b"aa")]


def test_a_task_that_is_queued_twice_is_assigned_once():
    cluster = Cluster()
    first = cluster.submit()
    cluster.add_worker("a").step()  # how long it takes is known
    cluster.kill(cluster.workers[0])
    keys = [cluster.submit() for _ in range(3)]
    cluster.machine.placement.queue.push(
        cluster.machine.state.tasks[keys[-1]]
    )  # as when it was released and is wanted again
    worker = cluster.add_worker("b")
    worker.step(0)
    assert [key for key, _, _ in worker.runs.values()] == [first, *keys]
    cluster.run()
    assert not worker.state.processing


def test_a_question_that_comes_with_a_task_finds_it_at_work():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    cluster.to_client(ops.SubmitTasks(F, "f", keys=["x"]), ops.Query(1, "processing"))
    answer = next(op for op in cluster.told if isinstance(op, ops.QueryAnswered))
    assert b"x" in answer.answer
    worker.step(0)
    assert [key for key, _, _ in worker.runs.values()] == ["x"]


def test_restrictions_and_resources_are_kept():
    cluster = Cluster()
    a = cluster.add_worker("a", resources={"GPU": 1})
    b = cluster.add_worker("b")
    on_b = cluster.submit(workers=["b"])
    first, second = cluster.submit(resources={"GPU": 1}), cluster.submit(resources={"GPU": 1})
    a.step(0)
    b.step(0)
    assert [key for key, _, _ in b.runs.values()] == [on_b]
    assert [key for key, _, _ in a.runs.values()] == [first]
    cluster.run()
    assert second in a.values


def test_higher_priorities_run_first():
    cluster = Cluster()
    low, high = cluster.submit(priority=-1), cluster.submit(priority=5)
    normal = cluster.submit()
    worker = cluster.add_worker("a")
    worker.step(0)
    order = []
    while len(order) < 3:
        order += [key for key, _, _ in list(worker.runs.values())[:1]]
        worker.step()
        worker.step(0)
    assert order == [high, normal, low]


def test_data_is_placed_and_lost_data_that_the_client_kept_is_asked_for_again():
    cluster = Cluster()
    a = cluster.add_worker("a")
    cluster.to_client(ops.DeclareData(["d"], [1000], retained=True))
    assert cluster.told[-1] == ops.PlaceData(["d"], ["tcp://a:1"])
    a.values["d"] = 5
    cluster.from_worker(a, ops.DataAdded(["d"], [1000]))
    x = cluster.submit(b"1", ["d"])
    cluster.to_client(ops.ReleaseKeys(["d"]))
    cluster.add_worker("b")
    cluster.kill(a)
    assert cluster.told[-1] == ops.PlaceData(["d"], ["tcp://b:1"])
    cluster.workers[0].values["d"] = 5
    cluster.from_worker(cluster.workers[0], ops.DataAdded(["d"], [1000]))
    cluster.run()
    assert cluster.results[x] == b"6"
    assert any(op == ops.DropData(["d"]) for op in cluster.told) is False
    cluster.to_client(ops.ReleaseKeys([x]))
    assert cluster.told[-1] == ops.DropData(["d"])


def test_scattered_data_that_is_lost_is_said_to_be_lost():
    cluster = Cluster()
    a = cluster.add_worker("a")
    cluster.to_client(ops.DeclareData(["d"], [1000]))
    cluster.from_worker(a, ops.DataAdded(["d"], [1000]))
    cluster.kill(a)
    lost = cluster.told[-1]
    assert isinstance(lost, ops.KeysCancelled)
    assert lost.kind == "LostDataError"
    assert not cluster.machine.state.tasks


def test_a_client_that_leaves_takes_its_wishes_along():
    cluster = Cluster()
    cluster.submit()
    cluster.machine.session_ended(cluster.client.session, None, cluster.now)
    assert not cluster.machine.state.tasks


def test_fire_and_forget_runs_to_its_end():
    cluster = Cluster()
    key = cluster.submit()
    cluster.to_client(ops.KeepTasks([key]), ops.ReleaseKeys([key]))
    assert key in cluster.machine.state.tasks
    worker = cluster.add_worker("a")
    cluster.run()
    assert not cluster.machine.state.tasks
    cluster.pass_time(0.1)
    cluster.run()
    assert not worker.values


def test_nonsense_is_the_peers_fault():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    with pytest.raises(RemoteProtocolError, match="columns"):
        cluster.machine.receive(cluster.client, [ops.SubmitTasks(F, "f", keys=[1], args=b"x")], 0.0)
    with pytest.raises(RemoteProtocolError, match="not for a client"):
        cluster.machine.receive(cluster.client, [ops.TasksFinished([], [], b"", [])], 0.0)
    with pytest.raises(RemoteProtocolError, match="columns"):
        cluster.machine.receive(worker.state, [ops.TasksFinished([1], [], b"", [])], 0.0)
    with pytest.raises(RemoteProtocolError, match="tasks in one op"):
        cluster.machine.receive(cluster.client, [ops.SubmitTasks(F, "f", first_key=1, count=1 << 40)], 0.0)
    with pytest.raises(RemoteProtocolError, match="was not sent"):
        cluster.machine.receive(cluster.client, [ops.SubmitTasks(b"?" * 16, "f", keys=[1])], 0.0)
