"""A channel: ops over a control link that may break and come back. Links break; channels resume.

Theory of operation
-------------------
Every batch has a sequence number, counted from 1 in each direction of a session, and carries the number of the last
batch received. A batch is kept, as the bytes that were sent, until the peer has acknowledged it. When the link breaks
both ends keep the session. The connecting side dials again; each side tells the other the last number that it has received;
both send what comes after, and go on. Nothing is lost and nothing handled twice: a number that was seen before is
dropped, a gap is an error.

Acknowledgements ride on batches that go the other way. A receiver that has nothing to send acknowledges by an empty
batch with number 0 (outside of the sequence); see `receipts` for when. A batch with number 0 may also hold one `Goodbye`:
the sender ends the session at once, by the receiver's fault.

A `Goodbye` within the sequence ends the session in good order: its receiver answers by its own and closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zmqtasks.config import Config
from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from zmqtasks.ids import InstanceId, SessionId
from zmqtasks.nodes.receipts import Receipts
from zmqtasks.nodes.replay import Replay
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.frames import MIB
from zmqtasks.protocol.handshake import Welcome
from zmqtasks.protocol.ops import Goodbye, Introduction, Op
from zmqtasks.transports.base import Comm

_log = logging.getLogger(__name__)

SPLIT_BYTES = 32 * MIB
"""Longer batches are cut in two: far below the limit of a control link, so that a batch always fits."""
LOW_WATER_BYTES = 4 * MIB
CLOSE_TIMEOUT_S = 5.0
"""How long `close` waits for the peer's goodbye."""


class ChannelHandler(Protocol):
    """What a channel calls; never from inside `send`, `close` or `abort` of the same channel."""

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        """The ops of one batch, in order, each exactly once in the life of the session."""

    def link_lost(self, channel: Channel, error: Exception) -> None:
        """The link broke; the session is kept, what is sent now goes out when it resumes."""

    def link_resumed(self, channel: Channel) -> None:
        """A lost link is back; nothing was lost or repeated."""

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        """The session is over for good; called exactly once, last. None: in good order, by either side."""


