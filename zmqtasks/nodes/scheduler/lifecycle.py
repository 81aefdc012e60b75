"""What clients and workers say of tasks: submitted, wanted, released, cancelled; finished, failed.

The layers below, each of which uses only those under it: `recovering` plans tasks, `failing` ends them without a result,
`releasing` drops what nobody needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.actors import makes_actor
from zmqtasks.nodes.scheduler.placement import CALLS_ACTOR
from zmqtasks.nodes.scheduler.recovering import Recovering
from zmqtasks.nodes.scheduler.state import (
    ERRED,
    MEMORY,
    PROCESSING,
    READY,
    RELEASED,
    WAITING,
    ClientState,
    FunctionRecord,
    TaskSpec,
    TaskState,
    WorkerState,
)
from zmqtasks.nodes.scheduler.transitions import check
from zmqtasks.protocol.ops import ErrorInfo, KeysCancelled, KeysErred, SubmitTasks, TaskErred, TasksFinished

INLINE_KEEP_BYTES = 512
"""Results up to this size stay in the task's record, so that they can ride with the tasks that need them."""
INLINE_TOTAL_BYTES = 64 << 20
"""Bound on the sum of the results kept so."""
TASKS_PER_OP = 1 << 20
"""A range of keys takes a few bytes on the wire, whatever its length: bounded, as everything that a peer announces."""
PRIORITY_SHIFT = 42
"""A user's priority outweighs 2**42 submissions."""
PRIORITY_LIMIT = 1 << 20
ORDER_LIMIT = 1 << (PRIORITY_SHIFT - 2)
"""How far from each other a client may put the tasks of one op: never past a priority."""


