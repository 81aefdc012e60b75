"""Between clients and the scheduler: tasks, results, the cluster."""

from __future__ import annotations

from zmqtasks.ids import Key
from zmqtasks.protocol.ops.base import ErrorInfo, Op, TaskOptions


class SubmitTasks(Op, frozen=True, tag=20):
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


class DeclareData(Op, frozen=True, tag=21):
    """Data that the client has; the scheduler answers with `PlaceData`."""

    keys: list[Key]
    sizes: list[int]
    workers: list[str] = []
    """Names, addresses or hosts to choose from; empty: any."""
    copies: int = 1
    """On how many workers; -1: on all that are allowed."""
    retained: bool = False
    """The client keeps the bytes until `DropData` and can send them again."""


class PlacementFailed(Op, frozen=True, tag=22):
    """The client could not put data on a worker."""

    keys: list[Key]
    address: str
    reason: str = ""


class WantKeys(Op, frozen=True, tag=23):
    """The client holds futures of keys that it did not submit itself."""

    keys: list[Key]


class ReleaseKeys(Op, frozen=True, tag=24):
    """The client no longer holds a future of these keys."""

    keys: list[Key]


class CancelTasks(Op, frozen=True, tag=25):
    """Ends unfinished tasks and what depends on them; every client that wants one hears `KeysCancelled`.

    Without `force`, keys that another client wants too are only released for this client.
    """

    keys: list[Key]
    force: bool = False
    reason: str = ""


class RetryTasks(Op, frozen=True, tag=26):
    """Failed tasks (and the failed tasks that they depend on) are tried again."""

    keys: list[Key]


class RequestLocations(Op, frozen=True, tag=27):
    """Asks who holds keys that are in memory; answered by `Locations`."""

    request: int
    keys: list[Key]


class ReportMissing(Op, frozen=True, tag=28):
    """A worker that should hold keys did not have them, or could not be reached."""

    keys: list[Key]
    address: str
    reachable: bool
    """True: the worker answered that it does not have them."""


class KeepTasks(Op, frozen=True, tag=29):
    """Fire and forget: these tasks run to their end even when no client wants them."""

    keys: list[Key]


class Query(Op, frozen=True, tag=30):
    """A question about the cluster, answered by `QueryAnswered`; see `scheduler.queries` for the list."""

    request: int
    what: str
    keys: list[Key] = []
    workers: list[str] = []


class RunFunction(Op, frozen=True, tag=31):
    """Calls a function once on each worker (or nanny), outside of any task; answered by one `RunFinished` for each worker."""

    request: int
    function: bytes
    """Inline payload of (function, args, kwargs)."""
    workers: list[str] = []
    """Empty: all."""
    on_nanny: bool = False


class Restart(Op, frozen=True, tag=32):
    """Forgets all tasks and data and restarts all worker processes; answered by `QueryAnswered`."""

    request: int
    timeout_s: float = 60.0


class Shutdown(Op, frozen=True, tag=33):
    """Ends workers, nannies and scheduler."""

    reason: str = ""


class KeysInMemory(Op, frozen=True, tag=40):
    """Results exist; those with a length >= 0 are in `values`, the others are to be fetched (`RequestLocations`)."""

    keys: list[Key]
    sizes: list[int]
    lengths: list[int]
    """-1: not in `values`."""
    values: bytes = b""


class KeysErred(Op, frozen=True, tag=41):
    """Tasks failed, all for the same reason."""

    keys: list[Key]
    error: ErrorInfo


class KeysCancelled(Op, frozen=True, tag=42):
    """Futures that will not come true: cancelled, or their data is gone (`lost`)."""

    keys: list[Key]
    reason: str
    kind: str = "CancelledError"
    """The name of a class in `zmqtasks.errors`."""


class KeysRecomputing(Op, frozen=True, tag=43):
    """Results got lost with their worker and are computed again; `KeysInMemory` follows."""

    keys: list[Key]


class PlaceData(Op, frozen=True, tag=44):
    """Where the client is to put data that it declared: to each of the addresses, directly."""

    keys: list[Key]
    addresses: list[str]


class DropData(Op, frozen=True, tag=45):
    """Retained data is not needed any more."""

    keys: list[Key]


class Locations(Op, frozen=True, tag=46):
    """The answer to `RequestLocations`: an empty list for a key that nobody holds now."""

    request: int
    keys: list[Key]
    holders: list[list[str]]
    """Data addresses."""


class QueryAnswered(Op, frozen=True, tag=47):
    """The answer to `Query`, `Restart` and the ops of coordination: plain data as MessagePack, or an error text."""

    request: int
    answer: bytes
    error: str = ""


class RunFinished(Op, frozen=True, tag=48):
    """One worker's answer to `RunFunction`, `RegisterPlugin` or `UnregisterPlugin`."""

    request: int
    worker: str
    """Its address; empty in the last answer, which has no result and only closes the list."""
    result: bytes = b""
    """Inline payload of the result, or as the payload of an `ErrorInfo` when `erred`."""
    erred: bool = False
    error: str = ""
    """Set when there is no result at all (the worker left)."""


class ClusterChanged(Op, frozen=True, tag=49):
    """The size of the cluster, whenever it changes."""

    workers: int
    threads: int
    memory_bytes: int
    """Sum of the memory limits; 0 when one is unlimited."""
