"""The worker's machine as a table of cases: each compares everything that it emits."""

from __future__ import annotations

from typing import Any

import pytest

from zmqtasks.errors import InvalidTransitionError
from zmqtasks.ids import Key
from zmqtasks.nodes.worker.instructions import (
    Call,
    DropInline,
    DropKeys,
    FetchKeys,
    Finished,
    Instruction,
    Interrupt,
    KeepInline,
    LearnFunctions,
    StartRuns,
    Stop,
    TakeBack,
)
from zmqtasks.nodes.worker.machine import WorkerMachine
from zmqtasks.nodes.worker.state import InputState, Run, RunState
from zmqtasks.nodes.worker.transitions import INPUT_TRANSITIONS, RUN_TRANSITIONS
from zmqtasks.protocol.ops import (
    CallFunction,
    CancelRuns,
    ComputeTasks,
    DataAdded,
    ErrorInfo,
    FetchFailed,
    FreeKeys,
    Inputs,
    Op,
    Peers,
    PutFunctions,
    RetractRuns,
    RunsDropped,
    RunsExecuting,
    StopWorker,
    TaskBlocked,
    TaskErred,
    TaskResumed,
    TaskSeceded,
    TasksFinished,
    UpdateLocations,
)

ERROR = ErrorInfo("exception", "ValueError: no")


class Case:
    """A machine with two peers (1 at `one`, 2 at `two`), and shorthands for what goes in and comes out."""

    def __init__(self, fetch_bytes: int = 1000, debug: bool = False) -> None:
        self.machine = WorkerMachine(fetch_bytes, debug)
        self.machine.receive([Peers([1, 2], ["one", "two"])], 0.0)
        assert self.out() == ([], [])

    def out(self) -> tuple[list[Op], list[Instruction]]:
        return self.machine.outbox.take()

    def receive(self, *ops: Any) -> tuple[list[Op], list[Instruction]]:
        self.machine.receive(ops, 1.0)
        return self.out()

    def run(self, run_id: int) -> Run:
        return self.machine.runs[run_id]

    def finish(self, *run_ids: int, **fields: Any) -> tuple[list[Op], list[Instruction]]:
        data = fields.pop("data", b"ok")
        self.machine.runs_finished([Finished(self.run(i), None, data, fields.get("size", 2), 7) for i in run_ids])
        return self.out()

    def assert_empty(self) -> None:
        """Nothing is remembered but replicas."""
        assert self.machine.runs == {}
        assert self.machine.inputs.records == {}
        assert self.machine.inputs.fetching == 0


def compute(run_ids: list[int], deps: list[list[Key]] | None = None, **fields: Any) -> ComputeTasks:
    flat: list[Key] = [key for keys in deps or [] for key in keys]
    counts = [len(keys) for keys in deps or []]
    keys: list[Key] = [f"k{i}" for i in run_ids]
    return ComputeTasks(b"d", "f", keys, run_ids, [0] * len(run_ids), dep_counts=counts, deps=flat, **fields)


def finished(*run_ids: int, **fields: Any) -> TasksFinished:
    count = len(run_ids)
    return TasksFinished(list(run_ids), [2] * count, b"ok" * count, [7] * count, **fields)


def test_tasks_without_inputs_start_at_once_and_are_reported_together() -> None:
    case = Case()
    ops, instructions = case.receive(PutFunctions([b"d"], [b"code"]), compute([1, 2]))
    one, two = case.run(1), case.run(2)
    assert (ops, instructions) == ([], [LearnFunctions([b"d"], [b"code"]), StartRuns([one, two])])
    assert case.finish(1, 2) == ([finished(1, 2)], [])
    assert (one.state, two.state) == (RunState.FINISHED, RunState.FINISHED)
    assert case.machine.inputs.held == {"k1": 2, "k2": 2}
    case.assert_empty()


def test_columns_of_results() -> None:
    case = Case()
    case.receive(compute([1, 2, 3]))
    small, large, live = (case.run(i) for i in (1, 2, 3))
    case.machine.runs_finished(
        [
            Finished(small, None, b"ab", 2, 5),
            Finished(large, None, None, 5000, 6),
            Finished(live, None, b"xyz", 3, 7, ["f", 9]),
        ]
    )
    expected = TasksFinished([1, 2, 3], [2, -1, 3], b"abxyz", [5, 6, 7], [2, 5000, 3], [0, 0, 2], ["f", 9])
    assert case.out() == ([expected], [])


