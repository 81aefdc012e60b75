"""Every op of the protocol: a typed struct each, and one union per direction of each kind of link.

Ops are imperative requests (`ComputeTasks`) or past-tense reports (`TasksFinished`). An op is itself the input and the output of
the machines: there are no parallel event classes. Bulk ops are columns: parallel lists, one blob for a column of variable-size
values with a column of lengths beside it, and a flat list with a column of counts for a list per task. A column of counts or
lengths that is empty stands for zeros. On the wire an op is a MessagePack array whose first element is its tag; fields are
only ever appended, with defaults. `docs/wire.md` is generated from this file.

Links: client - scheduler, worker - scheduler and nanny - scheduler are control links: resumable, all content in frame 0.
Data links (anyone - worker) carry payload buffers in frames 1..n.

Rules that the machines on both sides rely on:

- Ops of one link are handled in the order in which they were sent.
- A worker answers every run id of `ComputeTasks` exactly once: in `TasksFinished`, `TaskErred` or `RunsDropped`.
- A client wants every key that it submits, declares or names in `WantKeys`, until `ReleaseKeys`. It is told the fate of each key
  that it wants: `KeysInMemory`, `KeysErred`, `KeysCancelled`, and `KeysRecomputing` when a result got lost.
- A key is submitted after the keys that it depends on.
- Functions, arguments, results and exceptions are opaque bytes (see `payload.pack_inline`): a scheduler never opens them.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from zmqtasks.ids import Key

PROTOCOL_VERSION = 1


class Op(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=False):
    """Base of all ops."""


# --- shared records -------------------------------------------------------------------------------------------------


class TaskOptions(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a user may say about tasks; one record is shared by a whole `map`."""

    priority: int = 0
    """Higher runs earlier."""
    retries: int = 0
    """Attempts after the first one that raises."""
    workers: list[str] = []
    """Names, addresses or hosts of workers that may run it; empty: any."""
    allow_other_workers: bool = False
    resources: dict[str, float] = {}
    idempotent: bool = True
    """False: not run again when a worker died while it was executing; the task fails as `KilledWorker` instead."""
    actor: int = 0
    """1: makes an actor, which stays on its worker. 2: calls the actor that is its last input, where that is."""


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a task failed."""

    kind: str
    """`exception`: raised by the task; else the name of a class in `zmqtasks.errors`, made by the scheduler."""
    text: str
    """`ValueError: message`, or the message of the scheduler's error."""
    payload: bytes = b""
    """Inline payload of (exception, pickled traceback or None, links to causes and contexts); empty when the scheduler made
    the error."""
    traceback_text: str = ""
    key: Key = 0
    """The task that failed first; others fail because they depend on it."""
    name: str = ""
    worker: str = ""


class LogRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A line that a task printed, warned or logged."""

    level: int
    """As in the logging module; 0 for stdout, 1 for stderr."""
    logger: str
    text: str
    worker: str = ""
    category: str = ""
    """For warnings: the name of the category."""


# --- introductions: the authenticated part of a hello ---------------------------------------------------------------


class ClientIntroduction(Op, tag=1):
    """A client, or a tool that asks questions, connects to a scheduler."""

    name: str
    pid: int
    host: str
    worker: bytes = b""
    """Instance id of the worker in whose process it lives, for that worker's tasks: it ends with that process."""


class WorkerIntroduction(Op, tag=2):
    """A worker connects to a scheduler."""

    name: str
    pid: int
    host: str
    data_address: str
    nthreads: int
    memory_limit_bytes: int
    """0: unlimited."""
    resources: dict[str, float]
    nanny: bytes = b""
    """Instance id of the nanny that watches this process; empty without one."""
    local_directory: str = ""
    held_keys: list[Key] = []
    """What it already holds (a new scheduler epoch), with `held_sizes`."""
    held_sizes: list[int] = []


class NannyIntroduction(Op, tag=3):
    """A nanny connects to a scheduler."""

    name: str
    pid: int
    host: str


