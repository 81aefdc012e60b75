"""Between the scheduler and workers."""

from __future__ import annotations

from zmqtasks.ids import Key
from zmqtasks.protocol.ops.base import ErrorInfo, Op


class Peers(Op, frozen=True, tag=60):
    """Numbers that later ops use for workers, with their data addresses."""

    numbers: list[int]
    addresses: list[str]


class Inputs(Op, frozen=True, tag=61):
    """Inputs of tasks that follow, which the worker does not hold: their values, or who holds them."""

    keys: list[Key]
    sizes: list[int]
    holders: list[list[int]]
    """Worker numbers (see `Peers`); empty where the value is here."""
    lengths: list[int] = []
    """-1: not in `values`; an empty column: none is."""
    values: bytes = b""


class ComputeTasks(Op, frozen=True, tag=62):
    """Tasks of one function to run; columns as in `SubmitTasks`."""

    function: bytes
    name: str
    keys: list[Key]
    run_ids: list[int]
    priorities: list[int]
    """Lower runs earlier."""
    args: bytes = b""
    args_lengths: list[int] = []
    dep_counts: list[int] = []
    deps: list[Key] = []
    resources: dict[str, float] = {}
    """Held by each of the tasks while it runs."""
    actor: int = 0
    """As in `TaskOptions`."""


class FreeKeys(Op, frozen=True, tag=63):
    """Results and replicas to drop."""

    keys: list[Key]


class RetractRuns(Op, frozen=True, tag=64):
    """Gives back runs that have not started; `RunsDropped` lists the ones given back, the others end as usual."""

    run_ids: list[int]


class CancelRuns(Op, frozen=True, tag=65):
    """Runs whose result nobody wants: not started ones are dropped, running ones are asked to stop and their results dropped."""

    run_ids: list[int]


class UpdateLocations(Op, frozen=True, tag=66):
    """The answer to `FetchFailed`: who holds the keys now; an empty list: wait, another list follows, or `CancelRuns`."""

    keys: list[Key]
    holders: list[list[int]]


class CallFunction(Op, frozen=True, tag=67):
    """`RunFunction` on its way to a worker or nanny; answered by `CallFinished`."""

    call: int
    function: bytes


class StopWorker(Op, frozen=True, tag=68):
    """The worker is to end in good order."""

    reason: str


class TasksFinished(Op, frozen=True, tag=80):
    """Runs that gave a result. Small results are in `values` (and stay with the worker too)."""

    run_ids: list[int]
    lengths: list[int]
    """Length of the value in `values`; -1: not sent."""
    values: bytes
    durations_us: list[int]
    sizes: list[int] = []
    """Bytes that the results take; an empty column: the same as `lengths`."""
    reference_counts: list[int] = []
    """Futures that the results contain: their keys live as long as the result."""
    references: list[Key] = []


class TaskErred(Op, frozen=True, tag=81):
    """A run raised."""

    run_id: int
    error: ErrorInfo
    duration_us: int = 0


class RunsDropped(Op, frozen=True, tag=82):
    """Runs that were retracted before they started, or cancelled; they leave nothing behind."""

    run_ids: list[int]


class RunsExecuting(Op, frozen=True, tag=83):
    """Runs that have been executing for a while (sent with the metrics): they can't be retracted."""

    run_ids: list[int]


class DataAdded(Op, frozen=True, tag=84):
    """Data that was put on this worker, or fetched by it: it holds a replica from now on."""

    keys: list[Key]
    sizes: list[int]


class FetchFailed(Op, frozen=True, tag=85):
    """Inputs that none of the given holders has; answered by `UpdateLocations` or `CancelRuns`."""

    keys: list[Key]
    holder: int
    """The number of the worker that was asked last."""
    reachable: bool
    """True: it answered that it does not have them."""


class TaskBlocked(Op, frozen=True, tag=86):
    """A running task waits for a future: its thread's slot is free until `TaskResumed` (resources stay held)."""

    run_id: int


class TaskResumed(Op, frozen=True, tag=87):
    """The wait of a blocked task is over (or a seceded task rejoined)."""

    run_id: int


class TaskSeceded(Op, frozen=True, tag=88):
    """A running task left the pool: its slot and resources are free for good."""

    run_id: int


class WorkerMetrics(Op, frozen=True, tag=89):
    """How the worker does, about every second."""

    memory_bytes: int
    stored_keys: int
    stored_bytes: int
    cpu_percent: float
    queued: int
    executing: int
    compression: dict[str, int] = {}
    """Frames and bytes of its data links so far, by the names of `compression.Counters`; empty: none was large enough."""


class CallFinished(Op, frozen=True, tag=90):
    """The answer to `CallFunction`, `SetUpPlugin` and `TearDownPlugin`."""

    call: int
    result: bytes
    erred: bool
