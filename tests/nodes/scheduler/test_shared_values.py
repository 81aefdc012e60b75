"""Variables, datasets and queues in the scheduler's machine: who gets what, and which keys are kept for it."""

from __future__ import annotations

import pytest

from tests.nodes.scheduler.cluster import Cluster
from tests.nodes.scheduler.test_coordination import Asker
from zmqtasks.errors import RemoteProtocolError
from zmqtasks.nodes.scheduler.state import ERRED, MEMORY
from zmqtasks.protocol import ops

KINDS = ("variable", "dataset")


def three() -> tuple[Cluster, Asker, Asker]:
    """A cluster with one worker, and two clients beside that of the cluster."""
    cluster = Cluster()
    cluster.add_worker("w")
    return cluster, Asker(cluster, "a"), Asker(cluster, "b")


def result(cluster: Cluster, key: str) -> str:
    """A finished task, wanted by the cluster's client."""
    cluster.submit(key=key)
    cluster.workers[0].step(10)
    assert cluster.machine.state.tasks[key].state is MEMORY
    return key


def lives(cluster: Cluster, key: str) -> bool:
    cluster.flush()
    return key in cluster.machine.state.tasks


def assert_nothing_is_kept(cluster: Cluster) -> None:
    book = cluster.machine.coordination
    assert (book.requests.held, book.requests.waiting) == ({}, {})
    assert (book.kept.counts, book.kept._fates.noted) == ({}, {})
    assert (book.queues.queues, book.values.books) == ({}, {kind: {} for kind in KINDS})
    assert not book.requests._timeouts or cluster.machine.deadline() is None


def test_a_variable_is_waited_for_and_keeps_its_keys_until_it_changes():
    cluster, a, b = three()
    key = result(cluster, "x")
    assert b.send(ops.GetValue(1, "variable", "v", 0.0)) == [(1, None, "")]
    assert b.send(ops.GetValue(2, "variable", "v")) == []
    assert b.send(ops.GetValue(3, "variable", "v", 1.0)) == []
    cluster.machine.tick(1.5)
    assert b.answers() == [(3, None, "")]
    assert a.send(ops.SetValue(1, "variable", "v", b"one", [key])) == [(1, True, "")]
    assert b.answers() == [(2, [b"one", True], "")]
    cluster.to_client(ops.ReleaseKeys([key]))
    assert lives(cluster, key)
    assert a.send(ops.SetValue(2, "variable", "v", b"two")) == [(2, True, "")]
    assert lives(cluster, key)  # b has not taken it over yet
    b.send(ops.WantKeys([key]))
    b.send(ops.Received(2))
    assert lives(cluster, key)
    assert b.send(ops.GetValue(4, "variable", "v")) == [(4, [b"two", False], "")]
    b.send(ops.ReleaseKeys([key]))
    assert not lives(cluster, key)
    assert a.send(ops.DeleteValue(3, "variable", "v")) == [(3, True, "")]
    assert a.send(ops.DeleteValue(4, "variable", "v")) == [(4, False, "")]
    assert_nothing_is_kept(cluster)


def test_the_same_key_in_the_old_and_the_new_value():
    cluster, a, _ = three()
    key = result(cluster, "x")
    a.send(ops.SetValue(1, "variable", "v", b"1", [key]))
    cluster.to_client(ops.ReleaseKeys([key]))
    a.send(ops.SetValue(2, "variable", "v", b"2", [key]))
    assert lives(cluster, key)
    a.send(ops.DeleteValue(3, "variable", "v"))
    assert not lives(cluster, key)
    assert_nothing_is_kept(cluster)


def test_a_taker_that_dies_or_gives_up_holds_nothing():
    cluster, a, b = three()
    key = result(cluster, "x")
    a.send(ops.SetValue(1, "variable", "v", b"1", [key]))
    a.send(ops.GetValue(2, "variable", "v"))
    b.send(ops.GetValue(1, "variable", "v"))
    a.send(ops.DeleteValue(3, "variable", "v"))
    cluster.to_client(ops.ReleaseKeys([key]))
    a.send(ops.GiveUp(0, 2))
    assert lives(cluster, key)
    cluster.machine.session_ended(b"b", None, cluster.now)
    assert not lives(cluster, key)
    assert_nothing_is_kept(cluster)


def test_datasets_are_listed_and_not_overwritten():
    cluster, a, b = three()
    assert a.send(ops.SetValue(1, "dataset", "d", b"1", new=True)) == [(1, True, "")]
    assert b.send(ops.SetValue(1, "dataset", "d", b"2", new=True)) == [(1, False, "")]
    assert b.send(ops.ListValues(2, "dataset")) == [(2, ["d"], "")]
    assert b.send(ops.ListValues(3, "variable")) == [(3, [], "")]
    assert b.send(ops.GetValue(4, "dataset", "d", 0.0)) == [(4, [b"1", False], "")]
    cluster.machine.session_ended(b"a", None, cluster.now)
    assert b.send(ops.SetValue(5, "dataset", "d", b"2")) == [(5, True, "")]
    assert b.send(ops.DeleteValue(6, "dataset", "d")) == [(6, True, "")]
    assert_nothing_is_kept(cluster)
    with pytest.raises(RemoteProtocolError, match="no such kind"):
        b.send(ops.ListValues(7, "table"))