class DataIntroduction(Op, tag=4):
    """A node connects to a worker to fetch or put data."""

    name: str
    codecs: list[str] = []
    """Of compression, that it can read; what the acceptor can read is in its welcome."""


Introduction: TypeAlias = ClientIntroduction | WorkerIntroduction | NannyIntroduction | DataIntroduction


# --- both ways on control links -------------------------------------------------------------------------------------


class PutFunctions(Op, tag=10):
    """Functions, once per link; later ops refer to them by digest."""

    digests: list[bytes]
    functions: list[bytes]


class Goodbye(Op, tag=11):
    """The sender leaves in good order; the session ends and is not resumed."""

    reason: str = ""


class LogMessages(Op, tag=12):
    """Output of tasks, on its way from a worker to every client."""

    records: list[LogRecord]


# --- client -> scheduler --------------------------------------------------------------------------------------------


class SubmitTasks(Op, tag=20):
    """Tasks of one function with one set of options.

    Keys are `keys`, or when that is empty the `count` integers from `first_key` on. `args` of zero length stand for a call with
    exactly the inputs as positional arguments; else they are an inline payload of (args, kwargs) in which a `KeyRef(i)` stands for
    the i-th input.
    """

    function: bytes
    name: str
    first_key: int = 0
    count: int = 0
    keys: list[Key] = []
    args: bytes = b""
    args_lengths: list[int] = []
    dep_counts: list[int] = []
    deps: list[Key] = []
    references: list[Key] = []
    """Keys of futures that travel inside the arguments as live futures: kept while any of these tasks is unfinished."""
    options: TaskOptions = TaskOptions()
    order: list[int] = []
    """When each is to run, counted from the first task of this op; may be negative, for tasks that are to run before earlier
    ones. Empty: one after the other."""
    reuse: bool = False
    """A key that exists is what was meant, whatever its function and arguments. False: it must be the same task."""


class DeclareData(Op, tag=21):
    """Data that the client has; the scheduler answers with `PlaceData`."""

    keys: list[Key]
    sizes: list[int]
    workers: list[str] = []
    """Names, addresses or hosts to choose from; empty: any."""
    copies: int = 1
    """On how many workers; -1: on all that are allowed."""
    retained: bool = False
    """The client keeps the bytes until `DropData` and can send them again."""


class PlacementFailed(Op, tag=22):
    """The client could not put data on a worker."""

    keys: list[Key]
    address: str
    reason: str = ""


class WantKeys(Op, tag=23):
    """The client holds futures of keys that it did not submit itself."""

    keys: list[Key]


class ReleaseKeys(Op, tag=24):
    """The client no longer holds a future of these keys."""

    keys: list[Key]


class CancelTasks(Op, tag=25):
    """Ends unfinished tasks and what depends on them; every client that wants one hears `KeysCancelled`.

    Without `force`, keys that another client wants too are only released for this client.
    """

    keys: list[Key]
    force: bool = False
    reason: str = ""


class RetryTasks(Op, tag=26):
    """Failed tasks (and the failed tasks that they depend on) are tried again."""

    keys: list[Key]


class RequestLocations(Op, tag=27):
    """Asks who holds keys that are in memory; answered by `Locations`."""

    request: int
    keys: list[Key]


class ReportMissing(Op, tag=28):
    """A worker that should hold keys did not have them, or could not be reached."""

    keys: list[Key]
    address: str
    reachable: bool
    """True: the worker answered that it does not have them."""


class KeepTasks(Op, tag=29):
    """Fire and forget: these tasks run to their end even when no client wants them."""

    keys: list[Key]


class Query(Op, tag=30):
    """A question about the cluster, answered by `QueryAnswered`; see `scheduler.queries` for the list."""

    request: int
    what: str
    keys: list[Key] = []
    workers: list[str] = []


class RunFunction(Op, tag=31):
    """Calls a function once on each worker (or nanny), outside of any task; answered by one `RunFinished` for each worker."""

    request: int
    function: bytes
    """Inline payload of (function, args, kwargs)."""
    workers: list[str] = []
    """Empty: all."""
    on_nanny: bool = False


