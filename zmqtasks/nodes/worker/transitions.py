"""The legal transitions of a worker's runs and inputs; a pair that is not listed raises, with what is known of the run.

`None` is a record that does not exist yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from zmqtasks.errors import InvalidTransitionError
from zmqtasks.nodes.worker.state import Input, InputState, Run, RunState

RUN_TRANSITIONS: dict[RunState | None, tuple[RunState, ...]] = {
    None: (RunState.WAITING, RunState.READY),
    RunState.WAITING: (RunState.READY, RunState.ERRED, RunState.DROPPED),
    RunState.READY: (
        RunState.EXECUTING,
        RunState.BLOCKED,
        RunState.SECEDED,
        RunState.FINISHED,
        RunState.ERRED,
        RunState.DROPPED,
    ),
    RunState.EXECUTING: (
        RunState.BLOCKED,
        RunState.SECEDED,
        RunState.FINISHED,
        RunState.ERRED,
        RunState.DROPPED,
    ),
    RunState.BLOCKED: (RunState.EXECUTING,),
    RunState.SECEDED: (RunState.EXECUTING, RunState.FINISHED, RunState.ERRED, RunState.DROPPED),
    RunState.FINISHED: (),
    RunState.ERRED: (),
    RunState.DROPPED: (),
}

INPUT_TRANSITIONS: dict[InputState | None, tuple[InputState, ...]] = {
    None: (InputState.NEEDED, InputState.MISSING, InputState.INLINE),
    InputState.NEEDED: (
        InputState.FETCHING,
        InputState.MISSING,
        InputState.INLINE,
        InputState.HELD,
        InputState.GONE,
    ),
    InputState.FETCHING: (
        InputState.NEEDED,
        InputState.MISSING,
        InputState.INLINE,
        InputState.HELD,
        InputState.GONE,
    ),
    InputState.MISSING: (InputState.NEEDED, InputState.INLINE, InputState.HELD, InputState.GONE),
    InputState.INLINE: (InputState.HELD, InputState.GONE),
    InputState.HELD: (),
    InputState.GONE: (),
}

StateT = TypeVar("StateT", RunState, InputState)


def origins(table: Mapping[StateT | None, tuple[StateT, ...]], finish: StateT) -> tuple[StateT, ...]:
    """The states from which `finish` may be reached: a tuple, as hashing an Enum member is slow."""
    return tuple(start for start, finishes in table.items() if start is not None and finish in finishes)


def invalid_run_transition(run: Run, finish: RunState, stimulus: str, story: str = "") -> InvalidTransitionError:
    """The error for a transition that `RUN_TRANSITIONS` does not list."""
    return InvalidTransitionError(
        f"run {run.run_id:#x} of task {run.key!r} ({run.group.name}) cannot go from {run.state.value} to {finish.value}"
        f" ({stimulus}); cancelled: {run.cancelled}, inputs missing: {run.missing}{story}"
    )


def change_input(record: Input, finish: InputState, stimulus: str) -> None:
    """Moves an input to `finish`; raises `InvalidTransitionError` when that is not legal."""
    if finish not in INPUT_TRANSITIONS[record.state]:
        raise InvalidTransitionError(
            f"input {record.key!r} cannot go from {record.state.value} to {finish.value} ({stimulus});"
            f" holders {record.holders}, waited for by runs {list(record.waiters or ())}"
        )
    record.state = finish