def test_who_asks_for_a_key_that_is_no_more_hears_why():
    cluster, a, b = three()
    cluster.submit(key="x")
    a.send(ops.SetValue(1, "variable", "v", b"1", ["x", "never"]))
    cluster.to_client(ops.CancelTasks(["x"]))
    assert lives(cluster, "x")  # only for that client
    cluster.to_client(ops.CancelTasks(["x"], True, "enough"))
    assert not lives(cluster, "x")
    cluster.machine.receive(b.state, [ops.WantKeys(["x", "never", "y", "z"])], cluster.now)
    told = [op for op in b.state.outbox.take() if isinstance(op, ops.KeysCancelled)]
    assert [(op.keys, op.reason, op.kind) for op in told] == [
        (["x"], "enough", "CancelledError"),
        (["never"], "unknown to the scheduler: released or cancelled", "LostDataError"),
        (["y", "z"], "unknown to the scheduler: released or cancelled", "LostDataError"),
    ]
    cluster.submit(key="x")  # a new task of that name
    a.send(ops.SetValue(2, "variable", "v", b"2", ["x"]))
    cluster.to_client(ops.ReleaseKeys(["x"]))
    assert lives(cluster, "x")
    a.send(ops.DeleteValue(3, "variable", "v"))
    assert not lives(cluster, "x")
    assert_nothing_is_kept(cluster)


def test_kept_tasks_fail_get_lost_and_are_restarted_as_others():
    cluster, a, b = three()
    key = result(cluster, "x")
    failed = cluster.submit(key="failed")
    a.send(ops.SetValue(1, "dataset", "d", b"1", [key, failed]))
    worker = cluster.workers[0]
    worker.step(0)
    [run] = worker.runs
    cluster.from_worker(worker, ops.TaskErred(run, ops.ErrorInfo("exception", "ValueError: no")))
    cluster.to_client(ops.ReleaseKeys([key, failed]))
    assert cluster.machine.state.tasks[failed].state is ERRED
    cluster.machine.session_ended(worker.session, "killed", cluster.now)
    cluster.workers.remove(worker)
    cluster.add_worker("w2").step(10)
    assert cluster.machine.state.tasks[key].state is MEMORY
    cluster.to_client(ops.Restart(1, 0.0))
    assert not lives(cluster, key)
    assert b.send(ops.ListValues(2, "dataset")) == [(2, ["d"], "")]
    cluster.machine.receive(b.state, [ops.WantKeys([key])], cluster.now)
    assert [op.reason for op in b.state.outbox.take() if isinstance(op, ops.KeysCancelled)] == [
        "the cluster was restarted"
    ]
    a.send(ops.DeleteValue(3, "dataset", "d"))
    assert_nothing_is_kept(cluster)


# --- queues ---------------------------------------------------------------------------------------------------------


def test_values_come_out_in_order_and_are_handed_over_without_a_gap():
    cluster, a, b = three()
    key = result(cluster, "x")
    assert b.send(ops.GetItems(1, "q")) == []
    assert b.send(ops.GetItems(2, "q", timeout_s=0.0)) == [(2, [0, None], "")]
    assert a.send(ops.PutItem(1, "q", b"1", [key])) == [(1, [0, True], "")]
    assert b.answers() == [(1, [0, [b"1"]], "")]
    cluster.to_client(ops.ReleaseKeys([key]))
    assert lives(cluster, key)
    b.send(ops.WantKeys([key]))
    assert b.send(ops.Received(1)) == []
    assert lives(cluster, key)
    b.send(ops.ReleaseKeys([key]))
    assert not lives(cluster, key)
    for number in range(5):
        a.send(ops.PutItem(number, "q", b"%d" % number))
    assert a.send(ops.ReadQueue(9, "q")) == [(9, [0, 5], "")]
    assert b.send(ops.GetItems(3, "q", 2)) == [(3, [0, [b"0", b"1"]], "")]
    assert b.send(ops.GetItems(4, "q", 0)) == [(4, [0, [b"2", b"3", b"4"]], "")]
    assert b.send(ops.GetItems(5, "q", 0)) == [(5, [0, []], "")]
    for number in (3, 4):
        b.send(ops.Received(number))
    assert_nothing_is_kept(cluster)


