"""From calls to tasks: makes the ops and records of `submit`, `map` and graphs, in the caller's thread, and hands them over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import msgspec

from zmqtasks.calls import Args, CallEncoder, Kwargs, encode_simple
from zmqtasks.functions import FunctionCache, PreparedFunction, call_function, digest_of
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.machine import key_conflict
from zmqtasks.nodes.client.names import to_wire
from zmqtasks.nodes.client.node import PER_TASK_BYTES, ClientNode
from zmqtasks.nodes.client.state import FutureState
from zmqtasks.protocol.ops import DeclareData, SubmitTasks, TaskOptions
from zmqtasks.protocol.payload import PICKLE_HEADER, Payload

FIRST_BATCH = 250
"""Tasks in the first op of a `map`: workers begin with these while the next op is being made."""


class Submitter:
    """Submits tasks for one client node; for any thread."""

    def __init__(self, node: ClientNode) -> None:
        self.node = node
        self.functions = FunctionCache()

    def submit(
        self, function: Any, args: Args, kwargs: Kwargs, options: TaskOptions, key: Key | None, name: str, pure: bool
    ) -> Future[Any]:
        """One task; `key` None: anonymous, or made of the content if `pure`."""
        node = self.node
        node.check_usable()
        prepared = self.functions.prepare(function)
        limit = node.config.implicit_data_bytes
        if key is None and not pure and not prepared.holds_futures and len(prepared.code) <= limit:
            simple = encode_simple(args, kwargs, limit, node)
            if simple is not None:
                return self._submit_simple(prepared, *simple, options, name or prepared.name)
        encoder = CallEncoder(node, _content_key if pure else self._new_key)
        if prepared.holds_futures or len(prepared.code) > limit:
            prepared, args = self._as_argument(prepared, function, encoder), (function, *args)
        data, inputs = encoder.encode(args, kwargs)
        name = name or prepared.name
        columns = _Columns(
            prepared, name, options, [data] if data else [], [inputs] if inputs else [], encoder.references
        )
        if pure and key is None:
            key = f"{name}-{_spec(prepared, data, inputs).hex()}"
        if key is not None:
            future = self._submit_named(columns, encoder, [key])[0]
            encoder.foreign.submitted()
            return future
        with node.lock:
            first = node.machine.take_keys(1)
            state = FutureState(first, node, name)
            self._declare(encoder)
            node.machine.submit(columns.op(first, 1), prepared.code, (state,))
            if encoder.keys:
                node.machine.release(encoder.keys)
            node.count_bytes(PER_TASK_BYTES + len(data))
            node.wake()
        encoder.foreign.submitted()
        if node.is_backlogged():
            node.wait_backlog()
        return Future(state)

    def _submit_simple(
        self, prepared: PreparedFunction, data: bytes, inputs: Sequence[Key], options: TaskOptions, name: str
    ) -> Future[Any]:
        """One anonymous task with nothing lifted: the way of most, in as few steps as can be."""
        node = self.node
        lengths = [len(data)] if data else []
        counts = [len(inputs)] if inputs else []
        with node.lock:
            machine = node.machine
            first = machine.take_keys(1)
            state = FutureState(first, node, name)
            op = SubmitTasks(prepared.digest, name, first, 1, [], data, lengths, counts, list(inputs), options=options)
            machine.submit(op, prepared.code, (state,))
            node.count_bytes(PER_TASK_BYTES + len(data))
            node.wake()
        if node.is_backlogged():
            node.wait_backlog()
        return Future(state)

    def call(self, actor: Key, name: str, args: Args, kwargs: Kwargs) -> FutureState:
        """A call of an actor's method: a task that runs where the actor is, which is its last input."""
        from zmqtasks.actors import CALLS_ACTOR, call_method

        node = self.node
        node.check_usable()
        prepared = self.functions.prepare(call_method)
        encoder = CallEncoder(node, self._new_key)
        data, inputs = encoder.encode(args, kwargs)
        options = TaskOptions(actor=CALLS_ACTOR)
        columns = _Columns(prepared, name, options, [data], [[*inputs, actor]], encoder.references)
        with node.lock:
            first = node.machine.take_keys(1)
            state = FutureState(first, node, name)
            self._declare(encoder)
            node.machine.submit(columns.op(first, 1), prepared.code, (state,))
            if encoder.keys:
                node.machine.release(encoder.keys)
            node.count_bytes(PER_TASK_BYTES + len(data))
            node.wake()
        encoder.foreign.submitted()
        if node.is_backlogged():
            node.wait_backlog()
        return state

    def map(
        self,
        function: Any,
        columns: Sequence[Sequence[Any]],
        kwargs: Kwargs,
        options: TaskOptions,
        keys: Sequence[Key] | None,
        name: str,
        pure: bool,
        batch_size: int | None,
    ) -> list[Future[Any]]:
        """Many tasks of one function; an op for each batch of them."""
        node = self.node
        node.check_usable()
        prepared = self.functions.prepare(function)
        encoder = CallEncoder(node, _content_key if pure else self._new_key)
        count = len(columns[0])
        if prepared.holds_futures or len(prepared.code) > node.config.implicit_data_bytes:
            prepared = self._as_argument(prepared, function, encoder)
            columns = [[function] * count, *columns]
        name = name or prepared.name
        futures: list[Future[Any]] = []
        try:
            for start, stop in _batches(count, batch_size or node.config.submit_batch):
                part = columns if start == 0 and stop == count else [column[start:stop] for column in columns]
                data, inputs = encoder.encode_columns(part, kwargs)
                batch = _Columns(prepared, name, options, data, inputs, encoder.references)
                if keys is not None or pure:
                    named = keys[start:stop] if keys is not None else batch.content_keys(stop - start)
                    futures += self._submit_named(batch, encoder, named, release=False)
                else:
                    futures += self._submit_batch(batch, encoder, stop - start)
                if node.is_backlogged():
                    node.wait_backlog()
        finally:
            encoder.foreign.submitted()
            if encoder.keys:
                with node.lock:
                    node.machine.release(encoder.keys)
                    node.wake()
        return futures

    def _submit_batch(self, batch: _Columns, encoder: CallEncoder, count: int) -> Iterator[Future[Any]]:
        node = self.node
        with node.lock:
            first = node.machine.take_keys(count)
        op = batch.op(first, count)
        states = list(map(FutureState, range(first, first + count), repeat(node), repeat(batch.name)))
        futures: list[Future[Any]] = list(map(Future, states))
        with node.lock:
            self._declare(encoder)
            node.machine.submit(op, batch.prepared.code, states)
            node.count_bytes(PER_TASK_BYTES * count + len(op.args))
            node.wake()
        return iter(futures)

    def _submit_named(
        self, batch: _Columns, encoder: CallEncoder, keys: Sequence[Key], release: bool = True
    ) -> list[Future[Any]]:
        node = self.node
        states: list[FutureState] = []
        with node.lock:
            machine = node.machine
            machine.collect_dropped()  # a name whose last future has just gone is free
            self._declare(encoder)
            made: dict[Key, FutureState] = {}
            rows: list[int] = []
            try:
                for row, (key, spec) in enumerate(zip(keys, batch.specs(len(keys)), strict=True)):
                    state = machine.share(key, spec)
                    if state is None and key in made:
                        state = made[key]
                        state.refs += 1
                        if state.spec != spec:
                            raise key_conflict(key)
                    elif state is None:
                        state = made[key] = FutureState(key, node, batch.name, spec=spec)
                        rows.append(row)
                    elif not state.spec:  # known from another client: the scheduler checks that it is the same task
                        state.spec = spec
                        machine.submit(batch.part([row], [key]), batch.prepared.code, ())
                    states.append(state)
                if rows:
                    op = batch.part(rows, [keys[row] for row in rows])
                    machine.submit(op, batch.prepared.code, list(made.values()))
                    node.count_bytes(PER_TASK_BYTES * len(rows) + len(op.args))
            except BaseException:
                for state in states:
                    state.refs -= state.key not in made
                raise
            finally:
                if release and encoder.keys:
                    machine.release(encoder.keys)
            node.wake()
        return list(map(Future, states))

    def _declare(self, encoder: CallEncoder) -> None:
        """Declares what was lifted out of arguments since the last call. Under the lock."""
        keys, payloads = encoder.take_lifted()
        if keys:
            op = DeclareData(keys, [payload.nbytes for payload in payloads], retained=True)
            self.node.machine.declare(op, payloads)

    def _as_argument(self, prepared: PreparedFunction, function: Any, encoder: CallEncoder) -> PreparedFunction:
        """A function that travels as the first argument of `call_function`, under its own name."""
        if not prepared.holds_futures:
            encoder.lift(function, Payload(PICKLE_HEADER, (prepared.code,)))
        caller = self.functions.prepare(call_function)
        return msgspec.structs.replace(caller, name=prepared.name)

    def _new_key(self, payload: Payload) -> Key:
        with self.node.lock:
            return self.node.machine.take_keys(1)


