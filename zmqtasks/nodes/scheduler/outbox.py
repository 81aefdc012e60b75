"""What goes out to a peer with the next flush, collected in columns.

Handlers append to lists; `take` makes ops of them, once per peer and flush. So the cost of an op is paid per batch, not per
task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from zmqtasks.ids import Key
from zmqtasks.protocol.ops import (
    ComputeTasks,
    FreeKeys,
    Inputs,
    KeysInMemory,
    Op,
    Peers,
    PutFunctions,
)

if TYPE_CHECKING:
    from zmqtasks.nodes.scheduler.state import FunctionRecord, TaskSpec, TaskState, WorkerState


FREE_AT_ONCE = 256
"""So many values to drop are worth a message of their own; fewer wait for one that goes anyway, 20 ms at most: a message wakes the
worker in the middle of whatever it does (`bench.tasks latency`)."""
FREE_AT_ONCE_BYTES = 1 << 20
"""So many bytes are worth one too: who has lent or stored them can use that memory, still warm, for what comes next."""
_NOTHING: list[Any] = []
"""Stands for lists of an outbox at rest; nothing is ever added to it."""


class Outbox:
    """What is common to both: it enters itself in the list of those with something to send."""

    __slots__ = ("_dirty", "marked", "session")

    def __init__(self, session: bytes, dirty: list[Outbox]) -> None:
        self.session = session
        self.marked = False
        self._dirty = dirty

    def mark(self) -> None:
        """There is something to send; called when `marked` is not set."""
        self.marked = True
        self._dirty.append(self)
        self._open()

    def _open(self) -> None:
        """Makes the lists that `take` gives away. An outbox at rest owns none: small objects made at a peak and kept afterwards
        would hold whole arenas of the allocator (`bench.tasks zero`, memory after rounds)."""

    def take(self) -> list[Op]:
        """All that was added since the last call."""
        return []


class ClientOutbox(Outbox):
    """Ops for a client, in order; results that finish one after another share one op."""

    __slots__ = ("_keys", "_lengths", "_ops", "_sizes", "_values")

    def __init__(self, session: bytes, dirty: list[Outbox]) -> None:
        super().__init__(session, dirty)
        self._ops: list[Op] = _NOTHING
        self._keys: list[Key] = _NOTHING

    def _open(self) -> None:
        self._ops = []
        self._open_results()

    def _open_results(self) -> None:
        self._keys = []
        self._sizes: list[int] = []
        self._lengths: list[int] = []
        self._values: list[bytes] = []

    def add(self, op: Op) -> None:
        """Appends an op."""
        if not self.marked:
            self.mark()
        self._seal()
        self._ops.append(op)

    def add_result(self, key: Key, size: int, value: bytes | None) -> None:
        """Tells of one result; with its value when that is small."""
        if not self.marked:
            self.mark()
        self._keys.append(key)
        self._sizes.append(size)
        if value is None:
            self._lengths.append(-1)
        else:
            self._lengths.append(len(value))
            self._values.append(value)

    def add_results(self, keys: list[Key], sizes: list[int], lengths: list[int], values: bytes) -> None:
        """`add_result` for many; lengths of -1 for those whose value does not come along, `values` has the others in order."""
        if not self.marked:
            self.mark()
        self._keys += keys
        self._sizes += sizes
        self._lengths += lengths
        self._values.append(values)

    def _seal(self) -> None:
        if self._keys:
            self._ops.append(KeysInMemory(self._keys, self._sizes, self._lengths, b"".join(self._values)))
            self._open_results()

    def take(self) -> list[Op]:
        """All that was added since the last call."""
        self._seal()
        ops, self._ops = self._ops, _NOTHING
        self._keys = self._sizes = self._lengths = self._values = _NOTHING
        self.marked = False
        return ops


class _ComputeColumns:
    __slots__ = ("args", "dep_counts", "deps", "has_args", "keys", "priorities", "run_ids")

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.run_ids: list[int] = []
        self.priorities: list[int] = []
        self.args: list[bytes] = []
        self.dep_counts: list[int] = []
        self.deps: list[Key] = []
        self.has_args = False


class WorkerOutbox(Outbox):
    """Ops for a worker: what is to be dropped, then single ops in order, then new tasks with their functions and inputs."""

    __slots__ = ("_compute", "_functions", "_inputs", "_lazy", "_ops", "_peers", "free", "free_bytes")

    def __init__(self, session: bytes, dirty: list[Outbox], lazy: list[WorkerOutbox]) -> None:
        super().__init__(session, dirty)
        self._lazy = lazy
        self.free: list[Key] = _NOTHING
        self.free_bytes = 0
        self._functions: list[FunctionRecord] = []
        self._peers: list[WorkerState] = []

    def _open(self) -> None:
        self._ops: list[Op] = []
        self._inputs: dict[Key, TaskState] = {}
        self._compute: dict[TaskSpec, _ComputeColumns] = {}

    def add(self, op: Op) -> None:
        """Appends an op."""
        if not self.marked:
            self.mark()
        self._ops.append(op)

    def drop(self, keys: list[Key], size_bytes: int) -> None:
        """The worker is to drop values: with the next message to it, or when the node collects what is left (`lazy`)."""
        if not self.free:
            self.free = []
            self.free_bytes = 0
            self._lazy.append(self)
        self.free += keys
        self.free_bytes += size_bytes
        if (self.free_bytes >= FREE_AT_ONCE_BYTES or len(self.free) >= FREE_AT_ONCE) and not self.marked:
            self.mark()

    def drop_now(self) -> None:
        """Values to drop do not wait for another message."""
        if self.free and not self.marked:
            self.mark()

    def add_function(self, function: FunctionRecord) -> None:
        """The worker does not know this function yet."""
        if not self.marked:
            self.mark()
        self._functions.append(function)

    def add_peer(self, worker: WorkerState) -> None:
        """The worker does not know the address of this peer yet."""
        if not self.marked:
            self.mark()
        self._peers.append(worker)

    def add_inputs(self, inputs: Iterable[TaskState]) -> None:
        """Inputs of tasks that are sent with this flush, which the worker does not hold."""
        if not self.marked:
            self.mark()
        self._inputs.update([(ts.key, ts) for ts in inputs])

    def add_task(self, ts: TaskState, spec: TaskSpec) -> None:
        """A task to run, with the run id in its record."""
        if not self.marked:
            self.mark()
        columns = self._compute.get(spec)
        if columns is None:
            columns = self._compute[spec] = _ComputeColumns()
        columns.keys.append(ts.key)
        columns.run_ids.append(ts.run_id)
        columns.priorities.append(ts.priority)
        columns.args.append(ts.args)
        if ts.args:
            columns.has_args = True
        deps = ts.deps
        columns.dep_counts.append(len(deps))
        if deps:
            columns.deps.extend([dep.key for dep in deps])

    def add_alike(self, tasks: Sequence[TaskState], spec: TaskSpec) -> None:
        """`add_task` for each of `tasks`; one of the same spec was added before."""
        columns = self._compute[spec]
        columns.keys += [ts.key for ts in tasks]
        columns.run_ids += [ts.run_id for ts in tasks]
        columns.priorities += [ts.priority for ts in tasks]
        args = [ts.args for ts in tasks]
        columns.args += args
        columns.dep_counts += [len(ts.deps) for ts in tasks]
        columns.deps += [dep.key for ts in tasks for dep in ts.deps]
        columns.has_args = columns.has_args or any(args)

    def take(self) -> list[Op]:
        """All that was added since the last call."""
        ops: list[Op] = []
        if self.free:
            ops.append(FreeKeys(self.free))
            self.free = _NOTHING
            self.free_bytes = 0
        ops += self._ops
        if self._functions:
            ops.append(PutFunctions([f.digest for f in self._functions], [f.code for f in self._functions]))
            self._functions = []
        if self._peers:
            ops.append(Peers([w.number for w in self._peers], [w.address for w in self._peers]))
            self._peers = []
        if self._inputs:
            ops.append(_inputs_op(list(self._inputs.values())))
        ops += [_compute_op(spec, columns) for spec, columns in self._compute.items()]
        del self._ops, self._inputs, self._compute
        self.marked = False
        return ops


def _inputs_op(tasks: Sequence[TaskState]) -> Inputs:
    inline = [ts.inline for ts in tasks]
    return Inputs(
        keys=[ts.key for ts in tasks],
        sizes=[ts.size for ts in tasks],
        holders=[[] if ts.inline is not None else [w.number for w in ts.holders()] for ts in tasks],
        lengths=[-1 if value is None else len(value) for value in inline],
        values=b"".join([value for value in inline if value is not None]),
    )


def _compute_op(spec: TaskSpec, columns: _ComputeColumns) -> ComputeTasks:
    return ComputeTasks(
        function=spec.function.digest,
        name=spec.name,
        keys=columns.keys,
        run_ids=columns.run_ids,
        priorities=columns.priorities,
        args=b"".join(columns.args) if columns.has_args else b"",
        args_lengths=[len(a) for a in columns.args] if columns.has_args else [],
        dep_counts=columns.dep_counts if columns.deps else [],
        deps=columns.deps,
        resources=spec.options.resources,
        actor=spec.options.actor,
    )