class Restart(Op, tag=32):
    """Forgets all tasks and data and restarts all worker processes; answered by `QueryAnswered`."""

    request: int
    timeout_s: float = 60.0


class Shutdown(Op, tag=33):
    """Ends workers, nannies and scheduler."""

    reason: str = ""


class RegisterPlugin(Op, tag=34):
    """A plugin, or a file, that every worker sets up: those of now, and later ones before their first task.

    Answered as `RunFunction`. When one of the workers of now fails, the registration is taken back on all, and what had that name
    before is set up again.
    """

    request: int
    name: str
    content: bytes
    """Inline payload: of the plugin; of (bytes, whether to import it) for a file."""
    is_file: bool = False
    idempotent: bool = False
    """Nothing is done when there is a plugin of that name already."""


class UnregisterPlugin(Op, tag=35):
    """Workers tear a plugin down; answered as `RunFunction`."""

    request: int
    name: str


class AcquireLease(Op, tag=50):
    """Asks for a lease of a semaphore (a lock has one); answered by `QueryAnswered`: whether it was granted.

    The lease is called by the number of this request.
    """

    request: int
    name: str
    max_leases: int = 1
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class GiveUp(Op, tag=51):
    """Gives back what a request was granted (a lease, values), or ends its wait, whichever it is by now.

    Answered by `QueryAnswered`, unless `request` is 0.
    """

    request: int
    number: int
    """Of the request."""


class ReadLeases(Op, tag=52):
    """Asks for the leases of a semaphore that are held; answered by `QueryAnswered`."""

    request: int
    name: str
    holders: bool = False
    """Answered by the names of the clients that hold them, not by their number."""


class CloseSemaphore(Op, tag=53):
    """Ends a semaphore: waiting and later requests for leases fail; answered by `QueryAnswered`."""

    request: int
    name: str


class SetEvent(Op, tag=54):
    """Sets or clears an event; answered by `QueryAnswered`."""

    request: int
    name: str
    value: bool


class WaitEvent(Op, tag=55):
    """Waits until an event is set; answered by `QueryAnswered`: whether it is."""

    request: int
    name: str
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class SetValue(Op, tag=110):
    """Gives a shared name its value; answered by `QueryAnswered`: whether it has it now."""

    request: int
    kind: str
    """`variable` or `dataset`."""
    name: str
    value: bytes
    """Inline payload."""
    keys: list[Key] = []
    """Of the futures inside: wanted for as long as the name has this value."""
    new: bool = False
    """Nothing is done when the name has a value already."""


class GetValue(Op, tag=111):
    """Asks for the value of a shared name, when it has one; answered by `QueryAnswered`: [value, whether it has keys], or None.

    The keys of a value that has some stay wanted until `Received`, or `GiveUp`.
    """

    request: int
    kind: str
    name: str
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class DeleteValue(Op, tag=112):
    """Takes the value of a shared name away; answered by `QueryAnswered`: whether there was one."""

    request: int
    kind: str
    name: str


class ListValues(Op, tag=113):
    """Asks which names of a kind have values; answered by `QueryAnswered`."""

    request: int
    kind: str


class PutItem(Op, tag=114):
    """Puts a value into a queue when it has room; answered by `QueryAnswered`: [closings, whether it is in the queue]."""

    request: int
    name: str
    value: bytes
    """Inline payload."""
    keys: list[Key] = []
    """Of the futures inside: wanted for as long as the value is in the queue."""
    maxsize: int = 0
    """How many values the queue holds; 0: as many as others have said."""
    closings: int = -1
    """As in the last answer about this queue: refused when it was closed since; -1: there was none."""
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class GetItems(Op, tag=115):
    """Takes values out of a queue; answered by `QueryAnswered`: [closings, values], no list when time is up.

    They are the asker's with `Received`. With `GiveUp` they go back to where they were.
    """

    request: int
    name: str
    count: int = 1
    """Waits for so many; 0: takes what is there, and waits for nothing."""
    closings: int = -1
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class Received(Op, tag=116):
    """What was answered to a `GetValue` or `GetItems` has arrived: the asker wants the keys inside itself. Not answered."""

    number: int
    """Of the request."""