class Channel:
    """One end of a control link with all its reconnections; belongs to the event loop that made it."""

    __slots__ = (
        "_closing",
        "_codec",
        "_comm",
        "_decode",
        "_encode",
        "_end_told",
        "_ended",
        "_handler",
        "_lock",
        "_loop",
        "_on_ended",
        "_on_lost",
        "_over",
        "_paused",
        "_postponed",
        "_receipts",
        "_replay",
        "_replay_limit",
        "_tasks",
        "introduction",
        "number",
        "peer_address",
        "peer_instance",
        "session_id",
        "welcome",
    )

    def __init__(
        self,
        *,
        session_id: SessionId,
        peer_instance: InstanceId,
        handler: ChannelHandler,
        incoming: Any,
        config: Config,
        introduction: Introduction | None = None,
        welcome: Welcome | None = None,
        bounded: bool = False,
        on_lost: Callable[[Exception], None] | None = None,
        on_ended: Callable[[Channel, Exception | None], None] | None = None,
    ) -> None:
        """Nodes use `open_channel` and `Acceptor`. `bounded`: more than the replay limit unacknowledged ends it."""
        self.session_id = session_id
        self.peer_instance = peer_instance
        self.peer_address = ""
        self.introduction = introduction
        """What the peer introduced itself by; on the accepting side."""
        self.welcome = welcome
        """What the acceptor answered; on the connecting side."""
        self.number = 0
        """What the acceptor calls the connecting node."""
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._codec = Codec(incoming)
        self._encode = self._codec.encode
        self._decode = self._codec.decode_untrusted
        self._comm: Comm | None = None
        self._receipts = Receipts(self._loop, self._acknowledge)
        self._replay = Replay(self._loop, min(LOW_WATER_BYTES, config.replay_bytes // 4))
        self._postponed: list[Op] = []  # by another thread, as there was too much for one batch: goes first
        self._replay_limit: float = config.replay_bytes if bounded else float("inf")
        self._paused = False
        self._closing = False
        self._lock = threading.Lock()
        """Held while a batch gets its number and goes out: the one thing that other threads may do (`begin_direct`)."""
        self._over = False
        self._ended: Exception | None = None
        self._end_told: asyncio.Future[None] = self._loop.create_future()
        self._on_lost = on_lost
        self._on_ended = on_ended
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "ended" if self._over else "connected" if self._comm is not None else "waiting for its link"
        return f"<Channel {self.session_id.hex()[:8]} with {self.peer_address}, {state}>"

    # -- sending

    def send(self, ops: Sequence[Op]) -> None:
        """Sends a batch, now or when the link is back; never blocks.

        Raises CommClosedError when the channel has ended, LocalProtocolError for an op that cannot be sent.
        """
        if self._closing:
            if self._over and not self._end_told.done():
                return  # the handler learns of the end in this turn of the loop
            raise CommClosedError(f"the channel to {self.peer_address} is closed")
        if not ops:
            return
        self._send_in_order(ops)

    def _send_in_order(self, ops: Sequence[Op]) -> None:
        with self._lock:
            if self._postponed:
                ops = [*self._postponed, *ops]
                self._postponed.clear()
            if ops:
                self._send_locked(ops)
        if self._replay.nbytes > self._replay_limit:
            self._overflow()

    def begin_direct(self) -> bool:
        """For any thread: whether a batch can go out from here at once. If so, `send_direct` must follow, soon.

        It can when the link is up, nothing waits to be sent, and nobody else sends at this moment. A wake-up of the
        loop costs more than the system call that sends (`bench.tasks latency`), so it is worth asking.
        """
        if self._closing or not self._lock.acquire(blocking=False):
            return False
        ready = False
        try:
            comm = self._comm
            ready = comm is not None and comm.ready_for_direct and not self._postponed
        finally:
            if not ready:
                self._lock.release()
        return ready

    def send_taken(self, take: Callable[[], Sequence[Op]]) -> bool:
        """As `begin_direct`, then `send_direct` of what `take` gives."""
        if self._closing or self._lock.locked():
            return False
        with self._lock:
            comm = self._comm
            if comm is None or not comm.ready_for_direct or self._postponed:
                return False
            if ops := take():
                self._send_locked(ops, direct=True)
            return True

    def send_direct(self, ops: Sequence[Op]) -> None:
        """Sends a batch after `begin_direct` was true; no ops: nothing is sent after all."""
        try:
            if ops:
                self._send_locked(ops, direct=True)
        finally:
            self._lock.release()

    def _send_locked(self, ops: Sequence[Op], direct: bool = False) -> None:
        replay = self._replay
        received = (
            self._receipts.seq
        )  # once: the loop may receive more meanwhile, which this batch does not acknowledge
        data = self._encode(replay.seq + 1, received, ops)
        size = len(data)
        if size > SPLIT_BYTES:
            if len(ops) > 1:
                if direct:
                    self._postponed.extend(ops)  # two batches one after the other are for the loop to send
                    with contextlib.suppress(RuntimeError):  # it is closed
                        self._loop.call_soon_threadsafe(self._send_postponed)
                    return
                middle = len(ops) // 2
                self._send_locked(ops[:middle])
                self._send_locked(ops[middle:])
                return
            if size > self._codec.limit_bytes:
                raise LocalProtocolError(
                    f"one {type(ops[0]).__name__} of {size} bytes is over the limit of control links "
                    f"({self._codec.limit_bytes}): large values go over data links"
                )
        self._receipts.told(received)
        replay.append(data)
        comm = self._comm
        if comm is not None:
            try:
                if direct:
                    comm.send_direct((data,))
                else:
                    comm.send((data,))
            except CommError:
                pass  # comm_ended is on its way, and the batch is kept

    def _send_postponed(self) -> None:
        if not self._over:
            try:
                self._send_in_order(())
            except LocalProtocolError as exc:
                self._fail(exc)

    @property
    def queued_bytes(self) -> int:
        """Bytes that the peer has not acknowledged, sent or not."""
        return self._replay.nbytes

    @property
    def connected(self) -> bool:
        """There is a link at the moment."""
        return self._comm is not None

    @property
    def ended(self) -> bool:
        """The session is over for good."""
        return self._over

    async def drain(self) -> None:
        """Waits until little is unacknowledged (`LOW_WATER_BYTES`); raises the channel's end when that comes first."""
        await self._replay.drain()
        if self._over:
            raise CommClosedError(f"the channel to {self.peer_address} has ended") from self._ended

    # -- the end

    async def close(self, reason: str = "") -> None:
        """Says goodbye, waits (bounded) until the peer has handled everything, and ends the session; idempotent."""
        if not self._closing and self._comm is not None:
            self.send([Goodbye(reason)])
            self._closing = True
            await asyncio.wait((self._end_told,), timeout=CLOSE_TIMEOUT_S)
        if not self._over:
            self._finish(None)
        if self._tasks:
            await asyncio.wait(self._tasks)
        if not self._end_told.done():
            await asyncio.wait((self._end_told,))

    def abort(self, reason: str = "") -> None:
        """Ends the session at once, without a word to the peer (which is told when it dials again)."""
        if not self._over:
            text = f"the channel to {self.peer_address} was aborted by this side" + (f": {reason}" if reason else "")
            self._finish(CommClosedError(text), abort=True)

    def pause_receiving(self) -> None:
        """Takes no more batches from the peer (one or two may still come), also after a resumption."""
        self._paused = True
        if self._comm is not None:
            self._comm.pause_receiving()

    def resume_receiving(self) -> None:
        """Undoes `pause_receiving`."""
        self._paused = False
        if self._comm is not None:
            self._comm.resume_receiving()

    # -- what the comm calls

    def message_received(self, frames: list[memoryview]) -> None:
        """One batch from the peer."""
        frame = frames[0]
        try:
            seq, ack, ops = self._decode(frame)
            if ack > self._replay.seq:
                self._replay.check(ack)
            if seq != self._receipts.seq + 1 or len(frames) != 1:
                self._irregular(seq, ops, frames)
                self._trim(ack)
                return
        except ProtocolError as exc:
            self._fail(exc)
            return
        self._receipts.received(len(frame))
        goodbye = ops.pop() if ops and type(ops[-1]) is Goodbye else None
        if ops and not self._over:
            try:
                self._handler.ops_received(self, ops)
            except Exception as exc:
                _log.exception("handling ops from %s failed: the channel ends", self.peer_address)
                self._fail(exc)
        if ack > self._replay.acked:  # after the ops: what they lead to does not wait for it
            self._trim(ack)
        if goodbye is not None:
            self._on_goodbye(goodbye)

    def comm_ended(self, error: Exception) -> None:
        """The link is gone; the session goes on unless it was closed, or the peer broke the protocol."""
        self._comm = None
        self._receipts.stop()
        if self._over:
            return
        if self._closing:
            self._finish(None)
        elif isinstance(error, ProtocolError):
            self._fail(error)
        else:
            self._handler.link_lost(self, error)
            if self._on_lost is not None and not self._over:
                self._on_lost(error)

    # -- what open_channel and the acceptor call

    @property
    def last_seq(self) -> int:
        """Number of the last batch received."""
        return self._receipts.seq

    def attach(self, comm: Comm, peer_last_seq: int) -> None:
        """Goes on over a comm whose handshake is done: sends what the peer has not received. `receive` follows."""
        self.peer_address = comm.peer_address
        try:
            with self._lock:  # no batch may overtake the ones that go out again
                self._comm = comm
                self._replay.check(peer_last_seq)
                self._replay.acknowledged(peer_last_seq)
                for data in self._replay:
                    comm.send((data,))
        except ProtocolError as exc:
            self._fail(exc)
        except CommError:
            pass  # ended already, comm_ended follows

    def receive(self, held: Sequence[list[memoryview]] = (), ended: Exception | None = None) -> None:
        """Takes over the comm's callbacks: first what was `held` since the handshake, and the end if it came."""
        comm = self._comm
        if comm is None:
            return
        comm.set_handler(self)
        for frames in held:
            if self._comm is comm:
                self.message_received(frames)
        if self._comm is comm:
            if ended is not None:
                self.comm_ended(ended)
            elif not self._paused:
                comm.resume_receiving()

    def resumed(self) -> None:
        """Tells the handler that the link is back."""
        if not self._over:
            self._handler.link_resumed(self)

    def detach(self, reason: str) -> None:
        """Drops a link that the peer has given up, before the one that takes its place."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.set_handler(_Deaf())
            comm.abort(reason)
            self._receipts.stop()
            if not self._over:
                self._handler.link_lost(self, CommBrokenError(f"the link to {self.peer_address} was {reason}"))

    def give_up(self, error: Exception) -> None:
        """Ends a session whose link will not come back."""
        if not self._over:
            self._finish(error, abort=True)

    # -- inside

    def _irregular(self, seq: int, ops: list[Any], frames: list[memoryview]) -> None:
        """A batch that is not the next one: an acknowledgement, a repetition, or an error."""
        if len(frames) != 1:
            raise RemoteProtocolError(f"the peer sent a control message of {len(frames)} frames, due is 1")
        if seq > self._receipts.seq:
            raise RemoteProtocolError(
                f"the peer sent batch {seq} after batch {self._receipts.seq}: batches in between are missing"
            )
        if seq == 0 and ops:
            if len(ops) != 1 or type(ops[0]) is not Goodbye:
                raise RemoteProtocolError(f"the peer sent {len(ops)} ops outside of the sequence")
            self._finish(ProtocolError(f"{self.peer_address} ended the session: {_printable(ops[0].reason)}"))

    def _trim(self, ack: int) -> None:
        """Forgets batches that the peer has."""
        with self._lock:
            if ack > self._replay.acked:
                self._replay.acknowledged(ack)

    def _acknowledge(self) -> None:
        if self._comm is not None:
            try:
                with self._lock:
                    received = self._receipts.seq
                    self._receipts.told(received)
                    self._comm.send((self._encode(0, received, ()),))
            except CommError:
                pass

    def _on_goodbye(self, goodbye: Goodbye) -> None:
        if self._over:
            return
        if not self._closing:
            if goodbye.reason:
                _log.debug("%s says goodbye: %s", self.peer_address, _printable(goodbye.reason))
            self.send([Goodbye()])
        self._finish(None)

    def _fail(self, error: Exception) -> None:
        """Ends the session for a fault of the peer (or of this side's handler), and tells the peer."""
        if self._over:
            return
        if isinstance(error, ProtocolError):
            _log.warning("the channel with %s ends: %s", self.peer_address, error)
        if self._comm is not None:
            try:
                with self._lock:
                    self._comm.send((self._encode(0, self._receipts.seq, (Goodbye(str(error)),)),))
            except CommError:
                pass
        self._finish(error)

    def _overflow(self) -> None:
        text = (
            f"{self.peer_address} has not acknowledged {self._replay.nbytes} bytes, and replay_bytes is "
            f"{self._replay_limit:.0f}: it does not keep up, or its link is lost"
        )
        _log.warning("the channel ends: %s", text)
        self._finish(CommBrokenError(text), abort=True)

    def _finish(self, error: Exception | None, *, abort: bool = False) -> None:
        """The end of the session; the handler is told in the next turn of the loop."""
        self._over = True
        self._closing = True
        self._ended = error
        self._receipts.stop()
        self._replay.end()
        self._postponed.clear()
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.set_handler(_Deaf())
            if abort:
                comm.abort("given up")
            else:
                task = self._loop.create_task(comm.close())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if self._on_ended is not None:
            self._on_ended(self, error)
        self._loop.call_soon(self._tell_end)

    def _tell_end(self) -> None:
        try:
            self._handler.channel_ended(self, self._ended)
        finally:
            self._end_told.set_result(None)


class _Deaf:
    """Handles a comm that nobody listens to any more."""

    def message_received(self, frames: list[memoryview]) -> None:
        pass

    def comm_ended(self, error: Exception) -> None:
        pass


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:1000])
