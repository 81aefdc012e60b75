"""Who belongs to the cluster: workers, nannies and clients come, lose their links, come back, leave and die.

Theory of operation
-------------------
Losing a link is not dying. A worker whose link broke gets no new work and keeps what it has; it is dead when its nanny says so
(`WorkerExited`), when its own listener refuses connections (the node tries), or when the grace time is over. Only the
first of these tells which tasks were executing, so only then tasks are blamed, besides those that the worker itself had
reported as executing for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zmqtasks.nodes.scheduler.actors import makes_actor
from zmqtasks.nodes.scheduler.coordination import Coordination
from zmqtasks.nodes.scheduler.data import DataBook
from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.placement import Placement
from zmqtasks.nodes.scheduler.state import (
    PROCESSING,
    READY,
    ClientState,
    NannyState,
    SchedulerState,
    TaskState,
    WorkerState,
)
from zmqtasks.protocol.ops import (
    CheckWorker,
    ClientIntroduction,
    ClusterChanged,
    ErrorInfo,
    NannyIntroduction,
    StopWorker,
    WorkerExited,
    WorkerIntroduction,
)

LOST_WITHOUT_NANNY = "its process is gone (no nanny to say why)"


class Membership:
    """The book of members."""

    def __init__(
        self,
        state: SchedulerState,
        placement: Placement,
        lifecycle: Lifecycle,
        data: DataBook,
        coordination: Coordination,
    ) -> None:
        self.state = state
        self.placement = placement
        self.lifecycle = lifecycle
        self.data = data
        self.coordination = coordination
        self.departed: list[bytes] = []
        """Sessions that the node is to end."""
        self.news: list[tuple[bool, str]] = []
        """Lines for the node's log: whether it is bad news, and what happened."""
        self.prepare: Callable[[WorkerState], None] = lambda worker: None
        """Tells a new worker what it has to set up before it may be given tasks."""

    # --- workers ----------------------------------------------------------------------------------------------------

    def add_worker(self, session: bytes, instance: bytes, intro: WorkerIntroduction) -> WorkerState:
        """A worker has introduced itself; an older session of the same process is over."""
        state = self.state
        old = state.worker_instances.get(instance)
        if old is not None:
            self.remove_worker(old, "it connected anew without its session", executing=())
        worker = WorkerState(
            session,
            instance,
            state.next_worker_number,
            intro.name or f"worker-{state.next_worker_number}",
            intro.host,
            intro.data_address,
            max(1, intro.nthreads),
            state.dirty,
            state.lazy,
            intro.memory_limit_bytes,
            intro.resources,
            intro.nanny,
            intro.pid,
        )
        worker.last_progress = state.now
        self.prepare(worker)
        state.next_worker_number += 1
        state.workers[session] = worker
        state.worker_numbers[worker.number] = worker
        state.worker_instances[instance] = worker
        state.worker_addresses[worker.address] = worker
        self.placement.add_worker(worker)
        self.data.worker_joined()
        self._tell_clients()
        return worker

    def worker_prepared(self, worker: WorkerState) -> None:
        """A new worker has set up what it had to: it may be given tasks."""
        if worker.lost_at is None:
            self.placement.add_worker(worker)
            self.data.worker_joined()
        self._tell_clients()

    def remove_worker(
        self, worker: WorkerState, cause: str, executing: Iterable[int] | None, *, dead: bool = True
    ) -> None:
        """A worker is no more: its tasks go elsewhere, lost results are computed again, killers are stopped.

        `executing` has the run ids that the process was executing when it died; None when nobody could tell.
        """
        state = self.state
        if state.workers.pop(worker.session, None) is None:
            return
        state.worker_numbers.pop(worker.number, None)
        if state.worker_instances.get(worker.instance) is worker:
            del state.worker_instances[worker.instance]
        if state.worker_addresses.get(worker.address) is worker:
            del state.worker_addresses[worker.address]
        for other in state.workers.values():
            other.known_peers.discard(worker.number)
        self.departed.append(worker.session)
        state.lost.pop(worker, None)
        state.retracting.pop(worker, None)
        if dead:
            state.counters["worker_deaths"] += 1
            state.note(worker.address, f"removed: {cause}")
        self.news.append(
            (dead, f"worker {worker.name} at {worker.address} {'is lost' if dead else 'has left'}: {cause}")
        )
        queued = self.placement.remove_worker(worker)
        blamed = set(worker.executing if executing is None else executing)
        runs, worker.processing = worker.processing, {}
        self._drop_replicas(worker, cause)
        for run_id, ts in runs.items():
            if ts is not None and ts.state is PROCESSING and ts.run_id == run_id:
                if run_id in blamed and dead:
                    self._blame(ts, worker, cause)
                if ts.state is PROCESSING:
                    self.lifecycle.requeue(ts)
        for ts in queued:
            if ts.state is READY:
                self.placement.enqueue(ts)
        self.data.forget_worker(worker)
        self._tell_clients()

    def _drop_replicas(self, worker: WorkerState, cause: str) -> None:
        """One pass over all tasks: cheaper in sum than a set of keys per worker kept for this day."""
        held = [ts for ts in self.state.tasks.values() if ts.who_has is not None and ts.held_by(worker)]
        if worker.actors:
            actors = [ts for ts in held if ts.rare is not None and ts.rare.home is worker and makes_actor(ts)]
            self.data.actors_lost(worker, actors, cause)
        lost = [ts for ts in held if ts.held_by(worker) and self.data.remove_replica(ts, worker)]
        if lost:
            self.data.lost(lost)

    def _blame(self, ts: TaskState, worker: WorkerState, cause: str) -> None:
        """`ts` was executing when its worker died: another try, or `KilledWorker`."""
        rare = ts.extra()
        rare.deaths += 1
        assert ts.spec is not None
        self.state.note(ts.name, f"was executing on {worker.address} when that died: {cause}")
        options = ts.spec.options
        if options.idempotent and rare.deaths <= self.state.config.allowed_failures:
            return
        times = (
            f"{rare.deaths} workers died while executing it" if rare.deaths > 1 else "a worker died while executing it"
        )
        why = "" if options.idempotent else " and it must not run twice (idempotent=False)"
        text = f"task {ts.name} was given up: {times}{why}; the last one was {worker.address} ({worker.name}): {cause}"
        self.lifecycle.fail([ts], ErrorInfo("KilledWorker", text, key=ts.key, name=ts.spec.name, worker=worker.address))

    def stop_worker(self, worker: WorkerState, reason: str) -> None:
        """Asks a worker to end."""
        worker.leaving = True
        self.placement.update_room(worker)
        worker.outbox.add(StopWorker(reason))

    # --- nannies ----------------------------------------------------------------------------------------------------

    def add_nanny(self, session: bytes, instance: bytes, intro: NannyIntroduction) -> NannyState:
        """A nanny has introduced itself."""
        nanny = NannyState(session, instance, intro.name, intro.host, intro.pid, self.state.dirty)
        self.state.nannies[instance] = nanny
        return nanny

    def remove_nanny(self, nanny: NannyState) -> None:
        """A nanny is gone; its workers speak for themselves."""
        if self.state.nannies.get(nanny.instance) is nanny:
            del self.state.nannies[nanny.instance]
        self.departed.append(nanny.session)
        self.state.lost.pop(nanny, None)

    def worker_exited(self, op: WorkerExited) -> None:
        """A nanny reports the end of a worker process."""
        worker = self.state.worker_instances.get(op.instance)
        if worker is not None:
            self.remove_worker(worker, op.cause, () if op.expected else op.executing, dead=not op.expected)
        self._remove_clients_of(op.instance)

    # --- clients ----------------------------------------------------------------------------------------------------

    def add_client(self, session: bytes, intro: ClientIntroduction) -> ClientState:
        """A client has introduced itself."""
        client = ClientState(
            session, self.state.next_client_number, intro.name, intro.host, intro.pid, self.state.dirty, intro.worker
        )
        self.state.next_client_number += 1
        self.state.clients[session] = client
        client.outbox.add(self.cluster_size())
        return client

    def remove_client(self, client: ClientState) -> None:
        """A client is gone for good: what only it wanted is released."""
        if self.state.clients.pop(client.session, None) is None:
            return
        self.departed.append(client.session)
        self.state.lost.pop(client, None)
        mine = [
            ts.key
            for ts in self.state.tasks.values()
            if ts.wanted_by is client or (isinstance(ts.wanted_by, set) and client in ts.wanted_by)
        ]
        self.lifecycle.release(client, mine)
        self.data.client_left(client)
        self.coordination.client_left(client)
        self._forget_functions(client)

    def _remove_clients_of(self, instance: bytes) -> None:
        """A worker's process is gone, and the client that its tasks used with it: what they held is free now."""
        for client in [c for c in self.state.clients.values() if c.worker and c.worker == instance]:
            self.remove_client(client)

    def _forget_functions(self, client: ClientState) -> None:
        """Functions that only this client had sent, and of which no task is left."""
        kept = {ts.spec.function.digest for ts in self.state.tasks.values() if ts.spec is not None}
        kept.update(*(other.functions for other in self.state.clients.values()))
        for digest in client.functions - kept:
            self.state.functions.pop(digest, None)

    # --- links ------------------------------------------------------------------------------------------------------

    def link_lost(self, session: bytes) -> None:
        """A control link broke; its session goes on."""
        member = self._member(session)
        if member is None:
            return
        member.lost_at = self.state.now
        self.state.lost[member] = None
        if isinstance(member, WorkerState):
            for ts in self.placement.remove_worker(member):
                self.placement.enqueue(ts)
            nanny = self.state.nannies.get(member.nanny)
            if nanny is not None:
                nanny.outbox.add(CheckWorker(member.instance))

    def link_resumed(self, session: bytes) -> None:
        """A control link is back, with nothing lost."""
        member = self._member(session)
        if member is None:
            return
        member.lost_at = None
        self.state.lost.pop(member, None)
        if isinstance(member, WorkerState):
            self.placement.add_worker(member)
            self.data.worker_joined()

    def session_ended(self, session: bytes, error: str | None) -> None:
        """A peer said goodbye (None), or its session can't be resumed; neither says that its tasks are to blame."""
        member = self._member(session)
        if isinstance(member, WorkerState):
            self.remove_worker(member, error or "it left", executing=(), dead=error is not None and not member.leaving)
        elif isinstance(member, ClientState):
            self.remove_client(member)
        elif member is not None:
            self.remove_nanny(member)

    def _member(self, session: bytes) -> WorkerState | ClientState | NannyState | None:
        member = self.state.workers.get(session) or self.state.clients.get(session)
        return member or next((n for n in self.state.nannies.values() if n.session == session), None)

    def refused(self, session: bytes) -> None:
        """The listener of a worker whose link is lost refuses connections: the process is gone."""
        worker = self.state.workers.get(session)
        if worker is not None and worker.lost_at is not None and worker.nanny not in self.state.nannies:
            self.remove_worker(worker, LOST_WITHOUT_NANNY, executing=None)
            self._remove_clients_of(worker.instance)

    # --- time -------------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When the first grace time is over."""
        lost = [m.lost_at for m in self.state.lost if m.lost_at is not None]
        return min(lost) + self.state.config.grace_s if lost else None

    def tick(self) -> None:
        """Gives up members whose grace time is over."""
        grace = self.state.config.grace_s
        for member in list(self.state.lost):
            assert member.lost_at is not None
            if self.state.now - member.lost_at < grace:
                continue
            if isinstance(member, WorkerState):
                self.remove_worker(member, f"lost: no link for {grace:g} s", executing=(), dead=True)
            elif isinstance(member, ClientState):
                self.state.note(member.name, f"client lost: no link for {grace:g} s")
                self.remove_client(member)
            else:
                self.remove_nanny(member)

    # --- news -------------------------------------------------------------------------------------------------------

    def cluster_size(self) -> ClusterChanged:
        """The size of the cluster now."""
        workers = [w for w in self.state.workers.values() if not w.preparing]
        limits = [w.memory_limit_bytes for w in workers]
        memory = sum(limits) if all(limits) else 0
        return ClusterChanged(len(limits), sum(w.nthreads for w in workers), memory)

    def _tell_clients(self) -> None:
        if self.state.clients:
            news = self.cluster_size()
            for client in self.state.clients.values():
                client.outbox.add(news)