class ReadQueue(Op, tag=117):
    """Asks how many values a queue holds; answered by `QueryAnswered`: [closings, number]."""

    request: int
    name: str
    closings: int = -1


class CloseQueue(Op, tag=118):
    """Drops what is in a queue, and ends all waits for it; a later use begins anew. Answered by `QueryAnswered`."""

    request: int
    name: str


# --- scheduler -> client --------------------------------------------------------------------------------------------


class KeysInMemory(Op, tag=40):
    """Results exist; those with a length >= 0 are in `values`, the others are to be fetched (`RequestLocations`)."""

    keys: list[Key]
    sizes: list[int]
    lengths: list[int]
    """-1: not in `values`."""
    values: bytes = b""


class KeysErred(Op, tag=41):
    """Tasks failed, all for the same reason."""

    keys: list[Key]
    error: ErrorInfo


class KeysCancelled(Op, tag=42):
    """Futures that will not come true: cancelled, or their data is gone (`lost`)."""

    keys: list[Key]
    reason: str
    kind: str = "CancelledError"
    """The name of a class in `zmqtasks.errors`."""


class KeysRecomputing(Op, tag=43):
    """Results got lost with their worker and are computed again; `KeysInMemory` follows."""

    keys: list[Key]


class PlaceData(Op, tag=44):
    """Where the client is to put data that it declared: to each of the addresses, directly."""

    keys: list[Key]
    addresses: list[str]


class DropData(Op, tag=45):
    """Retained data is not needed any more."""

    keys: list[Key]


class Locations(Op, tag=46):
    """The answer to `RequestLocations`: an empty list for a key that nobody holds now."""

    request: int
    keys: list[Key]
    holders: list[list[str]]
    """Data addresses."""


class QueryAnswered(Op, tag=47):
    """The answer to `Query`, `Restart` and the ops of coordination: plain data as MessagePack, or an error text."""

    request: int
    answer: bytes
    error: str = ""


class RunFinished(Op, tag=48):
    """One worker's answer to `RunFunction`, `RegisterPlugin` or `UnregisterPlugin`."""

    request: int
    worker: str
    """Its address; empty in the last answer, which has no result and only closes the list."""
    result: bytes = b""
    """Inline payload of the result, or as the payload of an `ErrorInfo` when `erred`."""
    erred: bool = False
    error: str = ""
    """Set when there is no result at all (the worker left)."""


class ClusterChanged(Op, tag=49):
    """The size of the cluster, whenever it changes."""

    workers: int
    threads: int
    memory_bytes: int
    """Sum of the memory limits; 0 when one is unlimited."""


# --- scheduler -> worker --------------------------------------------------------------------------------------------


class Peers(Op, tag=60):
    """Numbers that later ops use for workers, with their data addresses."""

    numbers: list[int]
    addresses: list[str]


class Inputs(Op, tag=61):
    """Inputs of tasks that follow, which the worker does not hold: their values, or who holds them."""

    keys: list[Key]
    sizes: list[int]
    holders: list[list[int]]
    """Worker numbers (see `Peers`); empty where the value is here."""
    lengths: list[int] = []
    """-1: not in `values`; an empty column: none is."""
    values: bytes = b""


class ComputeTasks(Op, tag=62):
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


class FreeKeys(Op, tag=63):
    """Results and replicas to drop."""

    keys: list[Key]


class RetractRuns(Op, tag=64):
    """Gives back runs that have not started; `RunsDropped` lists the ones given back, the others end as usual."""

    run_ids: list[int]


class CancelRuns(Op, tag=65):
    """Runs whose result nobody wants: not started ones are dropped, running ones are asked to stop and their results dropped."""

    run_ids: list[int]


