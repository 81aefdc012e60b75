"""Comms over connected stream sockets, on asyncio transports (uvloop's, by preference): what tcp and unix share.

The wire is that of `stream`. What matters beyond it:

- *Closing.* A socket that is closed while the peer still sends fails the peer's writes, and over TCP resets the link,
  which can destroy what the peer has not read yet. So `close` says goodbye, shuts down its own direction, and reads on
  (dropping everything) until the peer, having read the goodbye, closes. It returns at the latest `_LINGER_S` after all
  is flushed, and lingers on behind.
- *Sending.* A small message that comes alone is written at once, past the event loop's transport; small ones that
  follow within the same turn of the loop are collected and written together at its end (a write is a system call of
  5 us). So may one from another thread (`send_direct`), over a descriptor of its own: the loop can't close it meanwhile.
- *Connecting* ends when the listener's preamble has come: a socket that only accepts, or speaks something else, is no
  peer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import cast

from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    RemoteProtocolError,
)
from zmqtasks.protocol.frames import KIB, Frames, Limits
from zmqtasks.transports.base import Comm, LinkSettings, Listener, Transport
from zmqtasks.transports.lifecycle import LoopComm
from zmqtasks.transports.stream import GOODBYE, PREAMBLE, StreamReader, pack_message

_log = logging.getLogger(__name__)

_COLLECT_BYTES = 64 * KIB
"""Small messages of one turn of the loop are written when they reach this."""

_LINGER_S = 1.0
"""How long `close` waits for the peer to close too; a peer that is busy for longer is left to the background."""

_ACCEPTS_PER_TURN = 64
_ACCEPT_RETRY_S = 0.5


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
        self._sent_at = -1.0  # when the last was written at once; the loop's time stands still for (about) a turn
        self._direct: socket.socket | None = (
            None  # for other threads: a descriptor that the loop does not close under them
        )
        self._direct_lock = threading.Lock()
        self._direct_rest = b""  # what the kernel did not take of a direct message: goes first

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        pieces, size = pack_message(frames)
        self._messages_sent += 1
        self._bytes_sent += size
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
            and not self._turn_open
            and not self._direct_rest
            and not self._transport.get_write_buffer_size()
        )

    def send_direct(self, frames: Frames) -> None:
        pieces, size = pack_message(frames)
        with self._direct_lock:
            if self._ended is not None:
                raise self._ended.with_traceback(None)
            self._messages_sent += 1
            self._bytes_sent += size
            data = b"".join(pieces)
            try:
                if self._direct is None:
                    self._direct = self._sock.dup()
                sent = self._direct.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the loop learns of it too, and ends the comm
            if sent < len(data):
                self._direct_rest = data[sent:]
                self._loop.call_soon_threadsafe(self._write_direct_rest)

    def _write_direct_rest(self) -> None:
        with self._direct_lock:
            rest, self._direct_rest = self._direct_rest, b""
        if rest and not self._dropped:
            self._transport.write(rest)

    async def drain(self) -> None:
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        if self._write_paused:
            await self._wait_drained()

    @property
    def queued_bytes(self) -> int:
        if self._dropped:
            return 0
        return self._transport.get_write_buffer_size() + self._collected_bytes

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
        await asyncio.wait(
            (flushed, self._lost), timeout=self._settings.heartbeat_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not flushed.done():
            flushed.cancel()
            self._drop(hard=True)

    def _drop(self, *, hard: bool) -> None:
        self._dropped = True
        self._collected.clear()
        self._collected_bytes = 0
        if not self._lost.done():
            self._transport.abort()

    # -- writing

    def _end_turn(self) -> None:
        self._turn_open = False
        if self._collected:
            self._write_collected()

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
        if self._reading and self._greeted.done() and self._ended is None:
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
                    self._end(CommClosedError(f"{self.peer_address} closed the link", by="peer"))
        except RemoteProtocolError as exc:
            self._end(exc)
        finally:
            reader.keep_rest()

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(self._settings.high_water_bytes, self._settings.low_water_bytes)
        self._transport.write(PREAMBLE)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._bytes_received += nbytes
        if not self._discarding:
            self._reader.received(nbytes)
            self._deliver()

    def eof_received(self) -> bool:
        self._end(CommBrokenError(f"the link to {self.peer_address} broke: the peer is gone without saying goodbye"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        with self._direct_lock:
            if self._direct is not None:
                self._direct.close()
                self._direct = None
        self._lost.set_result(None)
        if not self._greeted.done():
            self._greeted.set_result(None)
        error = CommBrokenError(f"the link to {self.peer_address} broke: {exc or 'the connection was closed'}")
        error.__cause__ = exc
        self._end(error)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_drainers(None)

    async def wait_greeted(self) -> None:
        """Waits for the peer's preamble, or the comm's end; used by `connect`."""
        await asyncio.shield(self._greeted)


class StreamListener(Listener):
    """A listening socket and the turn-wise accepting from it; made by a `StreamTransport`."""

    def __init__(
        self,
        transport: StreamTransport,
        sock: socket.socket,
        address: str,
        on_comm: Callable[[Comm], None],
        settings: LinkSettings,
    ) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._sock = sock
        self._on_comm = on_comm
        self._settings = settings
        self._accepting: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._turned_away: set[str] = set()
        self._loop.add_reader(sock, self._accept)

    async def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            if self._retry is not None:
                self._retry.cancel()
        if self._accepting:
            await asyncio.wait(self._accepting)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _peer = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                # Out of descriptors or memory: the backlog keeps the callers waiting meanwhile.
                _log.warning(
                    "%s cannot accept a connection: %s; trying again in %g s", self.address, exc, _ACCEPT_RETRY_S
                )
                self._loop.remove_reader(self._sock)
                self._retry = self._loop.call_later(_ACCEPT_RETRY_S, self._accept_again)
                return
            task = self._loop.create_task(self._make_comm(sock))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    def _accept_again(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock, self._accept)

    async def _make_comm(self, sock: socket.socket) -> None:
        try:
            comm = await self._transport.open_comm(sock, self._settings)
        except ConnectError as exc:
            if str(exc) not in self._turned_away:  # told once: whoever tries all day does not fill the log
                self._turned_away.add(str(exc))
                _log.warning("%s turned a connection away: %s", self.address, exc)
            return
        except OSError as exc:  # the caller has hung up already
            _log.debug("a connection to %s was lost while it was accepted: %s", self.address, exc)
            return
        try:
            self._on_comm(comm)
        except Exception:
            _log.exception("on_comm of %s failed: the link from %s is aborted", self.address, comm.peer_address)
            comm.abort("refused")


class StreamTransport(Transport):
    """Base of transports over stream sockets: subclasses make the sockets and say what an address is."""

    @abstractmethod
    async def connect_socket(self, address: str, settings: LinkSettings) -> socket.socket:
        """A socket connected to `address`; raises `OSError`, `ConnectError` or `AddressError`, and leaves nothing."""

    @abstractmethod
    def make_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        """A comm for a connected socket, with the options set that it needs; not yet attached to the event loop.

        Raises `ConnectError` when whoever is at the other end must not be, `OSError` when the connection is gone.
        """

    @abstractmethod
    def why_no_answer(self) -> str:
        """A question that leads to the cause when nothing answers."""

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        comm: StreamComm | None = None
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                sock = await self.connect_socket(address, settings)
                comm = await self.open_comm(sock, settings)
                await comm.wait_greeted()
        except TimeoutError as exc:
            if comm is not None:
                comm.abort()
            raise ConnectTimeoutError(
                f"nothing answered at {address} within {settings.connect_timeout_s:g} s: {self.why_no_answer()}"
            ) from exc
        except (ConnectError, asyncio.CancelledError):
            if comm is not None:
                comm.abort()
            raise
        except ConnectionRefusedError as exc:
            raise ConnectionRefusedByPeerError(f"nobody listens at {address}: is the node running?") from exc
        except OSError as exc:
            raise ConnectError(f"no link to {address}: {exc.strerror or exc}") from exc
        if isinstance(comm.ended, RemoteProtocolError):
            raise ConnectError(f"{address} is not a zmqtasks node over {self.scheme}: {comm.ended}") from comm.ended
        if isinstance(comm.ended, CommError):
            raise ConnectionRefusedByPeerError(f"{address} turned the connection away: {comm.ended}") from comm.ended
        return comm

    async def open_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        """A comm over a connected socket, which it owns from now on; on failure the socket is closed."""
        loop = asyncio.get_running_loop()
        try:
            sock.setblocking(False)
            comm = self.make_comm(sock, settings)
        except BaseException:
            sock.close()
            raise
        # Of the ways to attach a socket, this one takes every family, and serves the calling side as well. Shielded, as
        # it takes two turns of the loop and, cancelled half-way, uvloop would close a descriptor that `sock` still
        # thinks to own.
        attaching = loop.create_task(loop.connect_accepted_socket(lambda: comm, sock))
        try:
            await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(lambda done: None if done.cancelled() or done.exception() else comm.abort())
            raise
        return comm
