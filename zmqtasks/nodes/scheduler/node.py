"""The scheduler as a process sees it: listeners, channels and timers around the machine.

All ops that arrive within one turn of the event loop are run through the machine, then one flush sends at most one batch to
each peer: the flush is scheduled by the first op and runs after the other sockets of the turn have been read. Ops that come
after a moment of rest are flushed at once: nothing is there to be batched with.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, assert_never

from zmqtasks.config import Config
from zmqtasks.errors import CommError, ConnectionRefusedByPeerError, ProtocolError
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, Channel, PeerInfo, Refusal
from zmqtasks.nodes.links import link_settings
from zmqtasks.nodes.lookout import Lookout
from zmqtasks.nodes.scheduler.machine import SchedulerMachine
from zmqtasks.nodes.scheduler.state import ClientState, NannyState, WorkerState
from zmqtasks.protocol.ops import (
    ClientIntroduction,
    ClientToScheduler,
    DataIntroduction,
    Introduction,
    LogMessages,
    NannyIntroduction,
    NannyToScheduler,
    Op,
    StopNanny,
    WorkerIntroduction,
    WorkerMetrics,
    WorkerToScheduler,
)
from zmqtasks.scheduler_file import SchedulerFile, remove_scheduler_file, write_scheduler_file
from zmqtasks.security import Security
from zmqtasks.transports import registry
from zmqtasks.transports.buffer_pool import POOL

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.3
"""How often the listener of a worker with a lost link and no nanny is tried."""
CONGESTED_BYTES = 32 << 20
"""A client with more than this on its way gets notices of results instead of values."""
CONGESTION_CHECK_S = 0.2
REST_AFTER_S = 0.5
REST_AFTER_TASKS = 10_000
"""So long after the last of so many tasks, memory is put in order (a few ms)."""
ALONE_S = 0.0001
"""Ops that come so long after the last flush are flushed at once; more often, and a turn of the loop is waited for others."""

_OF_ITSELF = (WorkerMetrics, LogMessages)
"""What comes from idle workers too, and is followed by nothing."""

Member = ClientState | WorkerState | NannyState


class _Peer:
    """Feeds what comes from one channel to the machine."""

    __slots__ = ("member", "node")

    def __init__(self, node: SchedulerNode, member: Member) -> None:
        self.node = node
        self.member = member

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        self.node.receive(self.member, channel, ops)

    def link_lost(self, channel: Channel, error: Exception) -> None:
        self.node.link_lost(self.member, error)

    def link_resumed(self, channel: Channel) -> None:
        self.node.link_resumed(self.member)

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        self.node.channel_ended(self.member, error)


class SchedulerNode:
    """A scheduler that listens at `addresses` (port 0: any free one).

    `scheduler_file` is written when it listens, and removed when it has closed.
    """

    def __init__(
        self, addresses: Sequence[str], *, security: Security, config: Config, scheduler_file: str | None = None
    ) -> None:
        self.config = config
        self.security = security
        self._wanted = list(addresses)
        self._scheduler_file = scheduler_file
        self.epoch = int(time.time())
        self.machine = SchedulerMachine(epoch=self.epoch, config=config)
        self._acceptor = Acceptor(
            security=security, config=config, epoch=self.epoch, instance_id=new_instance_id(), admit=self._admit
        )
        self._channels: dict[bytes, Channel] = {}
        self._flush_scheduled = False
        self._flushed_at = 0.0
        self._resting = False
        self._finished_at_rest = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._congestion_checked = 0.0

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens; raises AddressError or ConnectError naming the address that can't be used."""
        self._loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        self._lookout = Lookout(self._loop, self.config.spin_s, lambda: self.machine.is_awaited)
        try:
            for address in self._wanted:
                await self._acceptor.listen(address)
        except BaseException:
            await self._acceptor.close()
            raise
        if self._scheduler_file is not None:
            key = self.security.key
            write_scheduler_file(
                self._scheduler_file,
                SchedulerFile(
                    address=self.address,
                    addresses=self.addresses,
                    cluster_id=self.security.cluster_id.hex(),
                    encryption=self.security.encryption_mode(self.config.encryption),
                    key=key.hex() if key is not None else "",
                    epoch=self.epoch,
                    pid=os.getpid(),
                ),
            )

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return self._acceptor.addresses

    @property
    def address(self) -> str:
        """The first of `addresses`."""
        return self.addresses[0]

    async def finished(self) -> None:
        """Returns when the scheduler has ended: closed here, or by a client's `shutdown`."""
        await self._finished.wait()

    async def close(self, reason: str = "the scheduler is closing") -> None:
        """Tells nannies and workers to end, says goodbye to all, and frees the addresses; idempotent."""
        if self._closing:
            await self._finished.wait()
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for worker in list(self.machine.state.workers.values()):
            self.machine.membership.stop_worker(worker, reason)
        for nanny in self.machine.state.nannies.values():
            nanny.outbox.add(StopNanny(reason))
        self._flush()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        channels = list(self._channels.values())
        await asyncio.gather(*(channel.close(reason) for channel in channels), return_exceptions=True)
        await self._acceptor.close()
        if self._scheduler_file is not None:
            remove_scheduler_file(self._scheduler_file, pid=os.getpid())
        self._finished.set()

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self, introduction: Introduction, peer: PeerInfo) -> Admission | Refusal:
        if self._closing:
            return Refusal("the scheduler is closing")
        now, session, machine = self._loop.time(), peer.session_id, self.machine
        member: Member
        match introduction:
            case ClientIntroduction():
                member = machine.client_joined(session, introduction, now)
                return self._welcome(member, member.number, ClientToScheduler)
            case WorkerIntroduction():
                member = machine.worker_joined(session, peer.instance_id, introduction, now)
                threads = "1 thread" if member.nthreads == 1 else f"{member.nthreads} threads"
                log.info("worker %s joined at %s (%s)", member.name, member.address, threads)
                return self._welcome(member, member.number, WorkerToScheduler, setups=len(member.preparing))
            case NannyIntroduction():
                member = machine.nanny_joined(session, peer.instance_id, introduction, now)
                return self._welcome(member, 0, NannyToScheduler)
            case DataIntroduction():
                return Refusal("a scheduler has no data: ask a worker")
            case _:
                assert_never(introduction)

    def _welcome(self, member: Member, number: int, incoming: object, setups: int = 0) -> Admission:
        return Admission(
            handler=_Peer(self, member),
            incoming=incoming,
            number=number,
            opened=partial(self._opened, member),
            setups=setups,
        )

    def _opened(self, member: Member, channel: Channel) -> None:
        self._channels[member.session] = channel
        self._schedule_flush()

    # --- input ------------------------------------------------------------------------------------------------------

    def receive(self, member: Member, channel: Channel, ops: list[Op]) -> None:
        """Ops from a peer; one that breaks the rules loses its session."""
        came = time.perf_counter()
        try:
            self.machine.receive(member, ops, self._loop.time())
        except ProtocolError as exc:
            log.warning("%s (%s) broke the rules: %s", member.name, channel.peer_address, exc)
            channel.abort(str(exc))
        if not self._flush_scheduled:
            if time.perf_counter() - self._flushed_at > ALONE_S:
                self._flush()
            else:
                self._flush_scheduled = True
                self._loop.call_soon(self._flush)
        if len(ops) != 1 or type(ops[0]) not in _OF_ITSELF:
            self._lookout.heard(came)

    def link_lost(self, member: Member, error: Exception) -> None:
        """A link broke; the machine decides what that means."""
        log.info("the link to %s is lost: %s", member.name, error)
        self._run(self.machine.link_lost, member.session)
        if isinstance(member, WorkerState) and not self._closing:
            self._start(self._probe(member))

    def link_resumed(self, member: Member) -> None:
        """A link is back."""
        self._run(self.machine.link_resumed, member.session)

    def channel_ended(self, member: Member, error: Exception | None) -> None:
        """A session is over."""
        if self._channels.pop(member.session, None) is None:
            return
        self.machine.session_ended(member.session, None if error is None else str(error), self._loop.time())
        self._schedule_flush()

    def _run(self, step: Callable[[bytes, float], None], session: bytes) -> None:
        step(session, self._loop.time())
        self._schedule_flush()

    async def _probe(self, worker: WorkerState) -> None:
        """Tries the listener of a worker with a lost link: refused means that the process is gone."""
        settings = link_settings(self.config, self.security)
        while worker.lost_at is not None and worker.session in self.machine.state.workers:
            try:
                comm = await registry.connect(worker.address, settings)
            except ConnectionRefusedByPeerError:
                self._run(self.machine.listener_refused, worker.session)
            except CommError:
                pass
            else:
                comm.abort("only a look whether it listens")
            await asyncio.sleep(PROBE_INTERVAL_S)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- output -----------------------------------------------------------------------------------------------------

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        self._flush_to_channels()
        self._flushed_at = time.perf_counter()

    def _flush_to_channels(self) -> None:
        channels = self._channels
        for session, ops in self.machine.flush():
            channel = channels.get(session)
            if channel is not None:
                self._send(channel, ops)
        for bad, line in self.machine.take_news():
            log.log(logging.WARNING if bad else logging.INFO, "%s", line)
        for session in self.machine.take_departed():
            departed = channels.pop(session, None)
            if departed is not None:
                self._acceptor.forget(departed.session_id, "the scheduler has given this node up")
        if self.machine.shutdown_reason is not None and not self._closing:
            log.info("shutting down: %s", self.machine.shutdown_reason)
            self._start(self.close(self.machine.shutdown_reason))
            return
        state = self.machine.state
        if (
            not state.tasks
            and not self._resting
            and state.counters["finished"] >= self._finished_at_rest + REST_AFTER_TASKS
        ):
            self._resting = True
            self._loop.call_later(REST_AFTER_S, self._rest)
        now = self._loop.time()
        if now - self._congestion_checked > CONGESTION_CHECK_S:
            self._congestion_checked = now
            POOL.trim()  # large batches came in its memory; metrics of workers see to it that this is reached
            for client in self.machine.state.clients.values():
                if (channel := channels.get(client.session)) is not None:
                    client.congested = channel.queued_bytes > CONGESTED_BYTES
        self._set_timer()

    def _send(self, channel: Channel, ops: list[Op]) -> None:
        try:
            channel.send(ops)
        except CommError:
            pass  # it has ended: the machine hears of that next
        except ProtocolError as exc:  # the others must get theirs
            log.error("the session of %s ends, it cannot be told what it has to know: %s", channel.peer_address, exc)
            channel.abort(str(exc))

    def _rest(self) -> None:
        """After many tasks, when all are gone: gives memory back."""
        self._resting = False
        state = self.machine.state
        if not state.tasks and not self._closing:
            self._finished_at_rest = state.counters["finished"]
            give_memory_back(self.machine)

    def _set_timer(self) -> None:
        deadline = self.machine.deadline()
        if deadline is None or self._closing:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.machine.tick(max(self._loop.time(), self._timer_at))
        self._flush()


def give_memory_back(machine: SchedulerMachine) -> None:
    """When no task is left after many: returns to the system what they took."""
    gc.collect()
    machine.rest()
    gc.collect()  # empties Python's lists of free objects as well: they keep some of the peak
    _trim_heap()


def _trim_heap() -> None:
    """Gives free pages of the C heap (tables, messages) back to the system, where the C library is glibc."""
    with suppress(OSError, AttributeError):
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