def test_arguments_and_resources_are_handed_on() -> None:
    case = Case()
    op = ComputeTasks(b"d", "f", ["a", "b"], [1, 2], [4, 3], b"xxxyy", [3, 2], resources={"GPU": 1.0})
    case.receive(op)
    assert [(r.args, r.priority, r.group.resources) for r in (case.run(1), case.run(2))] == [
        (b"xxx", 4, {"GPU": 1.0}),
        (b"yy", 3, {"GPU": 1.0}),
    ]


def test_inputs_held_here_do_not_delay() -> None:
    case = Case()
    case.receive(compute([1]))
    case.finish(1)
    assert case.receive(compute([2], [["k1", "k1"]])) == ([], [StartRuns([case.run(2)])])
    case.finish(2)
    assert case.receive(FreeKeys(["k1", "unknown"])) == ([], [DropKeys(["k1"])])
    assert case.receive(FreeKeys(["k1"])) == ([], [])


def test_inputs_are_fetched_in_one_request_per_holder_and_reported_as_replicas() -> None:
    case = Case()
    inputs = Inputs(["a", "b", "c"], [10, 10, 10], [[1], [1, 2], [2]])
    ops, instructions = case.receive(inputs, compute([1, 2], [["a", "b"], ["c", "b"]]))
    assert (ops, instructions) == ([], [FetchKeys(1, "one", ["a", "b"]), FetchKeys(2, "two", ["c"])])
    assert case.machine.fetch_finished(1, {"a": 11, "b": 12}, [], {}) == ["a", "b"]
    assert case.out() == ([DataAdded(["a", "b"], [11, 12])], [StartRuns([case.run(1)])])
    assert case.machine.fetch_finished(2, {"c": 13}, [], {}) == ["c"]
    assert case.out() == ([DataAdded(["c"], [13])], [StartRuns([case.run(2)])])
    case.finish(1, 2)
    assert set(case.machine.inputs.held) == {"a", "b", "c", "k1", "k2"}
    case.assert_empty()


def test_bytes_in_flight_from_a_holder_are_bounded_but_one_fetch_always_goes() -> None:
    case = Case(fetch_bytes=100)
    inputs = Inputs(["a", "b", "c"], [500, 60, 60], [[1], [1], [2]])
    tasks = compute([1, 2, 3], [["a"], ["b"], ["c"]])
    assert case.receive(inputs, tasks) == ([], [FetchKeys(1, "one", ["a"]), FetchKeys(2, "two", ["c"])])
    case.machine.fetch_finished(1, {"a": 500}, [], {})
    assert case.out()[1] == [StartRuns([case.run(1)]), FetchKeys(3, "one", ["b"])]


def test_a_holder_that_stalls_takes_a_quarter_of_the_bytes_in_flight() -> None:
    case = Case(fetch_bytes=6400)
    slow: list[Key] = [f"slow{i}" for i in range(4)]
    fast: list[Key] = [f"fast{i}" for i in range(4)]
    inputs = Inputs([*slow, *fast], [1600, 800, 800, 800] * 2, [[1]] * 4 + [[2]] * 4)
    ops, instructions = case.receive(inputs, compute([1, 2], [slow, fast]))
    assert (ops, instructions) == ([], [FetchKeys(1, "one", ["slow0"]), FetchKeys(2, "two", ["fast0"])])
    case.machine.fetch_finished(2, {"fast0": 1600}, [], {})
    assert case.out()[1] == [FetchKeys(3, "two", ["fast1", "fast2"])]
    case.machine.fetch_finished(3, {"fast1": 800, "fast2": 800}, [], {})
    assert case.out()[1] == [FetchKeys(4, "two", ["fast3"])]
    case.machine.fetch_finished(4, {"fast3": 800}, [], {})
    assert case.out()[1] == [StartRuns([case.run(2)])]
    case.machine.fetch_finished(1, {"slow0": 1600}, [], {})
    assert case.out()[1] == [FetchKeys(5, "one", ["slow1", "slow2"])]


