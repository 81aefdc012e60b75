"""The client's machine: every call and op, by the whole list of ops that it gives."""

from __future__ import annotations

import pytest

from zmqtasks.errors import KeyConflictError
from zmqtasks.ids import first_key_of_client
from zmqtasks.nodes.client.machine import RELEASED_NAMES_LIMIT, ClientMachine
from zmqtasks.nodes.client.state import (
    CANCELLED,
    ERROR,
    FINISHED,
    LOST,
    PENDING,
    TRANSITIONS,
    Fault,
    FutureState,
    Status,
)
from zmqtasks.protocol.ops import (
    CancelTasks,
    ClusterChanged,
    DeclareData,
    DropData,
    ErrorInfo,
    KeepTasks,
    KeysCancelled,
    KeysErred,
    KeysInMemory,
    KeysRecomputing,
    Locations,
    Op,
    PlaceData,
    PlacementFailed,
    PutFunctions,
    QueryAnswered,
    ReleaseKeys,
    RequestLocations,
    RetryTasks,
    SubmitTasks,
    WantKeys,
)
from zmqtasks.protocol.payload import PICKLE_HEADER, Payload

F, G = b"f" * 16, b"g" * 16
ERROR_INFO = ErrorInfo("exception", "ValueError: no")
PAYLOAD = Payload(PICKLE_HEADER, (b"\x80.",))


