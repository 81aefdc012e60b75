"""Plugins and files in the scheduler's machine: who is told what, and which workers may be given tasks."""

from __future__ import annotations

from tests.nodes.scheduler.cluster import Cluster
from zmqtasks.protocol import ops
from zmqtasks.protocol.ops import CallFinished, PlaceFile, RegisterPlugin, RunFinished, SetUpPlugin, TearDownPlugin


def answer(cluster, worker, erred=False):
    """The worker answers for all that it was told to set up or tear down."""
    calls = [op.call for op in worker.inbox if isinstance(op, (SetUpPlugin, TearDownPlugin)) and op.call]
    worker.inbox.clear()
    cluster.from_worker(worker, *[CallFinished(call, b"r", erred) for call in calls])


def finished(cluster):
    found = [op for op in cluster.told if isinstance(op, RunFinished)]
    cluster.told.clear()
    return found


def test_present_workers_are_told_and_their_answers_passed_on():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    cluster.to_client(RegisterPlugin(7, "p", b"code"))
    assert [type(op) for op in a.inbox] == [SetUpPlugin]
    assert (a.inbox[0].name, a.inbox[0].content, a.inbox[0].required) == ("p", b"code", False)
    answer(cluster, a)
    assert finished(cluster) == [RunFinished(7, "tcp://a:1", b"r")]
    answer(cluster, b)
    assert finished(cluster) == [RunFinished(7, "tcp://b:1", b"r"), RunFinished(7, "")]
    cluster.to_client(RegisterPlugin(8, "p", b"code", idempotent=True))
    assert finished(cluster) == [RunFinished(8, "")]
    assert not a.inbox
    cluster.to_client(ops.UnregisterPlugin(9, "p"))
    assert [(type(op), op.name) for op in a.inbox] == [(TearDownPlugin, "p")]
    answer(cluster, a)
    answer(cluster, b)
    assert finished(cluster)[-1] == RunFinished(9, "")
    cluster.to_client(ops.UnregisterPlugin(10, "p"))
    assert finished(cluster) == [RunFinished(10, "", error="no plugin is called 'p': registered are none")]
    assert cluster.machine.deadline() is None


def test_a_worker_that_joins_gets_no_tasks_before_it_has_set_up_all_in_order():
    cluster = Cluster()
    for number, name in enumerate("pqr"):
        cluster.to_client(RegisterPlugin(number + 1, name, name.encode(), is_file=name == "q"))
    cluster.to_client(RegisterPlugin(4, "p", b"newer"))  # keeps its place
    key = cluster.submit()
    cluster.told.clear()
    worker = cluster.add_worker("a")
    assert [type(op) for op in worker.inbox] == [PlaceFile, SetUpPlugin, SetUpPlugin, SetUpPlugin]
    assert [(op.name, op.content) for op in worker.inbox] == [("q", b"q"), ("p", b"newer"), ("q", b""), ("r", b"r")]
    assert all(op.required for op in worker.inbox[1:])
    assert worker.state.preparing.keys() == {op.call for op in worker.inbox[1:]}
    first, *others = [op.call for op in worker.inbox[1:]]
    worker.inbox.clear()
    cluster.from_worker(worker, CallFinished(first, b"", False))
    cluster.submit(workers=["a"])
    assert not worker.inbox
    assert not any(isinstance(op, ops.ClusterChanged) and op.workers for op in cluster.told)
    cluster.machine.link_lost(worker.session, cluster.now)
    cluster.machine.link_resumed(worker.session, cluster.now)
    cluster.flush()
    assert not worker.inbox
    cluster.from_worker(worker, *[CallFinished(call, b"", False) for call in others])
    assert any(isinstance(op, ops.ComputeTasks) for op in worker.inbox)
    assert [op.workers for op in cluster.told if isinstance(op, ops.ClusterChanged)][-1] == 1
    cluster.run()
    assert key in cluster.results


def test_a_worker_that_fails_when_it_joins_gets_no_tasks():
    cluster = Cluster()
    cluster.to_client(RegisterPlugin(1, "p", b"code"))
    cluster.submit()
    worker = cluster.add_worker("a")
    answer(cluster, worker, erred=True)
    assert not worker.inbox
    assert [line for _, line in cluster.machine.take_news()] == [
        "worker a at tcp://a:1 ends: setup of plugin 'p' failed"
    ]
    cluster.machine.session_ended(worker.session, None, cluster.now)
    cluster.workers.remove(worker)
    other = cluster.add_worker("b")
    answer(cluster, other)
    assert any(isinstance(op, ops.ComputeTasks) for op in other.inbox)


def test_a_registration_that_fails_is_taken_back_everywhere():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    cluster.to_client(RegisterPlugin(1, "p", b"code"))
    joined = cluster.add_worker("c")
    answer(cluster, joined)
    answer(cluster, a)
    answer(cluster, b, erred=True)
    assert finished(cluster)[-2:] == [RunFinished(1, "tcp://b:1", b"r", True), RunFinished(1, "")]
    for worker in (a, b, joined):
        assert worker.inbox == [TearDownPlugin(0, "p")]
    assert cluster.machine.plugins.count == 0


def test_a_registration_that_fails_gives_its_name_back_to_the_former_one():
    cluster = Cluster()
    worker = cluster.add_worker("a")
    for number, content in ((1, b"old"), (2, b"new")):
        cluster.to_client(RegisterPlugin(number, "f", content, is_file=True))
        assert [type(op) for op in worker.inbox] == [PlaceFile, SetUpPlugin]
        answer(cluster, worker, erred=content == b"new")
    assert worker.inbox == [PlaceFile("f", b"old"), SetUpPlugin(0, "f")]
    later = cluster.add_worker("b")
    assert later.inbox[0] == PlaceFile("f", b"old")


def test_a_worker_that_dies_before_it_answers_is_no_failure():
    cluster = Cluster()
    a, b = cluster.add_worker("a"), cluster.add_worker("b")
    cluster.to_client(RegisterPlugin(1, "p", b"code"))
    answer(cluster, a)
    cluster.kill(b)
    cluster.pass_time(1.0)
    assert finished(cluster) == [RunFinished(1, "tcp://a:1", b"r"), RunFinished(1, "")]
    assert cluster.machine.plugins.count == 1
    assert cluster.machine.deadline() is None
