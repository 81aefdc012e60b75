"""The legal moves of a task in the scheduler: one table, from which the diagram in the docs is drawn.

Theory of operation
-------------------
A record is made in the first column of `INITIAL`. From then on its `state` changes only along a line of `TRANSITIONS`; any
other pair is a bug and raises `InvalidTransitionError` with what is remembered of the task. The two hottest moves
(READY -> PROCESSING in `placement`, PROCESSING -> MEMORY in `lifecycle`) test the start state themselves, and so does
`releasing` for MEMORY -> RELEASED -> FORGOTTEN, the end of most; all other moves go through `check`.
"""

from __future__ import annotations

from zmqtasks.errors import InvalidTransitionError
from zmqtasks.nodes.scheduler.state import SchedulerState, State, TaskState

INITIAL: dict[State, str] = {
    State.WAITING: "submitted, some inputs are not in memory; or data was declared",
    State.READY: "submitted, all inputs are in memory",
    State.ERRED: "submitted, an input has failed",
}

TRANSITIONS: dict[tuple[State, State], str] = {
    (State.WAITING, State.READY): "the last input is in memory",
    (State.WAITING, State.MEMORY): "data: a worker has the bytes; a task: a worker turned out to hold the result",
    (State.WAITING, State.ERRED): "an input failed; data: it is lost for good",
    (State.WAITING, State.RELEASED): "nobody needs the result any more, or it was cancelled",
    (State.READY, State.PROCESSING): "given to a worker",
    (State.READY, State.MEMORY): "a worker turned out to hold the result",
    (State.READY, State.WAITING): "an input got lost",
    (State.READY, State.RELEASED): "nobody needs the result any more, or it was cancelled",
    (State.PROCESSING, State.MEMORY): "finished",
    (State.PROCESSING, State.ERRED): "it raised and has no retries left, or killed too many workers",
    (State.PROCESSING, State.READY): "given back, to be retried, or its worker died; inputs are in memory",
    (State.PROCESSING, State.WAITING): "as to READY, but an input got lost too",
    (State.PROCESSING, State.RELEASED): "nobody needs the result any more, or it was cancelled",
    (State.MEMORY, State.RELEASED): "nobody needs the value now, or its last replica got lost",
    (State.RELEASED, State.WAITING): "needed (again); some inputs are not in memory",
    (State.RELEASED, State.READY): "needed (again); all inputs are in memory",
    (State.RELEASED, State.ERRED): "needed again, but an input has failed or is gone for good",
    (State.RELEASED, State.FORGOTTEN): "nobody needs the spec",
    (State.RELEASED, State.MEMORY): "a worker that was thought lost turned out to hold it",
    (State.ERRED, State.RELEASED): "to be retried, or forgotten next",
    (State.ERRED, State.FORGOTTEN): "nobody needs to hear of the failure",
}


def check(state: SchedulerState, ts: TaskState, new: State) -> None:
    """Moves `ts` to `new`; raises `InvalidTransitionError` when the table does not list the move."""
    if (ts.state, new) not in TRANSITIONS:
        story = "; ".join(state.story(ts.key, ts.name)[-20:]) or "nothing unusual before"
        raise InvalidTransitionError(f"task {ts.name} can't go from {ts.state.name} to {new.name} ({story})")
    ts.state = new