def test_a_little_is_asked_of_each_holder_when_others_have_taken_all_bytes_in_flight() -> None:
    case = Case(fetch_bytes=6400)
    case.receive(Peers([3, 4, 5], ["three", "four", "five"]))
    stalled: list[Key] = [f"stalled{i}" for i in range(4)]
    small: list[Key] = ["small1", "small2", "more"]
    inputs = Inputs([*stalled, *small], [1600] * 4 + [60, 60, 60], [[1], [2], [3], [4]] + [[5]] * 3)
    _, instructions = case.receive(inputs, compute([1], [[*stalled, *small]]))
    assert instructions[-1] == FetchKeys(5, "five", ["small1", "small2"])
    case.machine.fetch_finished(5, {"small1": 60, "small2": 60}, [], {})
    assert case.out()[1] == [FetchKeys(6, "five", ["more"])]


def test_an_input_set_aside_goes_to_the_first_of_its_holders_that_has_time() -> None:
    case = Case(fetch_bytes=400)
    inputs = Inputs(["a", "b", "c", "d"], [100] * 4, [[1], [2], [1, 2], [1]])
    _, instructions = case.receive(inputs, compute([1, 2, 3, 4], [["a"], ["b"], ["c"], ["d"]]))
    assert instructions == [FetchKeys(1, "one", ["a"]), FetchKeys(2, "two", ["b"])]
    case.machine.fetch_finished(2, {"b": 100}, [], {})
    assert case.out()[1] == [StartRuns([case.run(2)]), FetchKeys(3, "two", ["c"])]
    assert case.receive(UpdateLocations(["d"], [[1, 2]])) == ([], [])
    case.machine.fetch_finished(3, {"c": 100}, [], {})
    assert case.out()[1] == [StartRuns([case.run(3)]), FetchKeys(4, "two", ["d"])]
    case.machine.fetch_broken(1)
    assert case.out() == ([FetchFailed(["a"], 1, False)], [])
    case.machine.fetch_finished(4, {"d": 100}, [], {})
    case.receive(CancelRuns([1]))
    case.finish(2, 3, 4)
    case.assert_empty()


def test_a_holder_without_the_key_is_struck_and_the_next_one_asked_then_the_scheduler() -> None:
    case = Case()
    case.receive(Inputs(["a"], [10], [[1, 2]]), compute([1], [["a"]]))
    case.machine.fetch_finished(1, {}, ["a"], {})
    assert case.out() == ([], [FetchKeys(2, "two", ["a"])])
    case.machine.fetch_broken(2)
    assert case.out() == ([FetchFailed(["a"], 2, False)], [])
    assert case.receive(UpdateLocations(["a"], [[]])) == ([], [])
    assert case.receive(UpdateLocations(["a"], [[1]])) == ([], [FetchKeys(3, "one", ["a"])])
    case.machine.fetch_finished(3, {"a": 10}, [], {})
    assert case.out() == ([DataAdded(["a"], [10])], [StartRuns([case.run(1)])])


def test_what_came_before_a_link_broke_is_kept_and_the_rest_asked_of_others() -> None:
    case = Case()
    case.receive(Inputs(["a", "b", "c"], [10] * 3, [[1], [1], [1, 2]]), compute([1, 2, 3], [["a"], ["b"], ["c"]]))
    assert case.machine.fetch_finished(1, {"a": 10}, [], {}, ["b", "c"]) == ["a"]
    assert case.out() == (
        [DataAdded(["a"], [10]), FetchFailed(["b"], 1, False)],
        [StartRuns([case.run(1)]), FetchKeys(2, "two", ["c"])],
    )


def test_an_input_that_cannot_be_sent_fails_the_runs_that_need_it() -> None:
    case = Case()
    case.receive(Inputs(["a", "b"], [10, 10], [[1], [1]]), compute([1, 2, 3], [["a"], ["a", "b"], ["b"]]))
    case.machine.fetch_finished(1, {"b": 10}, [], {"a": "no pickle"})
    ops, instructions = case.out()
    error = ErrorInfo("SerializationError", "SerializationError: input 'a' cannot be sent: no pickle")
    assert ops == [DataAdded(["b"], [10]), TaskErred(1, error), TaskErred(2, error)]
    assert instructions == [StartRuns([case.run(3)])]
    case.finish(3)
    case.assert_empty()


