"""Every op of the protocol: a typed struct each, and one union per direction of each kind of link.

Ops are imperative requests (`ComputeTasks`) or past-tense reports (`TasksFinished`). An op is itself the input and the output of
the machines: there are no parallel event classes. Bulk ops are columns: parallel lists, one blob for a column of variable-size
values with a column of lengths beside it, and a flat list with a column of counts for a list per task. A column of counts or
lengths that is empty stands for zeros. On the wire an op is a MessagePack array whose first element is its tag; fields are
only ever appended, with defaults. `docs/wire.md` is generated from this package.

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

from zmqtasks.protocol.ops.base import (
    ErrorInfo,
    Goodbye,
    LogMessages,
    LogRecord,
    Op,
    PutFunctions,
    TaskOptions,
)
from zmqtasks.protocol.ops.clients import (
    CancelTasks,
    ClusterChanged,
    DeclareData,
    DropData,
    KeepTasks,
    KeysCancelled,
    KeysErred,
    KeysInMemory,
    KeysRecomputing,
    Locations,
    PlaceData,
    PlacementFailed,
    Query,
    QueryAnswered,
    ReleaseKeys,
    ReportMissing,
    RequestLocations,
    Restart,
    RetryTasks,
    RunFinished,
    RunFunction,
    Shutdown,
    SubmitTasks,
    WantKeys,
)
from zmqtasks.protocol.ops.coordination import (
    AcquireLease,
    CloseQueue,
    CloseSemaphore,
    DeleteValue,
    GetItems,
    GetValue,
    GiveUp,
    ListValues,
    PutItem,
    ReadLeases,
    ReadQueue,
    Received,
    SetEvent,
    SetValue,
    WaitEvent,
)
from zmqtasks.protocol.ops.data import (
    DataPut,
    DataSent,
    DropRequest,
    GetData,
    PutData,
)
from zmqtasks.protocol.ops.introductions import (
    ClientIntroduction,
    DataIntroduction,
    Introduction,
    NannyIntroduction,
    WorkerIntroduction,
)
from zmqtasks.protocol.ops.nannies import (
    CheckWorker,
    RestartWorkers,
    StopNanny,
    WorkerChecked,
    WorkerExited,
    WorkerStarted,
)
from zmqtasks.protocol.ops.plugins import (
    PlaceFile,
    RegisterPlugin,
    SetUpPlugin,
    TearDownPlugin,
    UnregisterPlugin,
)
from zmqtasks.protocol.ops.workers import (
    CallFinished,
    CallFunction,
    CancelRuns,
    ComputeTasks,
    DataAdded,
    FetchFailed,
    FreeKeys,
    Inputs,
    Peers,
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
    WorkerMetrics,
)

__all__ = [
    "PROTOCOL_VERSION",
    "AcquireLease",
    "CallFinished",
    "CallFunction",
    "CancelRuns",
    "CancelTasks",
    "CheckWorker",
    "ClientIntroduction",
    "ClientToScheduler",
    "CloseQueue",
    "CloseSemaphore",
    "ClusterChanged",
    "ComputeTasks",
    "DataAdded",
    "DataIntroduction",
    "DataPut",
    "DataReply",
    "DataRequest",
    "DataSent",
    "DeclareData",
    "DeleteValue",
    "DropData",
    "DropRequest",
    "ErrorInfo",
    "FetchFailed",
    "FreeKeys",
    "GetData",
    "GetItems",
    "GetValue",
    "GiveUp",
    "Goodbye",
    "Inputs",
    "Introduction",
    "KeepTasks",
    "KeysCancelled",
    "KeysErred",
    "KeysInMemory",
    "KeysRecomputing",
    "ListValues",
    "Locations",
    "LogMessages",
    "LogRecord",
    "NannyIntroduction",
    "NannyToScheduler",
    "Op",
    "Peers",
    "PlaceData",
    "PlaceFile",
    "PlacementFailed",
    "PutData",
    "PutFunctions",
    "PutItem",
    "Query",
    "QueryAnswered",
    "ReadLeases",
    "ReadQueue",
    "Received",
    "RegisterPlugin",
    "ReleaseKeys",
    "ReportMissing",
    "RequestLocations",
    "Restart",
    "RestartWorkers",
    "RetractRuns",
    "RetryTasks",
    "RunFinished",
    "RunFunction",
    "RunsDropped",
    "RunsExecuting",
    "SchedulerToClient",
    "SchedulerToNanny",
    "SchedulerToWorker",
    "SetEvent",
    "SetUpPlugin",
    "SetValue",
    "Shutdown",
    "StopNanny",
    "StopWorker",
    "SubmitTasks",
    "TaskBlocked",
    "TaskErred",
    "TaskOptions",
    "TaskResumed",
    "TaskSeceded",
    "TasksFinished",
    "TearDownPlugin",
    "UnregisterPlugin",
    "UpdateLocations",
    "WaitEvent",
    "WantKeys",
    "WorkerChecked",
    "WorkerExited",
    "WorkerIntroduction",
    "WorkerMetrics",
    "WorkerStarted",
    "WorkerToScheduler",
]

PROTOCOL_VERSION = 1

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
DataRequest: TypeAlias = GetData | PutData | DropRequest | Goodbye
DataReply: TypeAlias = DataSent | DataPut | Goodbye
