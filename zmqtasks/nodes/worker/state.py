"""What a worker remembers: a record for each run, and one for each input that it does not hold yet."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import msgspec

from zmqtasks.ids import Key


class RunState(Enum):
    """Where a run stands; `machine` has the theory, `transitions` the legal steps."""

    WAITING = "waiting"
    """Some inputs are not here yet."""
    READY = "ready"
    """Handed to the executor, which starts it as soon as a slot is free: it may have started."""
    EXECUTING = "executing"
    """Known to have started."""
    BLOCKED = "blocked"
    """Waits for a future inside itself; its slot is free."""
    SECEDED = "seceded"
    """Executing outside of the slots."""
    FINISHED = "finished"
    ERRED = "erred"
    DROPPED = "dropped"


class InputState(Enum):
    """Where an input stands that some run needs and the worker did not hold when it was told of it."""

    NEEDED = "needed"
    """To be fetched when bytes in flight allow."""
    FETCHING = "fetching"
    MISSING = "missing"
    """No known holder has it; the scheduler has been told and will name others."""
    INLINE = "inline"
    """Its value came with the tasks and goes with the last of them."""
    HELD = "held"
    """A replica of this worker."""
    GONE = "gone"
    """Nobody here needs it any more."""


class TaskGroup(msgspec.Struct, frozen=True, gc=False):
    """What all runs of one `ComputeTasks` share."""

    function: bytes
    name: str
    resources: dict[str, float]
    actor: int = 0
    """As in `TaskOptions`."""


class Run(msgspec.Struct, gc=False, eq=False):
    """One attempt at a task. A struct without collector: a worker makes one for each task, in about 0.15 us."""

    run_id: int
    key: Key
    priority: int
    group: TaskGroup
    state: RunState
    args: bytes = b""
    deps: Sequence[Key] = ()
    records: Sequence[Input] = ()
    """Inputs that were not held when the run came: each counts the run as a user until it ends."""
    missing: int = 0
    """Of those, how many have not arrived."""
    cancelled: bool = False
    """Nobody wants the result: the task is asked to stop (read by its thread)."""
    inputs: Sequence[Any] = ()
    """Entries of the store for `deps`, pinned by the shell when it hands the run to the executor."""


class Input(msgspec.Struct, gc=False, eq=False):
    """An input on its way here. Without collector: the end of a run breaks the circle between the two."""

    key: Key
    size: int
    holders: list[int]
    state: InputState
    waiters: dict[int, Run] | None = None
    """Runs that wait for it, by run id."""
    users: int = 0
    """Runs, not over yet, that have it in their `records`."""
    unused: bool = False
    """Had no user at the last tick."""