def test_a_full_queue_takes_values_as_room_comes():
    cluster, a, b = three()
    key = result(cluster, "x")
    assert a.send(ops.PutItem(1, "q", b"1", maxsize=1)) == [(1, [0, True], "")]
    assert a.send(ops.PutItem(2, "q", b"no", [key], timeout_s=0.0)) == [(2, [0, False], "")]
    assert a.send(ops.PutItem(3, "q", b"late", [key], timeout_s=1.0)) == []
    assert a.send(ops.PutItem(4, "q", b"2", [key])) == []
    cluster.machine.tick(1.5)
    assert a.answers() == [(3, [0, False], "")]
    assert b.send(ops.GetItems(1, "q")) == [(1, [0, [b"1"]], "")]
    assert a.answers() == [(4, [0, True], "")]
    assert a.send(ops.PutItem(5, "q", b"3", maxsize=2)) == [(5, None, "the queue 'q' is in use with maxsize=1, not 2")]
    assert a.send(ops.PutItem(6, "q", b"3")) == []
    assert b.send(ops.GetItems(2, "q", 2)) == [(2, [0, [b"2", b"3"]], "")]  # more than it ever holds
    assert a.answers() == [(6, [0, True], "")]
    for number in (1, 2):
        b.send(ops.Received(number))
    assert cluster.machine.coordination.queues._bounds == {"q": 1}
    assert a.send(ops.PutItem(7, "q", b"4")) == [(7, [0, True], "")]
    assert a.send(ops.PutItem(8, "q", b"5")) == []
    assert a.send(ops.CloseQueue(9, "q")) == [(8, None, "the queue 'q' was closed"), (9, True, "")]
    assert_nothing_is_kept(cluster)


def test_what_a_taker_gives_up_goes_back_to_where_it_was():
    cluster, a, b = three()
    for number in range(4):
        a.send(ops.PutItem(number, "q", b"%d" % number))
    b.send(ops.GetItems(1, "q"))
    b.send(ops.GetItems(2, "q", 2))
    assert a.send(ops.GetItems(11, "q", 2)) == []  # has one, and waits for another
    b.send(ops.GiveUp(0, 1))
    assert a.answers() == [(11, [0, [b"0", b"3"]], "")]
    a.send(ops.GiveUp(0, 11))
    cluster.machine.session_ended(b"b", None, cluster.now)
    assert a.send(ops.GetItems(12, "q", 0)) == [(12, [0, [b"0", b"1", b"2", b"3"]], "")]
    a.send(ops.Received(12))
    assert a.send(ops.GetItems(13, "q", 2, timeout_s=1.0)) == []
    a.send(ops.PutItem(14, "q", b"4"))
    cluster.machine.tick(1.5)
    assert a.answers() == [(13, [0, None], "")]
    assert a.send(ops.ReadQueue(15, "q")) == [(15, [0, 1], "")]
    a.send(ops.CloseQueue(16, "q"))
    assert_nothing_is_kept(cluster)


def test_closing_ends_all_waits_and_those_who_have_used_it_hear_of_it_later():
    cluster, a, b = three()
    key = result(cluster, "x")
    assert b.send(ops.GetItems(1, "q", 3)) == []
    a.send(ops.PutItem(1, "q", b"1", [key]))
    assert a.send(ops.GetItems(2, "q")) == []
    cluster.to_client(ops.ReleaseKeys([key]))
    assert b.send(ops.CloseQueue(2, "q")) == [(1, None, "the queue 'q' was closed"), (2, True, "")]
    assert a.answers() == [(2, None, "the queue 'q' was closed")]
    assert not lives(cluster, key)
    for op in (ops.PutItem(3, "q", b"", closings=0), ops.GetItems(3, "q", closings=0), ops.ReadQueue(3, "q", 0)):
        assert a.send(op) == [(3, None, "the queue 'q' was closed")]
    assert a.send(ops.PutItem(4, "q", b"new")) == [(4, [1, True], "")]
    assert a.send(ops.GetItems(5, "q", closings=1)) == [(5, [1, [b"new"]], "")]
    b.send(ops.CloseQueue(3, "q"))
    a.send(ops.GiveUp(0, 5))
    assert_nothing_is_kept(cluster)


def test_four_put_and_take_in_any_order():
    """Nothing is lost or doubled, whatever takers do with what they get."""
    for seed in range(50):
        cluster = Cluster(seed)
        random = cluster.random
        askers = [Asker(cluster, name) for name in "abcd"]
        answers: list[dict[int, list]] = [{}, {}, {}, {}]
        asked: list[tuple[int, int]] = []
        taken: list[bytes] = []
        put = 0
        for number in range(1, 2000):
            who = random.randrange(4)
            if put < 30 and random.random() < 0.4:
                op: ops.Op = ops.PutItem(number, "q", b"%d" % put, maxsize=3)
                put += 1
            elif len(asked) < 6 and random.random() < 0.5:
                op = ops.GetItems(number, "q", random.choice([0, 1, 1, 2]), timeout_s=1.0)
                asked.append((who, number))
            elif asked:
                who, first = asked.pop(random.randrange(len(asked)))
                got = answers[who].get(first)
                if got is not None and random.random() < 0.6:
                    taken += got[1] or []
                    op = ops.Received(first)
                else:
                    op = ops.GiveUp(0, first)
            else:
                continue
            cluster.machine.receive(askers[who].state, [op], cluster.now)
            cluster.pass_time(random.choice([0.0, 0.3]))
            for asker, seen in zip(askers, answers, strict=True):
                seen.update((request, value) for request, value, _ in asker.answers())
            if len(taken) == 30:
                break
        assert sorted(map(int, taken)) == list(range(30)), f"seed {seed}"
        for who, first in asked:
            askers[who].send(ops.GiveUp(0, first))
        assert_nothing_is_kept(cluster)