def test_inputs_nobody_spoke_of_are_asked_for() -> None:
    case = Case()
    assert case.receive(compute([1, 2], [["a"], ["a"]])) == ([FetchFailed(["a"], -1, True)], [])
    assert case.receive(UpdateLocations(["a"], [[2]])) == ([], [FetchKeys(1, "two", ["a"])])


def test_holders_without_an_address_count_for_none() -> None:
    case = Case()
    assert case.receive(Inputs(["a"], [1], [[9]]), compute([1], [["a"]])) == ([FetchFailed(["a"], -1, True)], [])


def test_inline_inputs_are_kept_until_their_last_run_is_over() -> None:
    case = Case()
    inputs = Inputs(["a", "b"], [3, 9], [[], [1]], [3, -1], b"xyz")
    ops, instructions = case.receive(inputs, compute([1, 2], [["a"], ["a", "b"]]))
    assert (ops, instructions) == (
        [],
        [KeepInline(["a"], [b"xyz"]), StartRuns([case.run(1)]), FetchKeys(1, "one", ["b"])],
    )
    assert case.finish(1) == ([finished(1)], [])
    case.machine.fetch_finished(1, {"b": 9}, [], {})
    case.out()
    assert case.finish(2) == ([finished(2)], [DropInline(["a"])])
    case.assert_empty()


def test_an_inline_value_overtakes_a_fetch_whose_result_is_then_ignored() -> None:
    case = Case()
    case.receive(Inputs(["a"], [3], [[1]]), compute([1], [["a"]]))
    again = Inputs(["a"], [3], [[]], [3], b"xyz")
    assert case.receive(again) == ([], [KeepInline(["a"], [b"xyz"]), StartRuns([case.run(1)])])
    assert case.machine.fetch_finished(1, {"a": 3}, [], {}) == []
    assert case.out() == ([], [])
    assert case.finish(1) == ([finished(1)], [DropInline(["a"])])
    case.assert_empty()


def test_inputs_that_no_task_follows_are_forgotten_after_two_ticks() -> None:
    case = Case()
    case.receive(Inputs(["a", "b", "c"], [3, 3, 3], [[], [1], []], [1, -1, 1], b"xy"))
    case.receive(compute([1], [["c"]]))
    case.machine.tick()
    assert case.out() == ([], [])
    case.machine.tick()
    assert case.out() == ([], [DropInline(["a"])])
    assert set(case.machine.inputs.records) == {"c"}


def test_retraction_gives_back_what_waits_and_asks_for_what_may_have_started() -> None:
    case = Case()
    case.receive(Inputs(["a"], [3], [[1]]), compute([1, 2, 3], [["a"], [], []]))
    one, two, three = (case.run(i) for i in (1, 2, 3))
    ops, instructions = case.receive(RetractRuns([1, 2, 3, 99]))
    assert (ops, instructions) == ([RunsDropped([1])], [TakeBack([two, three])])
    case.machine.runs_taken_back([three])
    assert case.out() == ([RunsDropped([3])], [])
    assert case.finish(2) == ([finished(2)], [])
    assert (one.state, three.state) == (RunState.DROPPED, RunState.DROPPED)
    # The fetch that was under way for nobody leaves nothing.
    assert case.machine.fetch_finished(1, {"a": 3}, [], {}) == []
    assert case.out() == ([], [])
    case.assert_empty()


def test_executing_runs_are_not_asked_for_on_retraction() -> None:
    case = Case()
    case.receive(compute([1]))
    case.machine.runs_executing([case.run(1)])
    assert case.out() == ([RunsExecuting([1])], [])
    assert case.receive(RetractRuns([1])) == ([], [])