class _Columns(msgspec.Struct, gc=False):
    """Encoded calls, and what they share. An empty `data` or `inputs`: empty for each call."""

    prepared: PreparedFunction
    name: str
    options: TaskOptions
    data: Sequence[bytes]
    inputs: Sequence[Sequence[Key]]
    references: dict[Key, None]

    def op(self, first_key: int, count: int, keys: Sequence[Key] = ()) -> SubmitTasks:
        """All calls as one op."""
        data, inputs = self.data, self.inputs
        deps = [key for row in inputs for key in row]
        return SubmitTasks(
            function=self.prepared.digest,
            name=self.name,
            first_key=first_key,
            count=count,
            keys=list(keys),
            args=data[0] if len(data) == 1 else b"".join(data),
            args_lengths=list(map(len, data)),
            dep_counts=list(map(len, inputs)) if deps else [],
            deps=deps,
            references=list(self.references),
            options=self.options,
        )

    def part(self, rows: Sequence[int], keys: Sequence[Key]) -> SubmitTasks:
        """Some of the calls as an op with named keys."""
        data = [self.data[row] for row in rows] if self.data else []
        inputs = [self.inputs[row] for row in rows] if self.inputs else []
        part = _Columns(self.prepared, self.name, self.options, data, inputs, self.references)
        return part.op(0, len(rows), keys)

    def specs(self, count: int) -> Iterator[bytes]:
        """For each call a digest of all that it is."""
        data = self.data or repeat(b"", count)
        inputs = self.inputs or repeat((), count)
        return (_spec(self.prepared, d, i) for d, i in islice(zip(data, inputs, strict=False), count))

    def content_keys(self, count: int) -> list[Key]:
        """Names that are the same for the same function with the same arguments."""
        return [f"{self.name}-{spec.hex()}" for spec in self.specs(count)]


def _spec(prepared: PreparedFunction, data: bytes, inputs: Sequence[Key]) -> bytes:
    return digest_of(b"\0".join((prepared.digest, data, *[repr(key).encode() for key in inputs])))


def _content_key(payload: Payload) -> Key:
    """The name of data by what it is: for pure tasks, whose inputs must have the same keys every time."""
    return "data-" + payload_digest(payload)


def payload_digest(payload: Payload) -> str:
    """Hexadecimal digest of a payload's content."""
    digest = hashlib.blake2b(payload.header, digest_size=16)
    for frame in payload.frames:
        digest.update(frame)
    return digest.hexdigest()


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    start, step = 0, min(FIRST_BATCH, size)
    while start < count:
        stop = min(start + step, count)
        yield start, stop
        start, step = stop, min(2 * step, size)


def user_keys(keys: Sequence[object]) -> list[Key]:
    """Keys as users give them, in their wire form."""
    return [to_wire(key) for key in keys]