class Lifecycle(Recovering):
    """All that peers do to tasks; placement does the rest (READY -> PROCESSING)."""

    def submit(self, client: ClientState, op: SubmitTasks) -> None:
        """New tasks; named ones may exist already."""
        if not 0 <= op.count <= TASKS_PER_OP:
            raise RemoteProtocolError(
                f"SubmitTasks of {op.name!r}: {op.count} tasks in one op, {TASKS_PER_OP} are allowed"
            )
        keys: Sequence[Key] = op.keys or range(op.first_key, op.first_key + op.count)
        n = len(keys)
        lengths, counts = op.args_lengths, op.dep_counts
        if (
            (lengths and (len(lengths) != n or sum(lengths) != len(op.args) or min(lengths) < 0))
            or (counts and (len(counts) != n or sum(counts) != len(op.deps) or min(counts) < 0))
            or (op.args and not lengths)
            or (op.deps and not counts)
            or (op.options.actor == CALLS_ACTOR and (not counts or min(counts) < 1))
            or (op.order and (len(op.order) != n or max(map(abs, op.order)) > ORDER_LIMIT))
        ):
            raise RemoteProtocolError(f"SubmitTasks of {op.name!r}: columns do not fit {n} tasks")
        spec = self._spec(op)
        state = self.state
        user = max(-PRIORITY_LIMIT, min(PRIORITY_LIMIT, op.options.priority))
        priority = state.next_priority - (user << PRIORITY_SHIFT)
        state.next_priority += n
        state.counters["submitted"] += n
        tasks = state.tasks
        args, offset = op.args, 0
        order: Sequence[int] = op.order or range(n)
        if op.deps or op.references:
            self._submit_with_inputs(client, op, keys, spec, priority, order)
            return
        enqueue = self.placement.queue.push if spec.bucket is None else self.placement.enqueue
        one_args = b""
        for i, key in enumerate(keys):
            if lengths:
                end = offset + lengths[i]
                one_args = args[offset:end]
                offset = end
            if key in tasks:
                self._submit_again(client, tasks[key], spec, one_args, (), op.reuse)
                continue
            ts = TaskState(key, spec, READY, priority + order[i], one_args, (), client)
            tasks[key] = ts
            enqueue(ts)

    def _spec(self, op: SubmitTasks) -> TaskSpec:
        function = self.state.functions.get(op.function)
        if function is None:
            raise RemoteProtocolError(
                f"SubmitTasks of {op.name!r} names a function that was not sent: {op.function.hex()}"
            )
        spec = function.spec
        if spec is None or spec.name != op.name or spec.options != op.options:
            spec = function.spec = TaskSpec(function, op.name, op.options, self.placement.bucket_for(op.options))
        return spec

    def _submit_with_inputs(
        self,
        client: ClientState,
        op: SubmitTasks,
        keys: Sequence[Key],
        spec: TaskSpec,
        priority: int,
        order: Sequence[int],
    ) -> None:
        tasks = self.state.tasks
        lengths, counts, flat = op.args_lengths, op.dep_counts, op.deps
        args, offset, first = op.args, 0, 0
        one_args, n_deps = b"", 0
        references: tuple[TaskState, ...] = ()
        for i, key in enumerate(keys):
            if lengths:
                one_args = args[offset : offset + lengths[i]]
                offset += lengths[i]
            if counts:
                n_deps = counts[i]
            dep_keys = flat[first : first + n_deps]
            first += n_deps
            try:
                deps = tuple([tasks[k] for k in dep_keys])
                if op.references:
                    references = tuple([tasks[k] for k in op.references])
            except KeyError as exc:
                gone = exc.args[0]
                client.outbox.add(
                    KeysCancelled([key], f"its input {gone!r} is unknown: released or cancelled", "LostDataError")
                )
                continue
            if spec.bucket is self.placement.calls and not makes_actor(deps[-1]):
                client.outbox.add(KeysCancelled([key], f"{deps[-1].name} is no actor", "ActorLostError"))
                continue
            if key in tasks:
                self._submit_again(client, tasks[key], spec, one_args, deps, op.reuse)
                continue
            ts = TaskState(key, spec, WAITING, priority + order[i], one_args, deps, client)
            tasks[key] = ts
            if references:
                ts.extra().references = references
            self._plan(ts)

    def _submit_again(
        self,
        client: ClientState,
        ts: TaskState,
        spec: TaskSpec,
        args: bytes,
        deps: tuple[TaskState, ...],
        reuse: bool,
    ) -> None:
        old = ts.spec
        same = reuse or (old is not None and old.function is spec.function and ts.args == args and ts.deps == deps)
        if not same:
            reason = f"key {ts.key!r} exists already with another function or other arguments; use another key"
            client.outbox.add(KeysCancelled([ts.key], reason, "KeyConflictError"))
            return
        self.want(client, ts)

    def want(self, client: ClientState, ts: TaskState) -> None:
        """A client holds a future of an existing task: tell it what is known."""
        if ts.wanted_by is None:
            ts.wanted_by = client
        elif ts.wanted_by is not client:
            if not isinstance(ts.wanted_by, set):
                ts.wanted_by = {ts.wanted_by}
            ts.wanted_by.add(client)
        if ts.state is MEMORY:
            client.outbox.add_result(ts.key, ts.size, ts.inline)
        elif ts.state is ERRED:
            assert ts.rare is not None
            assert ts.rare.error is not None
            client.outbox.add(KeysErred([ts.key], ts.rare.error))
        elif ts.state is RELEASED:
            self.revive(ts)

    def release(self, client: ClientState, keys: Iterable[Key]) -> None:
        """A client holds no future of these keys any more."""
        tasks = self.state.tasks
        unwanted: list[TaskState] = []
        for key in keys:
            ts = tasks.get(key)
            if ts is None:
                continue
            if ts.wanted_by is client:
                ts.wanted_by = None
            elif isinstance(ts.wanted_by, set):
                ts.wanted_by.discard(client)
                if ts.wanted_by:
                    continue
                ts.wanted_by = None
            elif ts.wanted_by is not None:
                continue  # another client's, which this one has never wanted
            if not ts.holds:
                unwanted.append(ts)
        self.reconsider_all(unwanted[::-1])  # it takes from the end

    def cancel(self, client: ClientState, keys: Iterable[Key], force: bool, reason: str) -> None:
        """Ends tasks, and the unfinished ones that wait for them."""
        doomed: list[TaskState] = []
        seen: set[int] = set()
        stack: list[TaskState] = []
        for key in keys:
            ts = self.state.tasks.get(key)
            if ts is None:
                client.outbox.add(KeysCancelled([key], reason or "cancelled"))
            elif not force and any(c is not client for c in ts.wanters()):
                self.release(client, [key])
                client.outbox.add(KeysCancelled([key], reason or "cancelled"))
            else:
                stack.append(ts)
        while stack:
            ts = stack.pop()
            if id(ts) not in seen:
                seen.add(id(ts))
                doomed.append(ts)
                stack += [t for t in ts.waiters or () if t.state is WAITING]
        self.give_up(doomed, reason or "cancelled", "CancelledError")

    def finished(self, worker: WorkerState, op: TasksFinished) -> None:
        """Results of runs."""
        n = len(op.run_ids)
        if len(op.lengths) != n or len(op.durations_us) != n or (op.sizes and len(op.sizes) != n):
            raise RemoteProtocolError(f"TasksFinished: columns do not fit {n} runs")
        if sum([length for length in op.lengths if length >= 0]) != len(op.values):
            raise RemoteProtocolError(f"TasksFinished: lengths that do not sum to the {len(op.values)} bytes of values")
        if op.references:
            self._note_contained(worker, op)
        worker.last_progress = self.state.now
        processing, parked, retracting, held = worker.processing, worker.parked, worker.retracting, worker.held
        values, inline_room = op.values, INLINE_TOTAL_BYTES - self.state.inline_bytes
        offset, stored, finished, inline = 0, 0, 0, 0
        wanted: list[TaskState] = []
        unwanted: list[TaskState] = []
        function: FunctionRecord | None = None
        total_us = count = 0
        for run_id, length, size, duration_us in zip(
            op.run_ids, op.lengths, op.sizes or op.lengths, op.durations_us, strict=True
        ):
            first = offset
            if length >= 0:
                offset += length
            ts = processing.pop(run_id, None)
            if parked:
                parked.pop(run_id, None)
            if retracting:
                retracting.pop(run_id, None)
            if held and (bucket := held.pop(run_id, None)) is not None:
                bucket.give_back(worker)
            if ts is None or ts.run_id != run_id or ts.state is not PROCESSING:
                value = values[first:offset] if length >= 0 else None
                self._finished_unexpectedly(worker, run_id, ts, size, value)
                continue
            worker.load_s -= ts.estimate_s
            spec = ts.spec
            if spec.function is not function:  # type: ignore[union-attr]
                if function is not None:
                    _learn(function, total_us, count)
                function, total_us, count = spec.function, 0, 0  # type: ignore[union-attr]
            total_us += duration_us
            count += 1
            ts.state = MEMORY
            ts.worker = None
            ts.size = size
            ts.who_has = worker
            stored += size
            finished += 1
            if 0 <= length <= INLINE_KEEP_BYTES and inline < inline_room:
                ts.inline = values[first:offset]
                inline += length
            if ts.wanted_by is not None:
                wanted.append(ts)
            elif not ts.holds:
                unwanted.append(ts)
            if ts.waiters is not None or ts.deps or ts.rare is not None:
                self._arrived(ts, unwanted)
        if function is not None:
            _learn(function, total_us, count)
        worker.stored_bytes += stored
        worker.stored_keys += finished
        self.state.counters["finished"] += finished
        self.state.inline_bytes += inline
        if wanted:
            self._tell(wanted, op)
        self.reconsider_all(unwanted)
        self.placement.update_room(worker)

    @staticmethod
    def _tell(finished: list[TaskState], op: TasksFinished) -> None:
        """Tells of results: in the columns in which they came, where one client wants all of them."""
        client = finished[0].wanted_by
        if type(client) is ClientState and not client.congested:
            keys = [ts.key for ts in finished if ts.wanted_by is client]
            if len(keys) == len(op.run_ids):
                client.outbox.add_results(keys, op.sizes or op.lengths, op.lengths, op.values)
                return
        by_run = {ts.run_id: ts for ts in finished}
        offset = 0
        for run_id, length in zip(op.run_ids, op.lengths, strict=True):
            if (ts := by_run.pop(run_id, None)) is not None:
                _tell_one(ts, op.values[offset : offset + length] if length >= 0 else None)
            offset += max(length, 0)

    def _arrived(self, ts: TaskState, unwanted: list[TaskState]) -> None:
        """A value has come into memory: wakes who waits for it, lets go of what it needed, for the caller to reconsider."""
        if ts.rare is not None and makes_actor(ts):
            self.actor_settled(ts)
        if ts.waiters is not None:
            self._wake(ts)
        if ts.deps:
            for dep in ts.deps:
                dep.holds -= 1
                if not dep.holds and dep.wanted_by is None:
                    unwanted.append(dep)
        if ts.rare is not None:
            self._let_go(ts.rare.references, unwanted)

    def _wake(self, ts: TaskState) -> None:
        waiters, ts.waiters = ts.waiters, None
        assert waiters is not None
        enqueue = self.placement.enqueue
        for task in waiters:
            if task.state is not WAITING:
                continue
            if task.recount:
                task.waiting_on = sum(dep.state is not MEMORY for dep in task.deps)
            else:
                task.waiting_on -= 1
            if not task.waiting_on:
                task.state = READY
                enqueue(task)

    def _finished_unexpectedly(
        self, worker: WorkerState, run_id: int, ts: TaskState | None, size: int, value: bytes | None
    ) -> None:
        """A run whose result nobody waits for: it was cancelled, or another attempt was made meanwhile."""
        if ts is not None and ts.state in (WAITING, READY, PROCESSING):
            self.adopt(worker, ts, size, value)
            return
        # It had finished before `CancelRuns` came, if that was sent, and is kept there.
        key = ts.key if ts is not None else worker.abandoned.pop(run_id, None)
        if key is not None:
            self._drop_stray(worker, key, size)

    def _drop_stray(self, worker: WorkerState, key: Key, size: int) -> None:
        """A worker holds a value that is not counted on, unless it has (or makes) the one of a later attempt."""
        ts = self.state.tasks.get(key)
        if ts is None or not (ts.held_by(worker) or ts.worker is worker):
            worker.outbox.drop([key], size)

    def adopt(self, worker: WorkerState, ts: TaskState, size: int, value: bytes | None = None) -> None:
        """A worker holds a value that is being waited for otherwise."""
        if ts.state is PROCESSING:
            self._abandon_run(ts)
        ts.recount = True  # inputs that it waits for still list it
        check(self.state, ts, MEMORY)
        ts.size = size
        ts.who_has = worker
        worker.stored_bytes += size
        worker.stored_keys += 1
        _tell_one(ts, value)
        if value is not None and len(value) <= INLINE_KEEP_BYTES and self.state.inline_bytes < INLINE_TOTAL_BYTES:
            ts.inline = value
            self.state.inline_bytes += len(value)
        unwanted = [ts]
        self._arrived(ts, unwanted)
        self.reconsider_all(unwanted)

    def add_replica(self, worker: WorkerState, ts: TaskState) -> None:
        """Another worker holds the value too."""
        if ts.held_by(worker):
            return
        if isinstance(ts.who_has, set):
            ts.who_has.add(worker)
        elif ts.who_has is None:
            ts.who_has = worker
        else:
            ts.who_has = {ts.who_has, worker}
        worker.stored_bytes += ts.size
        worker.stored_keys += 1

    def _note_contained(self, worker: WorkerState, op: TasksFinished) -> None:
        """Futures inside results live as long as the results."""
        first, tasks = 0, self.state.tasks
        for run_id, count in zip(op.run_ids, op.reference_counts, strict=False):
            keys = op.references[first : first + count]
            first += count
            ts = worker.processing.get(run_id)
            if not keys or ts is None or ts.state not in (WAITING, READY, PROCESSING) or ts.extra().contains:
                continue
            contained = tuple(tasks[k] for k in keys if k in tasks and k != ts.key)
            ts.extra().contains = contained
            for inner in contained:
                inner.holds += 1

    def erred(self, worker: WorkerState, op: TaskErred) -> None:
        """A run raised: retry, or fail."""
        ts = self.end_run(worker, op.run_id)
        worker.last_progress = self.state.now
        self.placement.update_room(worker)
        if ts is None or ts.run_id != op.run_id or ts.state is not PROCESSING:
            return
        assert ts.spec is not None
        rare = ts.extra()
        rare.attempts_erred += 1
        if rare.attempts_erred <= ts.spec.options.retries:
            self.state.note(
                ts.name, f"raised on {worker.address}, attempt {rare.attempts_erred}: {op.error.text[:200]}"
            )
            self.requeue(ts)
            return
        error = op.error
        named = ErrorInfo(
            error.kind, error.text, error.payload, error.traceback_text, ts.key, ts.spec.name, worker.address
        )
        self.fail([ts], named)


def _tell_one(ts: TaskState, value: bytes | None) -> None:
    """Tells those who want a value that it is in memory."""
    for client in ts.wanters():
        client.outbox.add_result(ts.key, ts.size, None if client.congested else value)


def _learn(function: FunctionRecord, total_us: int, count: int) -> None:
    """Takes `count` more durations into the running average."""
    mean = total_us * 1e-6 / count
    if function.duration_s < 0:
        function.duration_s = mean
    else:
        function.duration_s += (mean - function.duration_s) * count / (count + 8)
