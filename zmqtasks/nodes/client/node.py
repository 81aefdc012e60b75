"""The shell of a client: its channel to the scheduler, its links to workers, and the lock that guards its machine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from zmqtasks.config import Config
from zmqtasks.errors import (
    ClientClosedError,
    CommError,
    ConnectError,
    RemoteProtocolError,
    SchedulerLostError,
    ZmqTasksError,
)
from zmqtasks.ids import InstanceId, new_instance_id
from zmqtasks.nodes.channel import Channel, DataPool, open_channel
from zmqtasks.nodes.client import loop as loops
from zmqtasks.nodes.client.callbacks import CallbackThread
from zmqtasks.nodes.client.console import show_records
from zmqtasks.nodes.client.lock import UninterruptedLock
from zmqtasks.nodes.client.machine import ClientMachine
from zmqtasks.nodes.client.placing import Placements
from zmqtasks.nodes.client.requests import Requests
from zmqtasks.nodes.nearby import bound_arena
from zmqtasks.protocol.ops import (
    ClientIntroduction,
    ClusterChanged,
    Goodbye,
    Locations,
    LogMessages,
    Op,
    PlaceData,
    QueryAnswered,
    RunFinished,
    SchedulerToClient,
)
from zmqtasks.security import Security
from zmqtasks.transports.buffer_pool import POOL, idle_bound

logger = logging.getLogger("zmqtasks.client")

COLLECT_S = 0.02
"""Dropped futures are looked for this often while there are any: a wake-up of the loop for each would double its work."""

BACKLOG_POLL_S = 0.002
RECONNECT_PAUSE_S = 0.1
FIRST_NEWS_S = 2.0
"""How long connecting waits for the size of the cluster, which comes right after the welcome."""
LINK_WARNING_S = 1.0
"""A link that is back by then is no news for the user."""

ALONE_S = 0.0001
"""What is submitted at least so long after the last is sent at once; more often, and batches cost less."""
DIRECT_BYTES = 1 << 20
"""More than this goes out from the loop, which may have to cut it in two."""
COLLECT_AT_ONCE = 1_000
"""Dropped futures that are worth a message of their own when something arrives."""
PER_TASK_BYTES = 16
"""About what a task takes in a message beside its arguments."""

_NOT_KNOWN = ClusterChanged(0, 0, 0)


class ClientNode:
    """One client session. Methods without a note may be called in any thread; coroutines belong to the node's loop."""

    def __init__(
        self,
        address: str,
        *,
        security: Security,
        config: Config,
        name: str = "",
        loop_thread: loops.LoopThread | None = None,
        shows_output: bool = True,
        worker: bytes = b"",
    ) -> None:
        self.address = address
        self.scheduler_id = InstanceId(b"")
        """Of the scheduler that numbers this client's keys, whatever address it was dialled at."""
        self.security = security
        self.config = config
        POOL.limit(idle_bound(config.idle_buffer_bytes))
        bound_arena(config)
        self.name = name
        self.loop_thread = loop_thread
        self.shows_output = shows_output
        self.worker = worker
        self.lock = UninterruptedLock()
        self.machine = ClientMachine()
        self.dropped = self.machine.dropped
        self.asleep = True
        """Nobody looks for dropped futures at the moment: whoever drops one has to wake the loop."""
        self.cluster = _NOT_KNOWN
        self.channel: Channel | None = None
        self.ended = False
        self.is_forked = False
        """This process is a child of the one that made it: of no use here, but its futures are alive."""
        self.error: ZmqTasksError | None = None
        """Why nothing can be asked any more."""
        self._flush_due = False
        self._woken_at = 0.0
        self._unflushed_bytes = 0
        self.requests = Requests(self)
        self.placements = Placements(self)
        self._cluster_waiters: set[asyncio.Future[None]] = set()
        self._link_lost_at = 0.0
        self._link_warning: asyncio.TimerHandle | None = None
        self._kept: set[asyncio.Task[Any]] = set()
        self.client: Any = None
        """The `Client` around this node."""
        self.callbacks = CallbackThread()

    # Beginning and end

    async def start(self, patience_s: float = 0.0) -> None:
        """Connects to the scheduler, which may take `patience_s` to come up; raises the errors of `open_channel`."""
        self.loop = asyncio.get_running_loop()
        deadline = self.loop.time() + patience_s
        while True:
            try:
                await self._connect()
                return
            except ConnectError:
                if self.loop.time() + RECONNECT_PAUSE_S > deadline:
                    raise
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _connect(self) -> None:
        instance = new_instance_id()
        introduction = ClientIntroduction(self.name, os.getpid(), socket.gethostname(), self.worker)
        self.pool = DataPool(security=self.security, config=self.config, instance_id=instance, name=self.name)
        self.channel = await open_channel(
            self.address,
            introduction,
            self,
            incoming=SchedulerToClient,
            security=self.security,
            config=self.config,
            instance_id=instance,
        )
        welcome = self.channel.welcome
        assert welcome is not None
        self.scheduler_id = self.channel.peer_instance
        with self.lock:
            self.machine.admitted(welcome.number)
        for warning in welcome.warnings:
            logger.warning("%s: %s", self.address, warning)
        loops.on_fork(self)
        try:
            async with asyncio.timeout(FIRST_NEWS_S):
                while self.cluster is _NOT_KNOWN and not self.ended:
                    await self._next_cluster_news()
        except TimeoutError:  # nobody has to know how large the cluster is
            pass

    async def close(self, reason: str = "") -> None:
        """Says goodbye; pending futures are cancelled. Closing again does nothing."""
        if self.channel is not None and not self.ended:
            self.flush()
            self._end(
                ClientClosedError("the client is closed: make a new one"), "CancelledError", "the client was closed"
            )
            await self.channel.close(reason)
        self.placements.cancel()
        for task in list(self._kept):
            task.cancel()
        self.callbacks.stop()
        if self.channel is not None:
            await self.pool.close()

    def forked(self) -> None:
        """In the child after a fork: the loop stayed in the parent, so this node is of no use here."""
        self.lock = UninterruptedLock()
        self.asleep = False
        self.ended = self.is_forked = True
        self.dropped = deque(maxlen=0)
        self.error = ClientClosedError(
            "this process was forked from the one that made the client: make a new Client here (or spawn, don't fork)"
        )
        self.machine.end("CancelledError", str(self.error))

    def check_usable(self) -> None:
        """Raises the error that ended this node, if it has ended."""
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        if self.channel is None:
            raise ClientClosedError("the client is not connected yet: `await` it, or use `async with Client(...)`")

    # Sending

    def wake(self) -> None:
        """Sends what the machine has to say; to be called under the lock, with what is to be sent.

        From this thread if it is the first for a while, else the loop does it, in batches.
        """
        now = time.perf_counter()
        alone = now - self._woken_at > ALONE_S
        self._woken_at = now
        if self._flush_due or (alone and self._unflushed_bytes < DIRECT_BYTES and self._flush_directly()):
            return
        self._flush_due = True
        try:
            self.loop.call_soon_threadsafe(self.flush)
        except RuntimeError:  # closed, at exit
            pass

    def wake_to_collect(self) -> None:
        """A future was dropped while nobody looked. Takes no lock: garbage collection may run this anywhere."""
        self.asleep = False
        try:
            self.loop.call_soon_threadsafe(self._collect_later)
        except RuntimeError:
            pass

    def tell(self, op: Op) -> None:
        """Sends an op that changes nothing here."""
        with self.lock:
            self.machine.send(op)
            self.wake()

    def count_bytes(self, size_bytes: int) -> None:
        """About so much was added to the machine's outbox (under the lock)."""
        self._unflushed_bytes += size_bytes

    def is_backlogged(self) -> bool:
        """Whether more is on its way to the scheduler than a submission should add to."""
        channel = self.channel
        return channel is not None and channel.queued_bytes + self._unflushed_bytes > self.config.client_backlog_bytes

    def wait_backlog(self) -> None:
        """Waits while too much is on its way to the scheduler. Ctrl-C interrupts; does not wait in the node's own loop."""
        while self.is_backlogged():
            if self.loop_thread is None or self.loop_thread.is_current():
                return
            self.check_usable()
            time.sleep(BACKLOG_POLL_S)

    def _flush_directly(self) -> bool:
        """Sends from the calling thread; False when that can't be done now."""
        channel = self.channel
        return channel is not None and not self.ended and channel.send_taken(self._take)

    def _take(self) -> list[Op]:
        self.machine.collect_dropped()
        ops = self.machine.take()
        self._unflushed_bytes = 0
        return ops

    def flush(self) -> None:
        """Sends what the machine has to say, from the loop."""
        with self.lock:
            self._flush_due = False
            ops = self._take()
            error = self._send(ops) if ops else None
        if error is not None:
            self._failed(error)

    def _send(self, ops: list[Op]) -> Exception | None:
        """Hands a batch to the channel, under the lock, so that batches go out in the order in which they were taken."""
        if self.channel is None or self.ended:
            return None
        try:
            self.channel.send(ops)
        except ZmqTasksError as exc:
            return exc
        return None

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, CommError):
            logger.error("could not send to the scheduler", exc_info=error)
            if self.channel is not None:
                self.channel.abort(str(error))
        self._lost(error)

    def _collect_later(self) -> None:
        self.loop.call_later(COLLECT_S, self._collect)

    def _collect(self) -> None:
        if self.ended:
            return
        if self.dropped:
            self.flush()
            self._collect_later()
            return
        self.asleep = True
        if self.dropped:  # dropped by a thread that still saw us awake
            self.asleep = False
            self._collect_later()

    # The channel's callbacks, in the loop

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        try:
            with self.lock:
                rest = self.machine.receive(ops)
                if len(self.dropped) > COLLECT_AT_ONCE:  # fewer can wait for the next message, or for `_collect`
                    self.machine.collect_dropped()
                out = self.machine.take()
                failure = self._send(out) if out else None
        except ValueError as exc:  # columns that do not fit
            error = RemoteProtocolError(f"the scheduler sent a malformed op: {exc}")
            channel.abort(str(error))
            self._lost(error)
            return
        if failure is not None:
            self._failed(failure)
        for op in rest:
            self._handle(op)

    def link_lost(self, channel: Channel, error: Exception) -> None:
        self._link_lost_at = time.monotonic()
        self._link_warning = self.loop.call_later(LINK_WARNING_S, self._warn_of_lost_link, error)

    def _warn_of_lost_link(self, error: Exception) -> None:
        self._link_warning = None
        if not self.ended:
            limit_s = self.config.grace_s
            logger.warning("no link to the scheduler at %s, dialling for %g s: %s", self.address, limit_s, error)

    def link_resumed(self, channel: Channel) -> None:
        after_s = time.monotonic() - self._link_lost_at
        warned = self._link_warning is None
        self._stop_link_warning()
        level = logging.WARNING if warned else logging.INFO
        logger.log(
            level, "the link to the scheduler at %s is back after %.1f s; nothing was lost", self.address, after_s
        )

    def _stop_link_warning(self) -> None:
        if self._link_warning is not None:
            self._link_warning.cancel()
            self._link_warning = None

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        if not self.ended:
            self._lost(error)

    def _lost(self, error: Exception | None) -> None:
        text = f"{error}" if error is not None else "it has shut down"
        lost = SchedulerLostError(f"the scheduler at {self.address} is gone: {text}")
        lost.__cause__ = error
        self._end(lost, "SchedulerLostError", str(lost))

    def _end(self, error: ZmqTasksError, kind: str, reason: str) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error
        self._stop_link_warning()
        self.asleep = False
        with self.lock:
            self.machine.end(kind, reason)
            self.dropped = self.machine.dropped = deque(maxlen=0)
        self.requests.fail(error)
        for waiter in self._cluster_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _handle(self, op: Op) -> None:
        if isinstance(op, ClusterChanged):
            self.cluster = op
            for waiter in self._cluster_waiters:
                if not waiter.done():
                    waiter.set_result(None)
        elif isinstance(op, (Locations, QueryAnswered)):
            self.requests.answered(op.request, op)
        elif isinstance(op, RunFinished):
            self.requests.run_finished(op)
        elif isinstance(op, PlaceData):
            self.placements.begin(op)
        elif isinstance(op, LogMessages):
            if self.shows_output:
                show_records(op.records)
        elif not isinstance(op, Goodbye):  # the channel ends after a goodbye, and tells so
            logger.debug("unexpected from the scheduler: %s", type(op).__name__)

    def keep_task(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine whose result nobody waits for."""
        task = self.loop.create_task(coroutine)
        self._kept.add(task)
        task.add_done_callback(self._kept_task_ended)

    def _kept_task_ended(self, task: asyncio.Task[Any]) -> None:
        self._kept.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.warning("in the background: %s: %s", type(exc).__name__, exc)

    async def wait_cluster_changed(self) -> None:
        """Returns with the next change of the cluster's size, or the end of this node."""
        await self._next_cluster_news()
        self.check_usable()

    async def _next_cluster_news(self) -> None:
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._cluster_waiters.add(waiter)
        try:
            await waiter
        finally:
            self._cluster_waiters.discard(waiter)
