"""The scheduler as a pure machine: ops and the time in, ops out.

Theory of operation
-------------------
The node calls `receive` for what arrived from a peer, the membership methods for links, `tick` when `deadline` has come, and
then `flush` once for all of it: placement happens there, and every peer gets at most one batch. Nothing here blocks, reads a
clock, draws a random number, or opens a payload.

The rules are in the modules beside this one: `lifecycle` (tasks), `placement` (who runs what), `stealing` (what idle workers get
from busy ones), `data` (bytes that clients give, whereabouts), `membership` (who is there), `errands` (function calls, restarts),
`plugins` (what every worker has to have), `coordination` (what clients share by name), `queries`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from zmqtasks.config import Config
from zmqtasks.errors import RemoteProtocolError
from zmqtasks.nodes.scheduler.coordination import Coordination
from zmqtasks.nodes.scheduler.data import DataBook
from zmqtasks.nodes.scheduler.errands import Errands
from zmqtasks.nodes.scheduler.keeping import UNKNOWN
from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.membership import Membership
from zmqtasks.nodes.scheduler.placement import Placement
from zmqtasks.nodes.scheduler.plugins import Plugins
from zmqtasks.nodes.scheduler.queries import Queries, UnknownQueryError
from zmqtasks.nodes.scheduler.resting import rest
from zmqtasks.nodes.scheduler.state import (
    PROCESSING,
    ClientState,
    FunctionRecord,
    NannyState,
    SchedulerState,
    WorkerState,
)
from zmqtasks.nodes.scheduler.stealing import WorkStealing
from zmqtasks.protocol import ops
from zmqtasks.protocol.ops import Op

KEEPER_SESSION = b"keeper"
DROP_WITHIN_S = 0.02
"""Workers hear within this that a value is not needed; sooner when there is something else to tell them."""


class SchedulerMachine:
    """All decisions of a scheduler; `epoch` tells this start of it from others."""

    def __init__(self, *, epoch: int, config: Config) -> None:
        self.state = SchedulerState(epoch=epoch, config=config)
        self.placement = Placement(self.state)
        self.lifecycle = Lifecycle(self.state, self.placement)
        self.stealing = WorkStealing(self.state, self.placement, self.lifecycle)
        self.data = DataBook(self.state, self.placement, self.lifecycle)
        self.coordination = Coordination(self.state, self.lifecycle)
        self.membership = Membership(self.state, self.placement, self.lifecycle, self.data, self.coordination)
        self.errands = Errands(self.state, self.lifecycle, self.membership)
        self.plugins = Plugins(self.state, self._worker_prepared)
        self.membership.prepare = self.plugins.prepare
        self.queries = Queries(self.state)
        self.shutdown_reason: str | None = None
        """Set when a client asked the cluster to end."""
        self._keeper = ClientState(KEEPER_SESSION, 0, "fire-and-forget", "", 0, self.state.dirty)
        lifecycle, data, errands = self.lifecycle, self.data, self.errands
        self._client_handlers: dict[type, Callable[[ClientState, Any], None]] = {
            ops.SubmitTasks: lifecycle.submit,
            ops.ReleaseKeys: lambda client, op: lifecycle.release(client, op.keys),
            ops.PutFunctions: self._on_put_functions,
            ops.DeclareData: data.declare,
            ops.PlacementFailed: data.placement_failed,
            ops.WantKeys: self._on_want_keys,
            ops.CancelTasks: lambda client, op: lifecycle.cancel(client, op.keys, op.force, op.reason),
            ops.RetryTasks: lambda client, op: lifecycle.retry(op.keys),
            ops.RequestLocations: data.locate,
            ops.ReportMissing: data.client_misses,
            ops.KeepTasks: self._on_keep_tasks,
            ops.Query: self._on_query,
            ops.RunFunction: errands.run_function,
            ops.Restart: errands.restart,
            ops.Shutdown: self._on_shutdown,
            ops.RegisterPlugin: self.plugins.register,
            ops.UnregisterPlugin: self.plugins.unregister,
            **self.coordination.handlers,
        }
        self._worker_handlers: dict[type, Callable[[WorkerState, Any], None]] = {
            ops.TasksFinished: lifecycle.finished,
            ops.TaskErred: lifecycle.erred,
            ops.RunsDropped: self._on_runs_dropped,
            ops.RunsExecuting: self._on_runs_executing,
            ops.DataAdded: data.added,
            ops.FetchFailed: data.fetch_failed,
            ops.TaskBlocked: lambda worker, op: self._park(worker, op.run_id, blocked=True),
            ops.TaskSeceded: lambda worker, op: self._park(worker, op.run_id, blocked=False),
            ops.TaskResumed: self._on_task_resumed,
            ops.WorkerMetrics: self._on_worker_metrics,
            ops.CallFinished: self._on_call_finished,
            ops.LogMessages: lambda worker, op: self._on_log_messages(op),
        }
        self._nanny_handlers: dict[type, Callable[[NannyState, Any], None]] = {
            ops.WorkerStarted: lambda nanny, op: None,
            ops.WorkerExited: self._on_worker_exited,
            ops.WorkerChecked: lambda nanny, op: None,
            ops.CallFinished: lambda nanny, op: errands.call_finished(nanny.session, op),
            ops.LogMessages: lambda nanny, op: self._on_log_messages(op),
        }

    # --- input ------------------------------------------------------------------------------------------------------

    def client_joined(self, session: bytes, intro: ops.ClientIntroduction, now: float) -> ClientState:
        """A client has connected; its number is in the record."""
        self.state.now = now
        return self.membership.add_client(session, intro)

    def worker_joined(self, session: bytes, instance: bytes, intro: ops.WorkerIntroduction, now: float) -> WorkerState:
        """A worker has connected."""
        self.state.now = now
        worker = self.membership.add_worker(session, instance, intro)
        self.errands.worker_joined()
        return worker

    def nanny_joined(self, session: bytes, instance: bytes, intro: ops.NannyIntroduction, now: float) -> NannyState:
        """A nanny has connected."""
        self.state.now = now
        return self.membership.add_nanny(session, instance, intro)

    def receive(self, peer: ClientState | WorkerState | NannyState, batch: Sequence[Op], now: float) -> None:
        """Ops from a peer, in order; raises `RemoteProtocolError` for one that makes no sense."""
        self.state.now = now
        handlers: dict[type, Callable[[Any, Any], None]]
        if isinstance(peer, WorkerState):
            if peer.session not in self.state.workers:
                return  # given up: whatever it says comes too late
            handlers = self._worker_handlers
        elif isinstance(peer, ClientState):
            if peer.session not in self.state.clients:
                return
            handlers = self._client_handlers
        else:
            handlers = self._nanny_handlers
        for op in batch:
            handler = handlers.get(type(op))
            if handler is None:
                raise RemoteProtocolError(
                    f"{type(op).__name__} is not for a {type(peer).__name__[:-5].lower()} to send"
                )
            handler(peer, op)

    def link_lost(self, session: bytes, now: float) -> None:
        """The link of a peer broke; it may come back."""
        self.state.now = now
        self.membership.link_lost(session)

    def link_resumed(self, session: bytes, now: float) -> None:
        """The link of a peer is back."""
        self.state.now = now
        self.membership.link_resumed(session)

    def session_ended(self, session: bytes, error: str | None, now: float) -> None:
        """A peer has left in good order (None), or its session can't be resumed."""
        self.state.now = now
        self.membership.session_ended(session, error)

    def listener_refused(self, session: bytes, now: float) -> None:
        """The address of a worker whose link is lost refuses connections."""
        self.state.now = now
        self.membership.refused(session)

    def tick(self, now: float) -> None:
        """Does what `deadline` asked for."""
        self.state.now = now
        if self.state.lazy_until is not None and self.state.lazy_until <= now:
            self._drop_lazily()
        self.membership.tick()
        self.data.tick()
        self.errands.tick()
        self.plugins.tick()
        self.coordination.requests.tick()
        self.stealing.tick()

    # --- output -----------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `tick` is to be called, at the latest; None: no need."""
        state = self.state
        if not (
            self.stealing.under_way
            or state.lost
            or self.errands.under_way
            or self.plugins.under_way
            or self.coordination.requests.timed
            or self.data.deadline is not None
        ):
            return self._lazy_deadline() if state.lazy else None  # the usual case
        times = [
            t
            for t in (
                self.stealing.deadline(),
                self._lazy_deadline(),
                self.data.deadline,
                self.membership.deadline(),
                self.errands.deadline(),
                self.plugins.deadline(),
                self.coordination.requests.deadline(),
            )
            if t is not None
        ]
        return min(times) if times else None

    def flush(self) -> list[tuple[bytes, list[Op]]]:
        """Places tasks, and gives what is to be sent: a session and its ops, each session mostly once."""
        self._place()
        dirty = self.state.dirty
        out: list[tuple[bytes, list[Op]]] = []
        while dirty:  # settling kept tasks may add more
            batch, dirty[:] = list(dirty), []
            for outbox in batch:
                if outbox is self._keeper.outbox:
                    self._settle_kept()
                else:
                    out.append((outbox.session, outbox.take()))
        return out

    def _place(self) -> None:
        self.data.settle()
        self.stealing.place_returned()
        self.placement.dispatch()
        self.stealing.look()

    @property
    def is_awaited(self) -> bool:
        """Whether a thread of a worker is idle until the next message is handled; a lone worker may always become so."""
        return bool(self.placement.idle) or len(self.state.workers) == 1

    def rest(self) -> None:
        """To be called when no task is left after many: gives memory back (see `resting`)."""
        if not self.state.tasks:
            rest(self.state)
            self.placement.rest()

    def take_departed(self) -> list[bytes]:
        """Sessions that are over, for the node to end."""
        departed, self.membership.departed = self.membership.departed, []
        return departed

    def take_news(self) -> list[tuple[bool, str]]:
        """Lines for the log: whether it is bad news, and what happened."""
        news = [*self.plugins.news, *self.membership.news]
        self.plugins.news, self.membership.news = [], []
        return news

    # --- handlers ---------------------------------------------------------------------------------------------------

    def _on_put_functions(self, client: ClientState, op: ops.PutFunctions) -> None:
        if len(op.digests) != len(op.functions):
            raise RemoteProtocolError(f"PutFunctions: {len(op.digests)} digests for {len(op.functions)} functions")
        for digest, code in zip(op.digests, op.functions, strict=True):
            client.functions.add(digest)
            if digest not in self.state.functions:
                self.state.functions[digest] = FunctionRecord(digest, code)

    def _on_want_keys(self, client: ClientState, op: ops.WantKeys) -> None:
        unknown = []
        for key in op.keys:
            ts = self.state.tasks.get(key)
            if ts is None:
                unknown.append(key)
            else:
                self.lifecycle.want(client, ts)
        fates = [fate for key in unknown if (fate := self.coordination.kept.fate(key)) is not None]
        for fate in fates:
            client.outbox.add(fate)
        if len(fates) < len(unknown):
            told = {key for fate in fates for key in fate.keys}
            client.outbox.add(ops.KeysCancelled([key for key in unknown if key not in told], UNKNOWN, "LostDataError"))

    def _on_keep_tasks(self, client: ClientState, op: ops.KeepTasks) -> None:
        for key in op.keys:
            ts = self.state.tasks.get(key)
            if ts is not None:
                self.lifecycle.want(self._keeper, ts)

    def _settle_kept(self) -> None:
        """What is told to the keeper is the end of a task that was kept for its effects only."""
        for op in self._keeper.outbox.take():
            if isinstance(op, (ops.KeysInMemory, ops.KeysErred, ops.KeysCancelled)):
                self.lifecycle.release(self._keeper, op.keys)

    def _on_query(self, client: ClientState, op: ops.Query) -> None:
        # What came with the question, or right before it, is at work by the time of the answer: it shall say so.
        self._place()
        try:
            client.outbox.add(ops.QueryAnswered(op.request, msgspec.msgpack.encode(self.queries.answer(op))))
        except UnknownQueryError as exc:
            client.outbox.add(ops.QueryAnswered(op.request, b"", str(exc)))

    def _on_shutdown(self, client: ClientState, op: ops.Shutdown) -> None:
        self.shutdown_reason = op.reason or f"asked for by client {client.name}"

    def _on_runs_dropped(self, worker: WorkerState, op: ops.RunsDropped) -> None:
        for run_id in op.run_ids:
            retracted = run_id in worker.retracting
            ts = self.lifecycle.end_run(worker, run_id)
            if ts is not None and ts.state is PROCESSING and ts.run_id == run_id:
                self.lifecycle.requeue(ts)
                if retracted:
                    self.stealing.came_back(worker, ts)
        self.placement.update_room(worker)

    def _on_runs_executing(self, worker: WorkerState, op: ops.RunsExecuting) -> None:
        worker.executing = {run_id for run_id in op.run_ids if run_id in worker.processing}

    def _park(self, worker: WorkerState, run_id: int, *, blocked: bool) -> None:
        if run_id not in worker.processing:
            return
        worker.parked[run_id] = blocked
        if not blocked and (bucket := worker.held.pop(run_id, None)) is not None:
            bucket.give_back(worker)
        self.placement.update_room(worker)

    def _on_task_resumed(self, worker: WorkerState, op: ops.TaskResumed) -> None:
        worker.parked.pop(op.run_id, None)
        self.placement.update_room(worker)

    def _on_call_finished(self, worker: WorkerState, op: ops.CallFinished) -> None:
        if op.call < 0:
            self.plugins.finished(worker, op)
        else:
            self.errands.call_finished(worker.session, op)

    def _worker_prepared(self, worker: WorkerState) -> None:
        self.membership.worker_prepared(worker)
        self.errands.worker_joined()

    def _on_worker_metrics(self, worker: WorkerState, op: ops.WorkerMetrics) -> None:
        worker.memory_bytes = op.memory_bytes
        worker.cpu_percent = op.cpu_percent
        worker.compression = op.compression

    def _on_log_messages(self, op: ops.LogMessages) -> None:
        for client in self.state.clients.values():
            if not client.congested:
                client.outbox.add(op)

    def _on_worker_exited(self, nanny: NannyState, op: ops.WorkerExited) -> None:
        self.membership.worker_exited(op)

    # --- values to drop ---------------------------------------------------------------------------------------------

    def _lazy_deadline(self) -> float | None:
        state = self.state
        if state.lazy and state.lazy_until is None:
            state.lazy_until = state.now + DROP_WITHIN_S
        return state.lazy_until

    def _drop_lazily(self) -> None:
        self.state.lazy_until = None
        for outbox in self.state.lazy:
            outbox.drop_now()
        self.state.lazy.clear()
