"""Comms over shm: a stream for order and small frames, leases for large ones.

A message with large frames waits until their content lies in the arena: copied piece by piece, so that the loop goes on
meanwhile. What follows waits behind it. The peer says when it has been handed a lease; until then the lease counts as
queued, and with more than `high_water_bytes` of those nothing further is copied: a peer that does not read takes no
more of the arena than that, and one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque

from zmqtasks.errors import CommBrokenError, CommClosedError, RemoteProtocolError
from zmqtasks.protocol.frames import KIB, MIB, Buffer, Frames, as_bytes_view, total_size
from zmqtasks.transports.base import LinkSettings
from zmqtasks.transports.shm import housekeeping, leases, patience
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.channel import Channel
from zmqtasks.transports.shm.copying import Copy
from zmqtasks.transports.shm.wire import ShmReader, pack_lent
from zmqtasks.transports.stream import pack_message
from zmqtasks.transports.stream_comm import StreamComm

_log = logging.getLogger(__name__)

LEND_BYTES = 512 * KIB
"""Frames from this size on are lent. A lease costs its news on the second socket and wakes the lender once more: where
two processors do it all, the socket is ahead up to 256 KiB, level at 512, and behind from 1 MiB on (`python -m
bench.shm`)."""

_PIECE_BYTES = 8 * MIB
"""Copied in one turn of the loop: 0.7 ms into warm memory, 3 ms into new. Pieces that go past the caches are larger (`copying`)."""


class _Message:
    """A message whose large frames are on their way into the arena."""

    __slots__ = ("blocks", "copy", "frames", "index", "large", "lasting", "lent", "size", "waited")

    def __init__(self, frames: list[Buffer], lasting: bool) -> None:
        for frame in frames:
            as_bytes_view(frame)  # raises now what would end the link later
        self.frames = frames
        self.large = _large_of(frames)
        self.lasting = lasting
        self.index = 0  # of the large frame that is being copied, in `large`
        self.copy: Copy | None = None
        self.waited = False  # for a warm block, which is done once
        self.lent: dict[int, tuple[int, int]] = {}
        self.blocks: list[Block] = []  # in the order of `lent`
        self.size = total_size(frames)


def _large_of(frames: Frames) -> list[int]:
    """The indices of the frames that are lent where that is possible."""
    sizes = [frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames]
    return [index for index, size in enumerate(sizes) if size >= LEND_BYTES]


class ShmComm(StreamComm):
    """A comm over a Unix socket and an arena; made by `ShmTransport`."""

    same_host = True

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        settings: LinkSettings,
        local_address: str,
        peer_address: str,
        channel: Channel,
        arena: Arena | None,
    ) -> None:
        super().__init__(loop, sock, settings, local_address, peer_address)
        self._lending_reader = ShmReader(settings.limits, self._borrow_untrusted)
        self._reader = self._lending_reader
        self._arena = arena
        self._channel: Channel | None = channel
        self._borrowed = 0
        self._told = 0
        self._outgoing: deque[_Message] = deque()
        self._outgoing_bytes = 0
        self._unread: deque[tuple[int, int]] = deque()  # messages with leases: number after the last, and size
        self._unread_bytes = 0
        self._held_back = False
        self._copying = False
        self._waiting: asyncio.TimerHandle | None = None  # the first message waits for a warm block
        self._waiting_bytes = 0
        self._patience = patience.Patience()
        self._goodbye_due = False
        self._flushed: asyncio.Future[None] | None = None

    # -- sending

    def send(self, frames: Frames) -> None:
        self._send(frames, lasting=False)

    def send_lasting(self, frames: Frames) -> None:
        self._send(frames, lasting=True)

    def _send(self, frames: Frames, *, lasting: bool) -> None:
        if self._ended is not None:
            raise self._sending_error()
        if not self._outgoing or not frames:
            pieces, size = pack_message(frames)
            if self._arena is None or size < LEND_BYTES or not _large_of(frames):  # small ones are not looked at singly
                self._messages_sent += 1
                self._bytes_sent += size
                self._put_out(pieces, size)
                return
        message = _Message(list(frames), lasting)
        self._messages_sent += 1
        self._bytes_sent += message.size
        self._outgoing.append(message)
        self._outgoing_bytes += message.size
        if len(self._outgoing) == 1 and not self._copying:
            self._advance()
        self._look_at_queue()

    def allocate(self, size_bytes: int) -> memoryview:
        if size_bytes >= LEND_BYTES and self._arena is not None:
            housekeeping.look_after(self._arena)
            if (memory := self._arena.allocate(size_bytes)) is not None:
                return memory
        return super().allocate(size_bytes)

    def _advance(self) -> None:
        """Copies a piece, and sends what is complete."""
        self._copying = False
        self._end_wait()
        try:
            self._send_complete()
        except Exception as exc:  # half of a message may be out, and its blocks lent
            error = CommClosedError(f"the link to {self.peer_address} was aborted: {exc!r}", by="local")
            error.__cause__ = exc
            self._end(error, hard=True)
            return
        self._look_at_queue()

    def _send_complete(self) -> None:
        budget = _PIECE_BYTES
        while self._outgoing and self._unread_bytes < self._settings.high_water_bytes:
            message = self._outgoing[0]
            budget = self._prepare(message, budget)
            if message.index < len(message.large):
                self._copying = True
                if self._waiting is None:
                    self._loop.call_soon(self._advance)
                return
            self._put_out_lent(message)
            self._outgoing.popleft()  # last: up to here no other thread sends
            self._outgoing_bytes -= message.size
        if not self._outgoing and self._goodbye_due:
            self._goodbye_due = False
            self._say_goodbye()
            if self._flushed is not None and not self._flushed.done():
                self._flushed.set_result(None)

    def _prepare(self, message: _Message, budget: int) -> int:
        """Goes on with the large frames of a message; gives what is left of the budget."""
        arena, channel = self._arena, self._channel
        assert arena is not None
        while message.index < len(message.large) and budget > 0:
            index = message.large[message.index]
            frame = message.frames[index]
            view = as_bytes_view(frame)
            if message.copy is None:
                if channel is None or not channel.offer():
                    message.index += 1
                    continue
                if found := arena.find(view):
                    self._lend(message, index, *found, len(view))
                    continue
                if message.lasting and isinstance(frame, memoryview) and (block := arena.kept(frame)):
                    self._lend(message, index, block, block.offset, len(view))
                    continue
                if len(view) >= patience.FROM_BYTES and self._begins_wait(message, len(view)):
                    return 0
                block = arena.take(len(view))
                if block is None:  # full: the bytes themselves go through the socket
                    message.index += 1
                    continue
                message.copy = Copy(arena, block, view)
            try:
                copied = message.copy.advance(budget)
            except OSError as exc:  # no memory for new pages: the bytes go through the socket
                _log.debug("a frame of %d bytes could not be copied into the arena: %s", len(view), exc)
                message.copy.stop()
                arena.discard(message.copy.block)
                message.copy = None
                message.index += 1
                continue
            budget -= copied
            if not message.copy.is_complete():
                if copied:
                    continue
                return 0  # the helper has the rest: the next turn looks again
            block, message.copy = message.copy.block, None
            arena.filled(block)
            if message.lasting and isinstance(frame, memoryview):
                arena.keep(frame, block)
            self._lend(message, index, block, block.offset, len(view))
        return budget

    def _begins_wait(self, message: _Message, size_bytes: int) -> bool:
        """Whether the message waits for a warm block, once: until it is back, or time is up."""
        assert self._arena is not None
        if message.waited or not self._arena.may_return(size_bytes):
            return False
        message.waited = True
        wait_s = self._patience.wait_s(size_bytes)
        if wait_s:
            self._waiting_bytes = size_bytes
            self._waiting = self._loop.call_later(wait_s, self._advance)
        return bool(wait_s)

    def _end_wait(self) -> None:
        if self._waiting is not None:
            assert self._arena is not None
            self._waiting.cancel()
            self._waiting = None
            self._patience.waited(in_vain=self._arena.may_return(self._waiting_bytes))

    def _lend(self, message: _Message, index: int, block: Block, offset: int, size_bytes: int) -> None:
        message.lent[index] = (offset, size_bytes)
        message.blocks.append(block)
        message.index += 1

    def _put_out_lent(self, message: _Message) -> None:
        pieces, size = pack_lent(message.frames, message.lent)
        if message.lent:
            assert self._channel is not None
            assert self._arena is not None
            while message.blocks:  # each is the message's or the channel's: both let go of what they have
                self._channel.lend(message.blocks.pop(0))
            if not self._channel.peer_takes_no_more:
                lent_bytes = sum(size_bytes for _, size_bytes in message.lent.values())
                self._unread.append((self._channel.lent, lent_bytes))
                self._unread_bytes += lent_bytes
            housekeeping.look_after(self._arena)
        self._put_out(pieces, size)

    # -- the queue

    @property
    def ready_for_direct(self) -> bool:
        return not self._outgoing and super().ready_for_direct

    @property
    def queued_bytes(self) -> int:
        return 0 if self._dropped else super().queued_bytes + self._outgoing_bytes + self._unread_bytes

    async def drain(self) -> None:
        while True:
            if self._ended is not None:
                raise self._sending_error()
            if not self._write_paused and not self._held_back:
                return
            await self._wait_drained()

    def resume_writing(self) -> None:
        self._write_paused = False
        if not self._held_back:
            self._wake_drainers(None)

    def _look_at_queue(self) -> None:
        waiting = self._outgoing_bytes + self._unread_bytes
        if waiting > self._settings.high_water_bytes:
            self._held_back = True
        elif self._held_back and waiting <= self._settings.low_water_bytes:
            self._held_back = False
            if not self._write_paused:
                self._wake_drainers(None)

    # -- the channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._channel is not None
        assert self._channel.returning is not None
        self._channel.returning.on_full = self._tell_later
        self._loop.add_reader(self._channel.fileno(), self._on_news)

    def _on_news(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            if not channel.receive_untrusted():
                self._loop.remove_reader(channel.fileno())  # the stream tells what became of the peer
        except (RemoteProtocolError, CommBrokenError) as exc:
            self._loop.remove_reader(channel.fileno())
            self._end(exc, hard=True)
            return
        while self._unread and (channel.peer_takes_no_more or self._unread[0][0] <= channel.taken):
            self._unread_bytes -= self._unread.popleft()[1]
        if self._arena is not None:
            housekeeping.look_after(self._arena)  # what has come back is idle now
        if self._waiting is not None:
            assert self._arena is not None
            if not self._arena.may_return(self._waiting_bytes):
                self._advance()
        elif not self._copying and self._outgoing and not self._dropped:
            self._advance()
        self._look_at_queue()

    def _borrow_untrusted(self, offset: int, size_bytes: int) -> memoryview:
        channel = self._channel
        if channel is not None:
            channel.find_arena_untrusted()
        if channel is None or channel.peer_arena is None or channel.returning is None:
            raise RemoteProtocolError("the peer lent memory of an arena that it has not offered")
        number = self._borrowed
        self._borrowed += 1
        self._bytes_received += size_bytes
        return leases.borrow_untrusted(channel.peer_arena, offset, size_bytes, number, channel.returning)

    def _hand_over(self, frames: list[memoryview]) -> None:
        super()._hand_over(frames)
        if self._borrowed != self._told and self._channel is not None and self._channel.returning is not None:
            self._told = self._borrowed
            self._channel.returning.taken(self._told)

    def _tell_later(self) -> None:
        """The channel is full of news of leases; called by any thread, and from finalizers."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._tell_when_writable)

    def _tell_when_writable(self) -> None:
        if self._channel is not None:
            self._loop.add_writer(self._channel.fileno(), self._tell_on)

    def _tell_on(self) -> None:
        channel = self._channel
        if channel is None:
            return
        returning = channel.returning
        if returning is None or (returning.flush() and not returning.has_news):  # threads may have more meanwhile
            self._loop.remove_writer(channel.fileno())

    # -- ending

    def _say_goodbye(self) -> None:
        if not self._discarding and self._channel is not None:
            self._channel.take_no_more(
                self._borrowed
            )  # else a peer that closes too would wait until its last messages are read
        if not self._outgoing:
            super()._say_goodbye()
            return
        self._mark_ended(CommClosedError(f"the link to {self.peer_address} was closed by this side", by="local"))
        self._discarding = True
        self._goodbye_due = True

    async def _wait_flushed(self) -> None:
        if self._goodbye_due and not self._lost.done():
            if self._flushed is None:
                self._flushed = self._loop.create_future()
            await asyncio.wait(
                (self._flushed, self._lost), timeout=self._settings.heartbeat_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._goodbye_due:
                self._goodbye_due = False
                self._drop(hard=True)
                return
        await super()._wait_flushed()

    def _end(self, error: Exception, *, hard: bool = False) -> None:
        # Its traceback would keep the channel and the peer's arena open for as long as somebody keeps the error.
        super()._end(error.with_traceback(None), hard=hard)

    def _drop(self, *, hard: bool) -> None:
        self._end_wait()
        for message in self._outgoing:
            assert self._arena is not None
            if message.copy is not None:
                message.copy.stop()
                message.blocks.append(message.copy.block)
            for block in message.blocks:
                self._arena.release(block)
        self._outgoing.clear()
        self._outgoing_bytes = 0
        super()._drop(hard=hard)

    def connection_lost(self, exc: Exception | None) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._loop.remove_reader(channel.fileno())
            self._loop.remove_writer(channel.fileno())
            housekeeping.adopt(channel)
        super().connection_lost(exc)