def test_cancellation_drops_what_waits_and_interrupts_the_rest() -> None:
    case = Case()
    case.receive(Inputs(["a"], [3], [[1]]), compute([1, 2, 3, 4], [["a"], [], [], []]))
    runs = [case.run(i) for i in (2, 3, 4)]
    case.machine.runs_executing([runs[0]])
    case.out()
    ops, instructions = case.receive(CancelRuns([1, 2, 3, 4, 99]))
    assert (ops, instructions) == ([RunsDropped([1])], [TakeBack([runs[1], runs[2]]), Interrupt(runs)])
    case.machine.runs_taken_back([runs[1]])
    assert case.out() == ([RunsDropped([3])], [])
    assert case.finish(2) == ([RunsDropped([2])], [])
    case.machine.run_erred(runs[2], ERROR, 5)
    assert case.out() == ([RunsDropped([4])], [])
    assert case.machine.inputs.held == {}
    case.machine.fetch_broken(1)
    assert case.out() == ([], [])
    case.assert_empty()


def test_errors_block_resume_secede() -> None:
    case = Case()
    case.receive(compute([1, 2]))
    one, two = case.run(1), case.run(2)
    case.machine.run_blocked(one)
    case.machine.run_seceded(two)
    case.machine.run_resumed(one)
    case.machine.run_resumed(two)
    case.machine.runs_executing([one, two])
    case.machine.run_erred(one, ERROR, 5)
    assert case.out() == (
        [TaskBlocked(1), TaskSeceded(2), TaskResumed(1), TaskResumed(2), RunsExecuting([1, 2]), TaskErred(1, ERROR, 5)],
        [],
    )
    assert case.finish(2) == ([finished(2)], [])
    case.assert_empty()


def test_a_result_or_data_put_here_satisfies_who_waits_for_it() -> None:
    case = Case()
    case.receive(Inputs(["k9", "p"], [3, 3], [[1], [1]]), compute([1, 2], [["k9"], ["p"]]))
    case.receive(compute([9]))
    assert case.finish(9) == ([finished(9)], [StartRuns([case.run(1)])])
    case.machine.data_put(["p"], [4])
    assert case.out() == ([DataAdded(["p"], [4])], [StartRuns([case.run(2)])])
    assert case.machine.fetch_finished(1, {"k9": 3, "p": 3}, [], {}) == []
    assert case.out() == ([], [])


def test_an_input_freed_while_its_run_waits_for_another_is_asked_for_again() -> None:
    case = Case()
    case.machine.data_put(["a"], [4])
    case.receive(Inputs(["b"], [3], [[1]]), compute([1], [["a", "b"]]))
    case.receive(FreeKeys(["a"]))
    case.machine.fetch_finished(1, {"b": 3}, [], {})
    assert case.out() == ([DataAdded(["b"], [3]), FetchFailed(["a"], -1, True)], [])
    case.receive(UpdateLocations(["a"], [[2]]))
    case.machine.fetch_finished(2, {"a": 4}, [], {})
    assert case.out() == ([DataAdded(["a"], [4])], [StartRuns([case.run(1)])])


def test_what_is_not_the_machines_business_is_passed_on() -> None:
    case = Case()
    call = CallFunction(3, b"f")
    assert case.receive(call, StopWorker("bye")) == ([], [Call(call), Stop("bye")])


def test_an_illegal_transition_raises_with_the_story_of_the_run() -> None:
    case = Case(debug=True)
    case.receive(compute([1]))
    run = case.run(1)
    case.machine.run_blocked(run)
    with pytest.raises(
        InvalidTransitionError, match=r"'k1' \(f\) cannot go from blocked to finished.*ready -> blocked"
    ):
        case.finish(1)
    case = Case()
    case.receive(compute([1]))
    run = case.run(1)
    case.finish(1)
    with pytest.raises(InvalidTransitionError, match="finished to dropped"):
        case.machine.runs_taken_back([run])


@pytest.mark.parametrize(("table", "states"), [(RUN_TRANSITIONS, RunState), (INPUT_TRANSITIONS, InputState)])
def test_tables_name_every_state_and_every_state_can_be_reached(table: Any, states: Any) -> None:
    assert set(table) == {None, *states}
    assert {finish for finishes in table.values() for finish in finishes} == set(states)
