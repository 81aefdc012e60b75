"""What the scheduler knows: records of tasks, functions, workers, nannies and clients.

Records are plain data; the rules are in the modules beside this one. `TaskState` exists once per key, a million times in a big
graph: it is a `msgspec.Struct` without garbage collector tracking (0.2 us to make, 8 bytes a field), and whoever forgets a
task cuts its links, so that nothing circular is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import IntEnum

import msgspec

from zmqtasks.config import Config
from zmqtasks.ids import Key, first_run_id, format_key
from zmqtasks.nodes.scheduler.outbox import ClientOutbox, Outbox, WorkerOutbox
from zmqtasks.nodes.scheduler.queues import Bucket, ReadyQueue
from zmqtasks.protocol.ops import ErrorInfo, TaskOptions


class State(IntEnum):
    """Where a task is in its life; see `transitions` for the legal moves."""

    RELEASED = 0
    """Known, because something may need it again, but neither planned nor held."""
    WAITING = 1
    """For inputs; data: for its bytes."""
    READY = 2
    """All inputs are in memory; in a queue of the scheduler."""
    PROCESSING = 3
    """Given to a worker."""
    MEMORY = 4
    """At least one worker holds the result."""
    ERRED = 5
    FORGOTTEN = 6
    """The record is out of use."""


RELEASED, WAITING, READY, PROCESSING, MEMORY, ERRED, FORGOTTEN = State

UNKNOWN_DURATION_S = -1.0
MIN_ESTIMATE_S = 2.5e-6
"""What a task costs a worker, whatever it does: counted as more, the worker would run dry while the scheduler is busy, and `map`
take longer."""


class FunctionRecord(msgspec.Struct, gc=False, eq=False):
    """A function, known by its digest: the bytes to send, and how long its tasks take."""

    digest: bytes
    code: bytes
    duration_s: float = UNKNOWN_DURATION_S
    """Running average over its tasks."""
    spec: TaskSpec | None = None
    """The spec used last, which the next op most often uses too."""


class TaskSpec(msgspec.Struct, gc=False, eq=False):
    """What tasks of one submission share."""

    function: FunctionRecord
    name: str
    options: TaskOptions
    bucket: Bucket | None = None
    """For tasks with restrictions or resources; None: any worker will do."""


class DataInfo(msgspec.Struct, gc=False, eq=False):
    """For a key whose value a client gave."""

    client: ClientState
    retained: bool
    workers: list[str]
    copies: int
    pending: bool = True
    """No worker has been named to the client yet."""
    targets: tuple[WorkerState, ...] = ()
    """Where the client was told to put it."""
    avoided: tuple[WorkerState, ...] = ()
    """Where the client could not put it."""


class RareInfo(msgspec.Struct, gc=False, eq=False):
    """What few tasks have; kept apart to keep `TaskState` small."""

    deaths: int = 0
    """Workers that died while executing this task."""
    attempts_erred: int = 0
    references: tuple[TaskState, ...] = ()
    """Tasks whose futures travel inside the arguments: held until this task is done."""
    contains: tuple[TaskState, ...] = ()
    """Tasks whose futures are inside the result: held as long as the result is."""
    data: DataInfo | None = None
    error: ErrorInfo | None = None
    home: WorkerState | None = None
    """Of an actor: the worker that has it, or had it. Of a call of one: where it was sent."""


class TaskState(msgspec.Struct, gc=False, eq=False):
    """One task, or one piece of data."""

    key: Key
    spec: TaskSpec | None
    """None for data."""
    state: State
    priority: int
    args: bytes = b""
    deps: tuple[TaskState, ...] = ()
    wanted_by: ClientState | set[ClientState] | None = None
    waiting_on: int = 0
    """Inputs that are not in memory yet."""
    recount: bool = False
    """Inputs may list it as a waiter twice (it was stopped or failed while it waited): count anew instead of down."""
    waiters: list[TaskState] | None = None
    """Tasks that wait for this one; may have stale entries, which are no longer in WAITING."""
    dependents: int = 0
    """Tasks not forgotten that have this one as an input: its spec is kept for them."""
    holds: int = 0
    """Reasons to keep the value: unfinished dependents, references to it."""
    who_has: WorkerState | set[WorkerState] | None = None
    worker: WorkerState | None = None
    """Where it is processed."""
    run_id: int = 0
    estimate_s: float = 0.0
    size: int = 0
    inline: bytes | None = None
    """A small result, kept for tasks that can take it along as an input."""
    rare: RareInfo | None = None

    @property
    def wanted(self) -> bool:
        """Whether a client holds a future."""
        return self.wanted_by is not None

    @property
    def name(self) -> str:
        """The key as people see it."""
        return format_key(self.key, self.spec.name if self.spec is not None else "data")

    def wanters(self) -> Iterator[ClientState]:
        """The clients that hold futures."""
        if isinstance(self.wanted_by, set):
            yield from self.wanted_by
        elif self.wanted_by is not None:
            yield self.wanted_by

    def holders(self) -> Iterator[WorkerState]:
        """The workers that hold the value."""
        if isinstance(self.who_has, set):
            yield from self.who_has
        elif self.who_has is not None:
            yield self.who_has

    def held_by(self, worker: WorkerState) -> bool:
        """Whether `worker` holds the value."""
        return self.who_has is worker or (isinstance(self.who_has, set) and worker in self.who_has)

    def extra(self) -> RareInfo:
        """The record of rare facts, made when first needed."""
        if self.rare is None:
            self.rare = RareInfo()
        return self.rare


class ClientState:
    """A client session."""

    def __init__(
        self, session: bytes, number: int, name: str, host: str, pid: int, dirty: list[Outbox], worker: bytes = b""
    ) -> None:
        self.session = session
        self.number = number
        self.name = name
        self.host = host
        self.pid = pid
        self.worker = worker
        """Instance of the worker in whose process it lives, if it does."""
        self.outbox = ClientOutbox(session, dirty)
        self.functions: set[bytes] = set()
        """Digests of those that it has sent."""
        self.congested = False
        """It reads slowly: only notices of results go to it, no values."""
        self.lost_at: float | None = None


class NannyState:
    """A nanny session."""

    def __init__(self, session: bytes, instance: bytes, name: str, host: str, pid: int, dirty: list[Outbox]) -> None:
        self.session = session
        self.instance = instance
        self.name = name
        self.host = host
        self.pid = pid
        self.outbox = WorkerOutbox(session, dirty, [])
        self.lost_at: float | None = None


class WorkerState:
    """A worker session, and what the scheduler has given it."""

    def __init__(
        self,
        session: bytes,
        instance: bytes,
        number: int,
        name: str,
        host: str,
        address: str,
        nthreads: int,
        dirty: list[Outbox],
        lazy: list[WorkerOutbox],
        memory_limit_bytes: int = 0,
        resources: dict[str, float] | None = None,
        nanny: bytes = b"",
        pid: int = 0,
    ) -> None:
        self.session = session
        self.instance = instance
        self.number = number
        self.name = name
        self.host = host
        self.address = address
        self.nthreads = nthreads
        self.memory_limit_bytes = memory_limit_bytes
        self.resources = dict(resources or {})
        self.available = dict(self.resources)
        self.nanny = nanny
        self.pid = pid
        self.outbox = WorkerOutbox(session, dirty, lazy)
        self.processing: dict[int, TaskState | None] = {}
        """Runs that it has not answered; None where the result is not wanted any more."""
        self.abandoned: dict[int, Key] = {}
        """The keys of runs in `processing` whose result is not wanted any more."""
        self.load_s = 0.0
        """Estimated work in `processing`."""
        self.held: dict[int, Bucket] = {}
        """Runs that hold resources."""
        self.parked: dict[int, bool] = {}
        """Runs whose threads are free for others: blocked (True) or seceded (False)."""
        self.executing: set[int] = set()
        """Runs that it reported as executing for a while."""
        self.retracting: dict[int, float] = {}
        """Runs asked back, and until when the answer may take."""
        self.queue = ReadyQueue()
        """Ready tasks that would best run here, because their inputs are."""
        self.functions: set[bytes] = set()
        self.known_peers: set[int] = set()
        self.stored_bytes = 0
        self.stored_keys = 0
        self.lost_at: float | None = None
        self.last_progress = 0.0
        self.memory_bytes = 0
        self.cpu_percent = 0.0
        self.compression: dict[str, int] = {}
        self.actors = 0
        """Actors that live on it."""
        self.leaving = False
        self.preparing: dict[int, str] = {}
        """Plugins that it has to set up before its first task: titles by the numbers of calls (see `plugins`)."""

    @property
    def busy(self) -> int:
        """Runs given to it that take part in the use of its threads."""
        return len(self.processing) - len(self.parked)

    @property
    def usable(self) -> bool:
        """Whether it may be given work now."""
        return self.lost_at is None and not self.leaving and not self.preparing


class SchedulerState:
    """All that one scheduler knows; shared by the modules of its machine."""

    def __init__(self, *, epoch: int, config: Config) -> None:
        self.config = config
        self.epoch = epoch
        self.tasks: dict[Key, TaskState] = {}
        self.functions: dict[bytes, FunctionRecord] = {}
        self.workers: dict[bytes, WorkerState] = {}
        """By session."""
        self.worker_numbers: dict[int, WorkerState] = {}
        self.worker_instances: dict[bytes, WorkerState] = {}
        self.worker_addresses: dict[str, WorkerState] = {}
        self.nannies: dict[bytes, NannyState] = {}
        """By instance."""
        self.clients: dict[bytes, ClientState] = {}
        """By session."""
        self.next_run_id = first_run_id(epoch) + 1
        self.next_priority = 0
        self.next_worker_number = 1
        self.next_client_number = 1
        self.events: deque[tuple[float, str, str]] = deque(maxlen=10_000)
        """Unusual things that happened: (when, key or node, what); the stories of tasks are told from it."""
        self.counters = {"submitted": 0, "finished": 0, "erred": 0, "recomputed": 0, "retracted": 0, "worker_deaths": 0}
        self.inline_bytes = 0
        """Sum of the small results kept in task records."""
        self.dirty: list[Outbox] = []
        """Those with something to send."""
        self.lazy: list[WorkerOutbox] = []
        """Workers that are to drop values, when there is nothing else to tell them either."""
        self.lazy_until: float | None = None
        """When they are told at the latest."""
        self.lost: dict[WorkerState | ClientState | NannyState, None] = {}
        """Members whose links are broken."""
        self.retracting: dict[WorkerState, None] = {}
        """Workers that were asked to give back runs."""
        self.now = 0.0

    def note(self, about: str, what: str) -> None:
        """Keeps an unusual event for stories."""
        self.events.append((self.now, about, what))

    def story(self, key: Key, name: str) -> list[str]:
        """What is remembered of a task."""
        names = {str(key), name}
        return [f"{when:.6f} {about}: {what}" for when, about, what in self.events if about in names]
