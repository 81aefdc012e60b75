"""Comms over connected stream sockets, on asyncio transports (uvloop's, by preference): what tcp and unix share.

The wire is that of `stream`. What matters beyond it:

- *Closing.* A socket that is closed while the peer still sends fails the peer's writes, and over TCP resets the link,
  which can destroy what the peer has not read yet. So `close` says goodbye, shuts down its own direction, and reads on
  (dropping everything) until the peer, having read the goodbye, closes. It returns at the latest `_LINGER_S` after all
  is flushed, and lingers on behind.
- *Sending.* A small message that comes alone is written at once, past the event loop's transport; small ones that
  follow within the same turn of the loop are collected and written together at its end (a write is a system call of
  5 us). So may one from another thread (`send_direct`), over a descriptor of its own: the loop can't close it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import cast

from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    RemoteProtocolError,
)
from zmqtasks.protocol.frames import KIB, Frames, Limits
from zmqtasks.transports.base import LinkSettings
from zmqtasks.transports.inheritance import keep_from_children
from zmqtasks.transports.lifecycle import LoopComm
from zmqtasks.transports.stream import GOODBYE, PREAMBLE, StreamReader, pack_message

_COLLECT_BYTES = 64 * KIB
"""Small messages of one turn of the loop are written when they reach this."""

_LINGER_S = 1.0
"""How long `close` waits for the peer to close too; a peer that is busy for longer is left to the background."""


class StreamComm(LoopComm, asyncio.BufferedProtocol):
    """A comm over one connected stream socket; made by a `StreamTransport`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        settings: LinkSettings,
        local_address: str,
        peer_address: str,
    ) -> None:
        super().__init__(loop, settings)
        self._sock = sock
        self.local_address = local_address
        self.peer_address = peer_address
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._reader = StreamReader(settings.limits)
        self._greeted = loop.create_future()  # done when the peer's preamble has come, or the comm has ended before
        self._lost = loop.create_future()  # done when the connection is gone and its descriptor closed
        self._reading = True
        self._discarding = False  # close() was called: what comes is dropped
        self._dropped = False
        self._write_paused = False
        self._collected: list[bytes] = []
        self._collected_bytes = 0
        self._turn_open = False  # small messages are collected until the end of this turn of the loop
        # When the last was written at once: uvloop's time goes by milliseconds, that is for about a turn or some; and
        # what comes begins a turn for certain, so that an answer need not wait for the end of it.
        self._sent_at = -1.0
        self._direct: socket.socket | None = (
            None  # for other threads: a descriptor that the loop does not close under them
        )
        self._direct_lock = threading.Lock()
        self._threads_may_ask = False
        self._direct_rest = b""  # what the kernel did not take of a direct message: goes first

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._sending_error()
        pieces, size = pack_message(frames)
        self._messages_sent += 1
        self._bytes_sent += size
        self._put_out(pieces, size)

    def _put_out(self, pieces: list[bytes | memoryview], size: int) -> None:
        """Writes one packed message of `size` bytes, which is counted already, or collects it with others of this turn."""
        if self._direct_rest:
            self._write_direct_rest()
        if size > _COLLECT_BYTES:
            if self._collected:
                self._write_collected()
            for piece in pieces:
                self._transport.write(piece)
            return
        now = self._loop.time()
        if now != self._sent_at and not self._turn_open and not self._transport.get_write_buffer_size():
            self._sent_at = now
            self._write_at_once(b"".join(pieces))
            return
        if not self._turn_open:
            self._turn_open = True
            self._loop.call_soon(self._end_turn)
        self._collected += cast(list[bytes], pieces)
        self._collected_bytes += size
        if self._collected_bytes > _COLLECT_BYTES:
            self._write_collected()

    def _write_at_once(self, data: bytes) -> None:
        """Past the transport, which would go round the loop once more: 5 to 10 us a message (`bench.links`)."""
        try:
            sent = self._sock.send(data)
        except OSError:  # a full buffer, or an end that the transport shall find
            sent = 0
        if sent < len(data):
            self._transport.write(memoryview(data)[sent:])

    @property
    def ready_for_direct(self) -> bool:
        return (
            self._ended is None
            and self._threads_may_ask
            and not self._turn_open  # in the order in which the loop moves it on: nothing slips by
            and not self._direct_rest
            and not self._transport.get_write_buffer_size()
        )

    def send_direct(self, frames: Frames) -> None:
        pieces, size = pack_message(frames)
        with self._direct_lock:
            if self._ended is not None:
                raise self._sending_error()
            self._messages_sent += 1
            self._bytes_sent += size
            data = b"".join(pieces)
            try:
                if self._direct is None:
                    self._direct = self._sock.dup()
                    keep_from_children(self._direct)
                sent = self._direct.send(data)
            except OSError:  # a full buffer, no descriptor left, or an end that the transport shall find
                sent = 0
            if sent < len(data):
                self._direct_rest = data[sent:]
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._write_direct_rest)

    def _write_direct_rest(self) -> None:
        if rest := self._direct_rest:
            if not self._dropped:
                self._transport.write(rest)
            self._direct_rest = b""  # last: up to here no other thread sends

    async def drain(self) -> None:
        if self._ended is not None:
            raise self._sending_error()
        if self._write_paused:
            await self._wait_drained()

    @property
    def queued_bytes(self) -> int:
        if self._dropped:
            return 0
        return self._transport.get_write_buffer_size() + self._collected_bytes + len(self._direct_rest)

    def set_limits(self, limits: Limits) -> None:
        self._reader.set_limits(limits)

    async def close(self) -> None:
        if self._ended is None:
            self._say_goodbye()
        self._closing = True
        try:
            await self._wait_flushed()
            self._tell_end_soon()
            await asyncio.wait_for(asyncio.shield(self._lost), _LINGER_S)
        except TimeoutError:
            # The peer's kernel has, or will get, all of it; what the peer itself does is its own business.
            self._loop.call_later(self._settings.heartbeat_s, self._transport.abort)
        except asyncio.CancelledError:
            self._tell_end_soon()
            self._drop(hard=True)
            raise
        finally:
            self._closing = False

    def _say_goodbye(self) -> None:
        with self._direct_lock:  # another thread has sent by now, or finds the end
            self._write_direct_rest()
            self._mark_ended(CommClosedError(f"the link to {self.peer_address} was closed by this side", by="local"))
        self._discarding = True
        self._write_collected()
        self._transport.write(GOODBYE)
        self._transport.set_write_buffer_limits(0)  # resume_writing now means: all is with the kernel
        self._transport.write_eof()
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    async def _wait_flushed(self) -> None:
        if not self._discarding or not self._write_paused or self._lost.done():
            return
        flushed = self._loop.create_task(self._wait_drained())
        try:
            await asyncio.wait(
                (flushed, self._lost), timeout=self._settings.heartbeat_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not flushed.done():
                self._drop(hard=True)
        finally:
            flushed.cancel()

    def _drop(self, *, hard: bool) -> None:
        self._dropped = True
        self._collected.clear()
        self._collected_bytes = 0
        if not self._lost.done():
            if hard:  # a child that was forked with it would keep the connection up
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._transport.abort()

    # -- writing

    def _end_turn(self) -> None:
        if self._collected:
            self._write_collected()
        self._turn_open = False  # last: up to here no other thread sends

    def _write_collected(self) -> None:
        collected, self._collected = self._collected, []
        self._collected_bytes = 0
        if collected and not self._dropped:
            self._transport.write(b"".join(collected))

    # -- reading

    def _delivery_changed(self) -> None:
        if self._delivering:
            self._loop.call_soon(self._go_on)
        else:
            self._pause_reading()

    def _go_on(self) -> None:
        """Delivers what was read before the pause, then reads on."""
        if not self._delivering:
            return
        self._reader.take_rest()
        self._deliver()
        if self._delivering and not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _pause_reading(self) -> None:
        # The preamble is read in any case: connect() waits for it, and a stranger shall be told at once.
        if self._reading and self._greeted.done() and not self._discarding and not self._dropped:
            self._reading = False
            self._transport.pause_reading()

    def _deliver(self) -> None:
        """Parses what was received and hands on whole messages, for as long as they are wanted."""
        reader = self._reader
        try:
            if not self._greeted.done():
                if not reader.next_preamble_untrusted():
                    return
                self._greeted.set_result(None)
            if not self._delivering:
                self._pause_reading()
            while self._delivering:
                frames = reader.next_message_untrusted()
                if frames is None:
                    break
                if frames:
                    self._hand_over(frames)
                else:
                    self._nothing_follows(CommClosedError(f"{self.peer_address} closed the link", by="peer"))
        except RemoteProtocolError as exc:
            self._end(exc)
        except Exception as exc:  # no memory, or what else the system refuses: what came by half is lost
            error = CommBrokenError(f"the link to {self.peer_address} broke: what came could not be taken: {exc!r}")
            error.__cause__ = exc
            self._end(error, hard=True)
        finally:
            reader.keep_rest()

    def _nothing_follows(self, end: CommError) -> None:
        """The stream ends behind the last message, in this way."""
        self._end(end)

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Other loops' transports change their buffers in several steps, between which another thread may look.
        self._threads_may_ask = type(transport).__module__.startswith("uvloop.")
        self._transport.set_write_buffer_limits(self._settings.high_water_bytes, self._settings.low_water_bytes)
        self._transport.write(PREAMBLE)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._bytes_received += nbytes
        self._sent_at = -1.0
        if self._discarding:
            return
        reader = self._reader
        if self._delivering and self._greeted.done() and (frames := reader.whole_message_untrusted(nbytes)) is not None:
            self._hand_over(frames)
        else:
            reader.received(nbytes)
            self._deliver()

    def eof_received(self) -> bool:
        error = CommBrokenError(f"the link to {self.peer_address} broke: the peer is gone without saying goodbye")
        self._nothing_follows(error)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set_result(None)
        if not self._greeted.done():
            self._greeted.set_result(None)
        error = CommBrokenError(f"the link to {self.peer_address} broke: {exc or 'the connection was closed'}")
        error.__cause__ = exc
        self._end(error)
        with self._direct_lock:  # who sends directly from now on finds the end, and makes no new one
            if self._direct is not None:
                self._direct.close()
                self._direct = None

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_drainers(None)

    async def wait_greeted(self) -> None:
        """Waits for the peer's preamble, or the comm's end; used by `connect`."""
        await asyncio.shield(self._greeted)
