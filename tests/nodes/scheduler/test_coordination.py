"""Semaphores and events in the scheduler's machine: who is granted what, and when."""

from __future__ import annotations

import msgspec

from tests.nodes.scheduler.cluster import Cluster
from zmqtasks.protocol import ops


class Asker:
    """A client of the machine, and the answers that it got."""

    def __init__(self, cluster: Cluster, name: str, worker: bytes = b"") -> None:
        self.cluster = cluster
        intro = ops.ClientIntroduction(name, 1, "here", worker)
        self.state = cluster.machine.client_joined(name.encode(), intro, cluster.now)
        self.state.outbox.take()

    def send(self, op: ops.Op) -> list[tuple[int, object, str]]:
        """Sends an op; gives its answers that came by now."""
        self.cluster.machine.receive(self.state, [op], self.cluster.now)
        return self.answers()

    def answers(self) -> list[tuple[int, object, str]]:
        """Request, answer and error of what came since the last call."""
        found = [op for op in self.state.outbox.take() if isinstance(op, ops.QueryAnswered)]
        return [(op.request, msgspec.msgpack.decode(op.answer), op.error) for op in found]


def two() -> tuple[Cluster, Asker, Asker]:
    cluster = Cluster()
    return cluster, Asker(cluster, "a"), Asker(cluster, "b")


def assert_nothing_is_kept(cluster: Cluster) -> None:
    book = cluster.machine.coordination
    assert (book.semaphores, book.events, book.requests.held, book.requests.waiting) == ({}, {}, {}, {})
    assert cluster.machine.deadline() is None


def test_who_waits_is_served_in_order():
    cluster, a, b = two()
    assert a.send(ops.AcquireLease(1, "l")) == [(1, True, "")]
    assert b.send(ops.AcquireLease(1, "l")) == []
    assert a.send(ops.AcquireLease(2, "l")) == []
    assert b.send(ops.ReadLeases(2, "l")) == [(2, 1, "")]
    assert a.send(ops.GiveUp(3, 1)) == [(3, True, "")]
    assert b.answers() == [(1, True, "")]
    assert b.send(ops.GiveUp(3, 1)) == [(3, True, "")]
    assert a.answers() == [(2, True, "")]
    assert a.send(ops.GiveUp(4, 2)) == [(4, True, "")]
    assert a.send(ops.GiveUp(5, 2)) == [(5, False, "")]
    assert_nothing_is_kept(cluster)


def test_a_wait_ends_in_time_and_a_late_lease_goes_to_the_next():
    cluster, a, b = two()
    assert a.send(ops.AcquireLease(1, "l")) == [(1, True, "")]
    assert b.send(ops.AcquireLease(1, "l", timeout_s=0.0)) == [(1, False, "")]
    assert b.send(ops.AcquireLease(2, "l", timeout_s=2.0)) == []
    assert b.send(ops.AcquireLease(3, "l", timeout_s=9.0)) == []
    cluster.pass_time(1.9)
    assert b.answers() == []
    cluster.machine.tick(2.1)
    assert b.answers() == [(2, False, "")]
    assert a.send(ops.GiveUp(0, 1)) == []
    assert b.answers() == [(3, True, "")]
    cluster.machine.tick(99.0)
    assert b.answers() == []
    b.send(ops.GiveUp(0, 3))
    assert_nothing_is_kept(cluster)


def test_giving_up_ends_a_wait_or_returns_a_late_grant():
    cluster, a, b = two()
    a.send(ops.AcquireLease(1, "l"))
    b.send(ops.AcquireLease(1, "l"))
    assert b.send(ops.GiveUp(0, 1)) == [(1, False, "")]
    b.send(ops.AcquireLease(2, "l"))
    a.send(ops.GiveUp(0, 1))  # grants it, and only then the client gives up
    assert b.send(ops.GiveUp(0, 2)) == [(2, True, "")]
    assert_nothing_is_kept(cluster)


def test_what_a_client_held_is_free_when_it_goes():
    cluster, a, b = two()
    a.send(ops.AcquireLease(1, "l"))
    a.send(ops.AcquireLease(2, "l"))
    a.send(ops.WaitEvent(3, "e"))
    b.send(ops.AcquireLease(1, "l"))
    cluster.machine.session_ended(b"a", None, cluster.now)
    assert b.answers() == [(1, True, "")]
    b.send(ops.GiveUp(0, 1))
    assert_nothing_is_kept(cluster)


def test_a_client_of_a_workers_process_goes_with_it():
    cluster = Cluster()
    worker = cluster.add_worker("w")
    tasks, other = Asker(cluster, "tasks", worker.instance), Asker(cluster, "other")
    tasks.send(ops.AcquireLease(1, "l"))
    other.send(ops.AcquireLease(1, "l"))
    cluster.machine.membership.worker_exited(ops.WorkerExited(worker.instance, -9, "killed by SIGKILL", []))
    assert other.answers() == [(1, True, "")]


def test_semaphores_have_so_many_leases_until_they_are_closed():
    cluster, a, b = two()
    assert [a.send(ops.AcquireLease(n, "s", 2))[0][1] for n in (1, 2)] == [True, True]
    assert b.send(ops.AcquireLease(1, "s", 2)) == []
    [(_, _, error)] = b.send(ops.AcquireLease(2, "s", 3))
    assert error == "the semaphore 's' is in use with max_leases=2, not 3"
    assert a.send(ops.CloseSemaphore(3, "s")) == [(3, True, "")]
    assert b.answers() == [(1, None, "the semaphore 's' was closed")]
    assert a.send(ops.GiveUp(4, 1)) == [(4, True, "")]
    a.send(ops.GiveUp(0, 2))
    assert "was closed" in b.send(ops.AcquireLease(3, "s", 2))[0][2]
    assert "at least one" in b.send(ops.AcquireLease(4, "t", 0))[0][2]
    assert_nothing_is_kept(cluster)


def test_events():
    cluster, a, b = two()
    assert b.send(ops.WaitEvent(1, "e", 0.0)) == [(1, False, "")]
    assert b.send(ops.WaitEvent(2, "e")) == []
    assert b.send(ops.WaitEvent(3, "e", 1.0)) == []
    cluster.machine.tick(1.5)
    assert b.answers() == [(3, False, "")]
    assert a.send(ops.SetEvent(1, "e", True)) == [(1, True, "")]
    assert b.answers() == [(2, True, "")]
    assert b.send(ops.WaitEvent(4, "e")) == [(4, True, "")]
    assert a.send(ops.SetEvent(2, "e", False)) == [(2, True, "")]
    assert_nothing_is_kept(cluster)


def test_a_thousand_wait():
    cluster, a, b = two()
    a.send(ops.AcquireLease(1, "l"))
    for number in range(1, 1001):
        assert b.send(ops.AcquireLease(number, "l", timeout_s=3600.0)) == []
    a.send(ops.GiveUp(0, 1))
    assert b.answers() == [(1, True, "")]
    for number in range(1, 1000):
        assert b.send(ops.GiveUp(0, number)) == [(number + 1, True, "")]
    b.send(ops.GiveUp(0, 1000))
    assert_nothing_is_kept(cluster)