class Recorder:
    """A waiter that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | str, Status]] = []

    def settled(self, state: FutureState) -> None:
        self.seen.append((state.key, state.status))


def make(number: int = 1) -> ClientMachine:
    machine = ClientMachine()
    machine.admitted(number)
    return machine


def submit(machine: ClientMachine, key: int | str, function: bytes = F, spec: bytes = b"") -> FutureState:
    state = FutureState(key, None, "f", spec=spec)
    named = isinstance(key, str)
    op = SubmitTasks(function, "f", 0 if named else key, 1, [key] if named else [])
    machine.submit(op, b"code", (state,))
    return state


def submitted(machine: ClientMachine, key: int | str) -> FutureState:
    state = submit(machine, key)
    machine.take()
    return state


def drop(machine: ClientMachine, *states: FutureState) -> list[Op]:
    machine.dropped.extend(states)
    machine.collect_dropped()
    return machine.take()


def in_memory(key: int | str, value: bytes | None = b"v") -> KeysInMemory:
    return KeysInMemory([key], [1], [-1 if value is None else len(value)], value or b"")


def locate(request: int) -> RequestLocations:
    return RequestLocations(request, [])


def answered(request: int) -> Locations:
    return Locations(request, [], [])


def test_keys_begin_with_the_number_of_the_client() -> None:
    machine = make(3)
    first = machine.take_keys(10)
    assert first == first_key_of_client(3) + 1
    assert machine.take_keys(1) == first + 10


def test_a_function_is_sent_once_and_before_its_first_task() -> None:
    machine = make()
    submit(machine, 1)
    submit(machine, 7)
    submit(machine, 9, G)
    assert machine.take() == [
        PutFunctions([F], [b"code"]),
        SubmitTasks(F, "f", 1, 1),
        SubmitTasks(F, "f", 7, 1),
        PutFunctions([G], [b"code"]),
        SubmitTasks(G, "f", 9, 1),
    ]
    assert machine.take() == []


def test_neighbouring_submissions_become_one_op() -> None:
    machine = make()
    states = [FutureState(key, None, "f") for key in (5, 6, 7, 8)]
    machine.submit(SubmitTasks(F, "f", 5, 1, args=b"ab", args_lengths=[2]), b"code", states[:1])
    machine.submit(SubmitTasks(F, "f", 6, 1, dep_counts=[2], deps=[5, 5]), b"code", states[1:2])
    machine.submit(SubmitTasks(F, "f", 7, 2, args=b"xyz", args_lengths=[1, 2]), b"code", states[2:])
    machine.submit(SubmitTasks(F, "other", 9, 1), b"code", [FutureState(9, None, "other")])
    assert machine.take() == [
        PutFunctions([F], [b"code"]),
        SubmitTasks(F, "f", 5, 4, [], b"abxyz", [2, 0, 1, 2], [0, 2, 0, 0], [5, 5]),
        SubmitTasks(F, "other", 9, 1),
    ]


def test_results_with_and_without_values() -> None:
    machine = make()
    one, two, three = (submitted(machine, key) for key in (1, 2, 3))
    rest = machine.receive([KeysInMemory([1, 2, 3, 99], [3, 1_000_000, 0, 5], [3, -1, 0, 2], b"abcxy")])
    assert rest == []
    assert [(s.status, s.value, s.size) for s in (one, two, three)] == [
        (FINISHED, b"abc", 3),
        (FINISHED, None, 1_000_000),
        (FINISHED, b"", 0),
    ]
    assert machine.take() == []


def test_a_dropped_future_releases_its_key_once() -> None:
    machine = make()
    state = submitted(machine, 1)
    assert machine.share(1) is state
    assert drop(machine, state) == []
    assert drop(machine, state) == [ReleaseKeys([1])]
    assert machine.states == {}
    assert machine.receive([in_memory(1)]) == []
    assert state.status is PENDING


def test_dropped_keys_are_released_in_one_op() -> None:
    machine = make()
    assert drop(machine, submitted(machine, 1), submitted(machine, 2)) == [ReleaseKeys([1, 2])]


def test_release_follows_the_submission_that_needs_the_key() -> None:
    machine = make()
    first = submit(machine, 1)
    machine.submit(SubmitTasks(G, "g", 2, 1, dep_counts=[1], deps=[1]), b"g", [FutureState(2, None, "g")])
    ops = drop(machine, first)
    assert [type(op) for op in ops] == [PutFunctions, SubmitTasks, PutFunctions, SubmitTasks, ReleaseKeys]


@pytest.mark.parametrize(
    ("op", "status", "value"),
    [
        (in_memory(1), FINISHED, b"v"),
        (KeysErred([1], ERROR_INFO), ERROR, ERROR_INFO),
        (KeysCancelled([1], "why"), CANCELLED, Fault("CancelledError", "why")),
        (KeysCancelled([1], "gone", "LostDataError"), LOST, Fault("LostDataError", "gone")),
    ],
)
def test_waiters_hear_each_fate(op: Op, status: Status, value: object) -> None:
    machine = make()
    state = submitted(machine, 1)
    recorder = Recorder()
    state.waiters = [recorder, recorder]
    machine.receive([op])
    assert (state.status, state.value) == (status, value)
    assert recorder.seen == [(1, status)] * 2
    assert state.waiters is None


OPS = {
    FINISHED: in_memory(1),
    ERROR: KeysErred([1], ERROR_INFO),
    CANCELLED: KeysCancelled([1], "why"),
    LOST: KeysCancelled([1], "gone", "LostDataError"),
    PENDING: KeysRecomputing([1]),
}


@pytest.mark.parametrize("start", list(Status))
@pytest.mark.parametrize("finish", list(Status))
def test_every_pair_of_the_table_and_no_other(start: Status, finish: Status) -> None:
    machine = make()
    state = submitted(machine, 1)
    if start is not PENDING:
        machine.receive([OPS[start]])
    assert state.status is start
    machine.receive([OPS[finish]])
    legal = (start, finish) in TRANSITIONS
    assert state.status is (finish if legal else start)


def test_recomputing_forgets_the_value() -> None:
    machine = make()
    state = submitted(machine, 1)
    machine.receive([in_memory(1), KeysRecomputing([1])])
    assert (state.status, state.value) == (PENDING, None)
    machine.receive([in_memory(1, b"w")])
    assert (state.status, state.value) == (FINISHED, b"w")


def test_cancel_settles_at_once_and_lets_go() -> None:
    machine = make()
    one, two = submitted(machine, 1), submitted(machine, 2)
    recorder = Recorder()
    one.waiters = [recorder]
    machine.cancel([one, two], force=True, reason="enough")
    assert machine.take() == [CancelTasks([1, 2], True, "enough"), ReleaseKeys([1, 2])]
    assert recorder.seen == [(1, CANCELLED)]
    machine.receive([in_memory(1), KeysCancelled([1, 2], "enough")])
    assert one.value == Fault("CancelledError", "enough")
    assert drop(machine, one, two) == []
    machine.cancel([one])
    assert machine.take() == []


def test_a_cancelled_key_can_be_submitted_again() -> None:
    machine = make()
    old = submitted(machine, "x")
    machine.cancel([old])
    machine.take()
    assert machine.share("x") is None
    new = submit(machine, "x")
    assert machine.take() == [locate(1), SubmitTasks(F, "f", 0, 1, ["x"])]
    assert drop(machine, old) == []
    machine.receive([KeysCancelled(["x"], "the old one"), answered(1), in_memory("x")])
    assert (old.status, new.status) == (CANCELLED, FINISHED)
    assert drop(machine, new) == [ReleaseKeys(["x"])]


def test_a_released_name_is_fenced_when_it_comes_again() -> None:
    machine = make()
    drop(machine, submitted(machine, "x"))
    new = submit(machine, "x", G)
    ops = machine.take()
    assert [type(op) for op in ops] == [PutFunctions, RequestLocations, SubmitTasks]
    machine.receive([in_memory("x", b"old"), KeysErred(["x"], ERROR_INFO)])
    assert new.status is PENDING
    machine.receive([answered(1), in_memory("x", b"new")])
    assert new.value == b"new"


def test_released_names_are_forgotten_in_time() -> None:
    machine = make()
    names = [f"x{i}" for i in range(RELEASED_NAMES_LIMIT + 1)]
    ops = drop(machine, *[submitted(machine, name) for name in names])
    assert ops == [ReleaseKeys(names), locate(1)]
    assert drop(machine, submitted(machine, "later")) == [ReleaseKeys(["later"])]
    machine.receive([answered(1)])
    submit(machine, names[0])
    submit(machine, "later")
    assert [type(op) for op in machine.take()] == [SubmitTasks, RequestLocations, SubmitTasks]


def test_the_same_name_means_the_same_task() -> None:
    machine = make()
    state = submit(machine, "x", spec=b"one")
    assert machine.share("x", b"one") is state
    assert state.refs == 2
    with pytest.raises(KeyConflictError, match="'x' is in use"):
        machine.share("x", b"two")
    assert state.refs == 2


def test_retry_is_for_failed_tasks() -> None:
    machine = make()
    failed, fine = submitted(machine, 1), submitted(machine, 2)
    machine.receive([KeysErred([1], ERROR_INFO), in_memory(2)])
    machine.retry([failed, fine])
    assert machine.take() == [RetryTasks([1])]
    assert (failed.status, failed.value, fine.status) == (PENDING, None, FINISHED)
    machine.retry([failed])
    assert machine.take() == []


def test_wanted_keys_of_others() -> None:
    machine = make()
    state = FutureState(77, None, "theirs")
    machine.want(state)
    machine.keep([77])
    assert machine.take() == [WantKeys([77]), KeepTasks([77])]
    assert drop(machine, state) == [ReleaseKeys([77])]


def test_implicit_data_is_kept_until_it_is_dropped() -> None:
    machine = make()
    machine.declare(DeclareData([5], [2], retained=True), [PAYLOAD])
    machine.submit(SubmitTasks(F, "f", 6, 1, dep_counts=[1], deps=[5]), b"code", [FutureState(6, None)])
    machine.release([5])
    assert [type(op) for op in machine.take()] == [DeclareData, PutFunctions, SubmitTasks, ReleaseKeys]
    place = PlaceData([5], ["tcp://a"])
    assert machine.receive([place]) == [place]
    assert machine.receive([place]) == [place]
    machine.receive([DropData([5])])
    assert machine.payloads == {}
    assert machine.receive([place]) == []
    assert machine.take() == [PlacementFailed([5], "tcp://a", "the client has released the data")]


def test_named_data_that_is_declared_again_survives_the_drop_of_the_old() -> None:
    machine = make()
    op = DeclareData(["d"], [2], retained=True)
    machine.declare(op, [PAYLOAD])
    machine.release(["d"])
    machine.declare(op, [PAYLOAD])
    assert machine.take() == [op, ReleaseKeys(["d"]), locate(1), op]
    machine.receive([DropData(["d"])])
    assert "d" in machine.payloads
    machine.receive([answered(1), DropData(["d"])])
    assert machine.payloads == {}


def test_scattered_data_is_let_go_once_it_is_in_memory() -> None:
    machine = make()
    state = FutureState("d", None, "int")
    machine.declare(DeclareData(["d"], [2]), [PAYLOAD], [state])
    place = PlaceData(["d", "unknown"], ["tcp://a"])
    assert machine.receive([place]) == [PlaceData(["d"], ["tcp://a"])]
    assert [type(op) for op in machine.take()] == [DeclareData, PlacementFailed]
    machine.receive([in_memory("d", None)])
    assert (machine.payloads, state.status) == ({}, FINISHED)


def test_answers_and_news_are_for_the_shell() -> None:
    machine = make()
    news: list[Op] = [ClusterChanged(1, 2, 3), QueryAnswered(1, b""), answered(4)]
    assert machine.receive(news) == news


@pytest.mark.parametrize(("kind", "status"), [("CancelledError", CANCELLED), ("SchedulerLostError", LOST)])
def test_the_end_settles_what_is_pending(kind: str, status: Status) -> None:
    machine = make()
    pending, finished = submitted(machine, 1), submitted(machine, 2)
    machine.receive([in_memory(2)])
    machine.end(kind, "over")
    machine.end("other", "again")
    assert (pending.status, pending.value) == (status, Fault(kind, "over"))
    assert (finished.status, finished.value) == (FINISHED, b"v")
    assert drop(machine, pending, finished) == []
    late, wanted, data = submit(machine, 3), FutureState(4, None), FutureState(5, None)
    machine.want(wanted)
    machine.declare(DeclareData([5], [2]), [PAYLOAD], [data])
    assert {state.status for state in (late, wanted, data)} == {status}
    assert machine.take() == []


@pytest.mark.parametrize(
    "op",
    [
        KeysInMemory([1, 2], [1], [1], b"a"),
        KeysInMemory([1], [1], [], b"a"),
    ],
)
def test_columns_that_do_not_fit_are_an_error(op: Op) -> None:
    with pytest.raises(ValueError, match="zip"):
        make().receive([op])
