"""A dask graph on its way to the scheduler: what is needed of it, in dask's order, in windows of tasks, an op for many of them.

What dask calls a key stays on the client, except for the keys that futures are asked for by name: everything between has an
anonymous key, which costs nothing to write and can't meet a task of another graph. The scheduler gets functions, arguments and
keys; it learns nothing of dask. A task in between is released as soon as everything that needs it was submitted: from then on
it lives as long as it is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from dask._task_spec import (
    Alias,
    DataNode,
    DependenciesMapping,
    GraphNode,
    Task,
    convert_legacy_graph,
    resolve_aliases,
)
from dask.core import reverse_dict
from dask.order import order
from dask.utils import key_split

from zmqtasks.calls import SCALARS, CallEncoder
from zmqtasks.client import Client
from zmqtasks.errors import ConfigError
from zmqtasks.functions import PreparedFunction, by_name, call_function
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.integrations.dask.lowering import Lowered, Lowering
from zmqtasks.nodes.client.names import to_wire
from zmqtasks.nodes.client.node import PER_TASK_BYTES
from zmqtasks.nodes.client.state import CANCELLED, LOST, FutureState
from zmqtasks.protocol.ops import DeclareData, SubmitTasks, TaskOptions
from zmqtasks.protocol.references import KeyRef

WINDOW = 4_000
"""Tasks that are looked at together, to find those that can share an op. The bytes of so many are in memory at a time."""
INLINE_VALUES = 256
"""Values of a graph up to so many bytes are repeated in each task that needs them; larger ones are tasks of their own."""


class _Row(NamedTuple):
    """One task, encoded."""

    key: Any
    data: bytes
    inputs: Sequence[tuple[bool, Any]]
    """Keys of the graph (False), and keys of data on the wire (True)."""
    position: int


class _Batch(msgspec.Struct, gc=False):
    """Tasks that share an op."""

    prepared: PreparedFunction
    name: str
    options: TaskOptions
    named: bool
    references: dict[Key, None]
    rows: list[_Row]


class GraphSubmission:
    """Submits what `outputs` need of a graph; once.

    With `named`, the futures have the keys of the graph, and tasks with these keys that exist already are used.
    `options` gives the options of keys that have any, `default` those of the others.
    """

    def __init__(
        self,
        client: Client,
        graph: Mapping[Any, Any],
        outputs: Iterable[Any],
        *,
        named: bool,
        default: TaskOptions,
        options: Mapping[Any, TaskOptions],
    ) -> None:
        self._submitter = client._submitter
        self._node = client._node
        self._encoder = CallEncoder(self._node, self._submitter._new_key)
        self._named = named
        self._default = default
        self._options = options
        values = ((key, getattr(node, "value", node)) for key, node in graph.items())
        self._futures: dict[Any, Future[Any]] = {key: value for key, value in values if type(value) is Future}
        self._encoder.foreign.keys([future._state for future in self._futures.values()])
        for future in list(self._futures.values()):
            self._futures.setdefault(future.key, future)
        if any(not isinstance(node, GraphNode) for node in graph.values()):
            graph = _converted(graph)
        self._graph = graph
        self._outputs = dict.fromkeys(outputs)
        self._wire: dict[Any, Key] = {}
        """Keys that tasks can refer to: submitted, or known from elsewhere."""
        self._values: dict[Any, Any] = {}
        """Small values, to be written into the tasks that need them."""
        self._uses: Counter[Any] = Counter()
        self._prepared: dict[int, PreparedFunction | None] = {}
        self._unreleased: set[Any] = set()
        self._next_position = 0
        self._submitted = 0

    def run(self) -> dict[Any, Future[Any]]:
        """A future for each output. After an exception nothing of the graph is wanted any more."""
        self._node.check_usable()
        needed = self._needed()
        self._count_functions(needed)
        positions = order(needed) if len(needed) > 1 else dict.fromkeys(needed, 0)
        sequence = sorted(needed, key=positions.__getitem__)
        try:
            for start in range(0, len(sequence), WINDOW):
                self._submit_window(needed, sequence[start : start + WINDOW])
                if self._node.is_backlogged():
                    self._node.wait_backlog()
            return {key: self._futures[key] for key in self._outputs}
        finally:
            self._encoder.foreign.submitted()
            left = [self._wire[key] for key in self._unreleased]
            with self._node.lock:
                self._node.machine.release(left + self._encoder.keys)
                self._node.wake()

    # What is needed

    def _needed(self) -> dict[Any, GraphNode]:
        """The nodes that are to be submitted. Keys that exist already end the search."""
        with self._node.lock:
            self._node.machine.collect_dropped()
            names = {key for key in self._node.machine.states if type(key) is str}
        needed: dict[Any, GraphNode] = {}
        stack = list(self._outputs)
        graph = self._graph
        while stack:
            key = stack.pop()
            if key in needed or key in self._wire:
                continue
            if self._exists(key, names):
                continue
            node = graph.get(key)
            if node is None:
                raise KeyError(f"the graph has no key {key!r}, and there is no future of it")
            if type(node) is DataNode and type(node.value) is Future:
                self._futures[key] = node.value
                self._wire[key] = self._encoder.foreign.key(node.value._state)
                continue
            needed[key] = node
            stack.extend(node.dependencies)
        if any(type(node) is Alias for node in needed.values()):
            dependents = reverse_dict(DependenciesMapping(needed))
            needed = resolve_aliases(needed, set(self._outputs), dependents)
        for node in needed.values():
            self._uses.update(node.dependencies)
        return needed

    def _exists(self, key: Any, names: set[str]) -> bool:
        """Whether a task or data of this key is on the cluster; it is kept from now on."""
        future = self._futures.get(key)
        if future is None and (names or key not in self._graph):
            wire = to_wire(key)
            if wire in names or key not in self._graph:
                with self._node.lock:
                    state = self._node.machine.share(wire)
                future = None if state is None else Future(state)
        if future is None or future._state.status in (CANCELLED, LOST):
            return False
        self._futures[key] = future
        self._wire[key] = future._state.key
        return True

    def _count_functions(self, needed: Mapping[Any, GraphNode]) -> None:
        """Functions that are used once and go by value travel with the arguments: workers need not keep them."""
        counts = Counter(id(node.func) for node in needed.values() if isinstance(node, Task))
        for node in needed.values():
            if isinstance(node, Task) and counts[id(node.func)] == 1 and not by_name(node.func):
                self._prepared[id(node.func)] = None

    # Windows

    def _submit_window(self, needed: Mapping[Any, GraphNode], keys: Sequence[Any]) -> None:
        """Ops for these tasks: one for all that share function, name and options and don't need each other."""
        levels: dict[Any, int] = {}
        batches: dict[Any, _Batch] = {}
        for key in keys:
            node = needed[key]
            level = 1 + max((levels.get(need, -1) for need in node.dependencies), default=-1)
            if self._keep_value(key, node):
                continue
            levels[key] = level
            self._add(batches, level, key, node)
        for where in sorted(batches, key=lambda where: where[0]):  # stable: first come, first served
            self._send(batches[where])
        done = []
        for key in keys:
            for need in needed[key].dependencies:
                self._uses[need] -= 1
                if not self._uses[need] and need in self._unreleased:
                    self._unreleased.discard(need)
                    done.append(self._wire[need])
        with self._node.lock:
            if done:
                self._node.machine.release(done)
            self._node.wake()

    def _keep_value(self, key: Any, node: GraphNode) -> bool:
        """Whether a plain value needs no task: it is small, or bulky and goes to workers as data."""
        if type(node) is not DataNode or key in self._outputs:
            return False
        value = node.value
        if type(value) in SCALARS and not self._encoder.is_bulky(value):
            self._values[key] = value
            return True
        data = self._encoder.lift_bulky(value)
        if data is not None:
            self._wire[key] = data
            return True
        if self._uses[key] == 1 or len(self._encoder.encode_placed(value)) <= INLINE_VALUES:
            self._values[key] = value
            return True
        return False

    def _add(self, batches: dict[Any, _Batch], level: int, key: Any, node: GraphNode) -> None:
        inputs: dict[tuple[bool, Any], int] = {}
        noted = self._encoder.references
        self._encoder.references = {}
        try:
            lowered, data, kept = self._encode(node, inputs)
            prepared = self._prepare(lowered)
            if prepared is None:
                inputs.clear()
                lowered, data, kept = self._encode(node, inputs, as_argument=True)
                prepared = self._submitter.functions.prepare(call_function)
            references = self._encoder.references
        finally:
            self._encoder.references = noted
        options = self._options.get(key, self._default)
        name = key_split(key[0] if type(key) is tuple and key else key)
        named = self._named and key in self._outputs
        where = (level, prepared.digest, name, named, id(options), tuple(references))
        batch = batches.get(where)
        if batch is None:
            batch = batches[where] = _Batch(prepared, name, options, named, references, [])
        batch.rows.append(_Row(key, data, kept, self._next_position))
        self._next_position += 1

    def _encode(
        self, node: GraphNode, inputs: dict[tuple[bool, Any], int], as_argument: bool = False
    ) -> tuple[Lowered, bytes, list[tuple[bool, Any]]]:
        """The call, its bytes (none: exactly its inputs), and what its inputs are: graph keys, or wire keys of data."""
        lowered = self._lower(node, inputs, careful=bool(self._encoder.keys))
        data = self._bytes(lowered, inputs, as_argument)
        if len(data) > self._encoder.limit_bytes:
            inputs.clear()
            data = self._bytes(self._lower(node, inputs, careful=True), inputs, as_argument)
        return lowered, data, list(inputs)

    def _bytes(self, lowered: Lowered, inputs: Mapping[tuple[bool, Any], int], as_argument: bool) -> bytes:
        args = (lowered.function, *lowered.args) if as_argument else lowered.args
        if lowered.kwargs or len(args) != len(inputs):
            return self._encoder.encode_placed((args, lowered.kwargs))
        if all(type(arg) is KeyRef and arg.index == i for i, arg in enumerate(args)):
            return b""
        return self._encoder.encode_placed((args, lowered.kwargs))

    def _lower(self, node: GraphNode, inputs: dict[tuple[bool, Any], int], careful: bool) -> Lowered:
        encoder = self._encoder

        def place(what: tuple[bool, Any]) -> KeyRef:
            return KeyRef(inputs.setdefault(what, len(inputs)))

        def reference(key: Any) -> Any:
            return self._values[key] if key in self._values else place((False, key))

        def future(value: Future[Any]) -> KeyRef:
            return place((True, self._encoder.foreign.key(value._state)))

        def literal(value: Any) -> Any:
            if type(value) in SCALARS and not encoder.is_bulky(value):
                return value
            if careful or encoder.is_bulky(value):
                data = encoder.lift_bulky(value)
                if data is not None:
                    return place((True, data))
            return value

        return Lowering(reference, future, literal).lower(node)

    def _prepare(self, lowered: Lowered) -> PreparedFunction | None:
        """The function as one that the cluster knows by its digest; None when it is to travel with the arguments."""
        function = lowered.function
        number = id(function)
        if number not in self._prepared:
            prepared: PreparedFunction | None = self._submitter.functions.prepare(function)
            assert prepared is not None
            if prepared.holds_futures or len(prepared.code) > self._encoder.limit_bytes:
                prepared = None
            self._prepared[number] = prepared
        return self._prepared[number]

    # Ops

    def _send(self, batch: _Batch) -> None:
        node, rows = self._node, batch.rows
        deps: list[Key] = []
        counts: list[int] = []
        for row in rows:
            counts.append(len(row.inputs))
            deps += [what if is_data else self._wire[what] for is_data, what in row.inputs]
        op = SubmitTasks(
            function=batch.prepared.digest,
            name=batch.name,
            args=b"".join([row.data for row in rows]),
            args_lengths=[len(row.data) for row in rows] if any(row.data for row in rows) else [],
            dep_counts=counts if deps else [],
            deps=deps,
            references=list(batch.references),
            options=batch.options,
            order=[row.position - self._submitted for row in rows],
            reuse=batch.named,
        )
        self._submitted += len(rows)
        with node.lock:
            self._declare()
            machine = node.machine
            keys: Sequence[Key]
            if batch.named:
                keys = [to_wire(row.key) for row in rows]
                op = msgspec.structs.replace(op, keys=list(keys))
            else:
                first = machine.take_keys(len(rows))
                keys = range(first, first + len(rows))
                op = msgspec.structs.replace(op, first_key=first, count=len(rows))
            self._wire.update(zip((row.key for row in rows), keys, strict=True))
            states = {
                row.key: FutureState(key, node, batch.name)
                for row, key in zip(rows, keys, strict=True)
                if row.key in self._outputs
            }
            machine.submit_graph(op, batch.prepared.code, list(states.values()))
            node.count_bytes(PER_TASK_BYTES * len(rows) + len(op.args))
        self._futures.update((key, Future(state)) for key, state in states.items())
        self._unreleased.update(row.key for row in rows if row.key not in states)

    def _declare(self) -> None:
        keys, payloads = self._encoder.take_lifted()
        if keys:
            op = DeclareData(keys, [payload.nbytes for payload in payloads], retained=True)
            self._node.machine.declare(op, payloads)


def _converted(graph: Mapping[Any, Any]) -> Mapping[Any, GraphNode]:
    """A graph of tuples as one of nodes. dask takes a key whose value looks like itself for an alias, and drops it."""
    nodes: dict[Any, GraphNode] = convert_legacy_graph(graph)
    for key in graph.keys() - nodes.keys():
        if type(graph[key]) is type(key) and graph[key] == key:
            nodes[key] = DataNode(key, key)
    return nodes


def checked_graph(graph: Any) -> Mapping[Any, Any]:
    """The mapping of an expression, a collection or a mapping itself."""
    if hasattr(graph, "__dask_graph__"):
        graph = graph.__dask_graph__()
    if not isinstance(graph, Mapping):
        raise ConfigError(f"{type(graph).__name__} is no graph: give a mapping of keys to tasks, or an expression")
    return graph if isinstance(graph, dict) else dict(graph)