class UpdateLocations(Op, tag=66):
    """The answer to `FetchFailed`: who holds the keys now; an empty list: wait, another list follows, or `CancelRuns`."""

    keys: list[Key]
    holders: list[list[int]]


class CallFunction(Op, tag=67):
    """`RunFunction` on its way to a worker or nanny; answered by `CallFinished`."""

    call: int
    function: bytes


class StopWorker(Op, tag=68):
    """The worker is to end in good order."""

    reason: str


class PlaceFile(Op, tag=69):
    """A file that a `SetUpPlugin` without content refers to by its name: a worker that joins gets all files first."""

    name: str
    content: bytes
    """Inline payload of (bytes, whether to import it)."""


class SetUpPlugin(Op, tag=70):
    """A plugin to set up, in place of an older one of that name; answered by `CallFinished`, unless `call` is 0."""

    call: int
    name: str
    content: bytes = b""
    """Inline payload of the plugin; empty: the file of that name is to be imported."""
    required: bool = False
    """The worker has just joined, and ends when this fails."""


class TearDownPlugin(Op, tag=71):
    """A plugin to tear down; answered by `CallFinished`, unless `call` is 0."""

    call: int
    name: str


# --- worker -> scheduler --------------------------------------------------------------------------------------------


class TasksFinished(Op, tag=80):
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


class TaskErred(Op, tag=81):
    """A run raised."""

    run_id: int
    error: ErrorInfo
    duration_us: int = 0


class RunsDropped(Op, tag=82):
    """Runs that were retracted before they started, or cancelled; they leave nothing behind."""

    run_ids: list[int]


class RunsExecuting(Op, tag=83):
    """Runs that have been executing for a while (sent with the metrics): they can't be retracted."""

    run_ids: list[int]


class DataAdded(Op, tag=84):
    """Data that was put on this worker, or fetched by it: it holds a replica from now on."""

    keys: list[Key]
    sizes: list[int]


class FetchFailed(Op, tag=85):
    """Inputs that none of the given holders has; answered by `UpdateLocations` or `CancelRuns`."""

    keys: list[Key]
    holder: int
    """The number of the worker that was asked last."""
    reachable: bool
    """True: it answered that it does not have them."""


class TaskBlocked(Op, tag=86):
    """A running task waits for a future: its thread's slot is free until `TaskResumed` (resources stay held)."""

    run_id: int


class TaskResumed(Op, tag=87):
    """The wait of a blocked task is over (or a seceded task rejoined)."""

    run_id: int


class TaskSeceded(Op, tag=88):
    """A running task left the pool: its slot and resources are free for good."""

    run_id: int


class WorkerMetrics(Op, tag=89):
    """How the worker does, about every second."""

    memory_bytes: int
    stored_keys: int
    stored_bytes: int
    cpu_percent: float
    queued: int
    executing: int
    compression: dict[str, int] = {}
    """Frames and bytes of its data links so far, by the names of `compression.Counters`; empty: none was large enough."""


class CallFinished(Op, tag=90):
    """The answer to `CallFunction`, `SetUpPlugin` and `TearDownPlugin`."""

    call: int
    result: bytes
    erred: bool


# --- nanny <-> scheduler --------------------------------------------------------------------------------------------


class WorkerStarted(Op, tag=100):
    """A nanny has started a worker process (which introduces itself in a moment)."""

    instance: bytes
    pid: int


class WorkerExited(Op, tag=101):
    """A worker process has ended: the one report that counts as a death."""

    instance: bytes
    exit_code: int
    """As the process gave it; -N when signal N ended it."""
    cause: str
    """For people: `killed by SIGKILL`, `exited with code 3`, `over its memory limit (...)`, `out of memory (kernel)`."""
    executing: list[int]
    """Run ids that the process was executing at that moment."""
    expected: bool = False
    """It was asked to end."""
    restarting: bool = False


class CheckWorker(Op, tag=102):
    """Asks a nanny about a worker that does not answer; answered by `WorkerChecked`, or `WorkerExited`."""

    instance: bytes


class WorkerChecked(Op, tag=103):
    """The process lives."""

    instance: bytes
    stopped: bool
    """Frozen by SIGSTOP or a debugger."""


class RestartWorkers(Op, tag=104):
    """The nanny is to end its worker processes now and start new ones; empty list: all."""

    instances: list[bytes] = []


class StopNanny(Op, tag=105):
    """The nanny is to end its workers and itself, in good order."""

    reason: str


# --- data links -----------------------------------------------------------------------------------------------------


class GetData(Op, tag=120):
    """Asks a worker for values of keys; answered by `DataSent`."""

    request: int
    keys: list[Key]
    seen_rate: int = 0
    """Bytes/s that answers on this link have come with: it is at least that fast."""


class DataSent(Op, tag=121):
    """Values: a payload header and a number of frames for each key; frames follow in order."""

    request: int
    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    missing: list[Key] = []
    """Keys that the worker does not hold."""
    failed: list[Key] = []
    """Keys whose values could not be serialized, with the reasons in `reasons`."""
    reasons: list[str] = []
    codecs: list[str] = []
    """Of each frame, empty for one that is as it was; an empty column: all are."""
    raw_sizes: list[int] = []
    """Bytes of each frame before compression, with `codecs`; 0 where it is as it was."""


class PutData(Op, tag=122):
    """Gives values to a worker; answered by `DataPut`."""

    request: int
    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    codecs: list[str] = []
    """Of each frame, empty for one that is as it was; an empty column: all are."""
    raw_sizes: list[int] = []
    """Bytes of each frame before compression, with `codecs`; 0 where it is as it was."""


class DataPut(Op, tag=123):
    """The worker holds the values of a `PutData`."""

    request: int
    error: str = ""


# --- unions ---------------------------------------------------------------------------------------------------------

ClientToScheduler: TypeAlias = (
    PutFunctions
    | SubmitTasks
    | DeclareData
    | PlacementFailed
    | WantKeys
    | ReleaseKeys
    | CancelTasks
    | RetryTasks
    | RequestLocations
    | ReportMissing
    | KeepTasks
    | Query
    | RunFunction
    | Restart
    | Shutdown
    | RegisterPlugin
    | UnregisterPlugin
    | AcquireLease
    | GiveUp
    | ReadLeases
    | CloseSemaphore
    | SetEvent
    | WaitEvent
    | SetValue
    | GetValue
    | DeleteValue
    | ListValues
    | PutItem
    | GetItems
    | Received
    | ReadQueue
    | CloseQueue
    | Goodbye
)
SchedulerToClient: TypeAlias = (
    KeysInMemory
    | KeysErred
    | KeysCancelled
    | KeysRecomputing
    | PlaceData
    | DropData
    | Locations
    | QueryAnswered
    | RunFinished
    | ClusterChanged
    | LogMessages
    | Goodbye
)
SchedulerToWorker: TypeAlias = (
    PutFunctions
    | Peers
    | Inputs
    | ComputeTasks
    | FreeKeys
    | RetractRuns
    | CancelRuns
    | UpdateLocations
    | CallFunction
    | PlaceFile
    | SetUpPlugin
    | TearDownPlugin
    | StopWorker
    | Goodbye
)
WorkerToScheduler: TypeAlias = (
    TasksFinished
    | TaskErred
    | RunsDropped
    | RunsExecuting
    | DataAdded
    | FetchFailed
    | TaskBlocked
    | TaskResumed
    | TaskSeceded
    | WorkerMetrics
    | CallFinished
    | LogMessages
    | Goodbye
)
NannyToScheduler: TypeAlias = WorkerStarted | WorkerExited | WorkerChecked | CallFinished | LogMessages | Goodbye
SchedulerToNanny: TypeAlias = CheckWorker | RestartWorkers | StopNanny | CallFunction | Goodbye
DataRequest: TypeAlias = GetData | PutData | Goodbye
DataReply: TypeAlias = DataSent | DataPut | Goodbye
