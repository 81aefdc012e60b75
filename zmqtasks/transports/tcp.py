"""Messages over TCP, on asyncio transports (uvloop's, by preference).

The wire is that of `stream`, liveness that of `liveness`. What is particular to TCP:

- *Closing.* A socket that is closed while the peer still sends answers with a reset, which can destroy what the peer
  has not read yet. So `close` says goodbye, shuts down its own direction, and reads on (dropping everything) until the
  peer, having read the goodbye, closes. It returns at the latest `_LINGER_S` after all is flushed, and lingers on
  behind.
- *Sending.* The first message of a turn of the loop is written at once; small ones that follow in the same turn are
  collected and written together at its end (a write is a system call of 5 us).
- *Connecting* ends when the listener's preamble has come: a port that only accepts, or speaks something else, is no
  peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
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
from zmqtasks.transports.address import format_host_port, parse_host_port
from zmqtasks.transports.base import Capabilities, Comm, LinkSettings, Listener, Transport
from zmqtasks.transports.lifecycle import LoopComm
from zmqtasks.transports.liveness import DETECTS_CUT_LINK, LinkWatch, set_keepalive
from zmqtasks.transports.sockets import connect_socket, connectable_host, listening_socket
from zmqtasks.transports.stream import GOODBYE, PREAMBLE, StreamReader, pack_message

_log = logging.getLogger(__name__)

_COLLECT_BYTES = 64 * KIB
"""Small messages of one turn of the loop are written when they reach this."""

_LINGER_S = 1.0
"""How long `close` waits for the peer to close too; a peer that is busy for longer is left to the background."""

_ACCEPTS_PER_TURN = 64
_ACCEPT_RETRY_S = 0.5


class TcpComm(LoopComm, asyncio.BufferedProtocol):
    """A comm over one TCP connection; made by `TcpTransport`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, settings: LinkSettings, scheme: str
    ) -> None:
        super().__init__(loop, settings)
        self._sock = sock
        self.local_address = _address_of(scheme, sock.getsockname())
        self.peer_address = _address_of(scheme, sock.getpeername())
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._watch: LinkWatch | None = None
        self._reader = StreamReader(settings.limits)
        self._greeted = loop.create_future()  # done when the peer's preamble has come, or the comm has ended before
        self._lost = loop.create_future()  # done when the connection is gone and its descriptor closed
        self._reading = True
        self._discarding = False  # close() was called: what comes is dropped
        self._dropped = False
        self._write_paused = False
        self._collected: list[bytes] = []
        self._collected_bytes = 0
        self._turn_open = False  # something was written in this turn of the loop

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        pieces, size = pack_message(frames)
        self._messages_sent += 1
        self._bytes_sent += size
        if self._turn_open and size <= _COLLECT_BYTES:
            self._collected += cast(list[bytes], pieces)
            self._collected_bytes += size
            if self._collected_bytes > _COLLECT_BYTES:
                self._write_collected()
            return
        if not self._turn_open:
            self._turn_open = True
            self._loop.call_soon(self._end_turn)
        elif self._collected:
            self._write_collected()
        for piece in pieces:
            self._transport.write(piece)

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
        if self._watch is not None:
            self._watch.stop()
        if self._lost.done():
            return
        if hard:  # a reset: the kernel forgets what it has not sent yet
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
        if DETECTS_CUT_LINK:
            self._watch = LinkWatch(self._loop, self._sock, self._settings.heartbeat_s, self._cut)

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

    def _cut(self) -> None:
        self._end(
            CommBrokenError(
                f"the link to {self.peer_address} broke: nothing was acknowledged for {self._settings.heartbeat_s:g} s"
            ),
            hard=True,
        )

    async def wait_greeted(self) -> None:
        """Waits for the peer's preamble, or the comm's end; used by `connect`."""
        await asyncio.shield(self._greeted)


class TcpListener(Listener):
    """A listening socket and the turn-wise accepting from it; made by `TcpTransport`."""

    def __init__(
        self, sock: socket.socket, on_comm: Callable[[Comm], None], settings: LinkSettings, scheme: str
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_comm = on_comm
        self._settings = settings
        self._scheme = scheme
        self._accepting: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        host, port = sock.getsockname()[:2]
        self.address = format_host_port(scheme, connectable_host(host, sock.family), port)
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
            comm = await _comm_over(sock, self._settings, self._scheme, accepted=True)
        except OSError as exc:  # the caller has hung up already
            _log.debug("a connection to %s was lost while it was accepted: %s", self.address, exc)
            return
        try:
            self._on_comm(comm)
        except Exception:
            _log.exception("on_comm of %s failed: the link from %s is aborted", self.address, comm.peer_address)
            comm.abort("refused")


class TcpTransport(Transport):
    """Frames over TCP, between any two hosts; neither encrypted nor authenticated by itself."""

    scheme = "tcp"
    capabilities = Capabilities(
        crosses_hosts=True,
        crosses_processes=True,
        encrypts=False,
        shares_memory=False,
        detects_cut_link=DETECTS_CUT_LINK,
        uses_ip=True,
        untrusted_peers=True,
    )

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        where = parse_host_port(address)
        comm: TcpComm | None = None
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                sock = await connect_socket(where, settings.connect_timeout_s)
                comm = await _comm_over(sock, settings, self.scheme, accepted=False)
                await comm.wait_greeted()
        except TimeoutError as exc:
            if comm is not None:
                comm.abort()
            raise ConnectTimeoutError(
                f"nothing answered at {address} within {settings.connect_timeout_s:g} s: is a node running there, "
                f"and does a firewall let it be reached?"
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
            raise ConnectError(f"{address} is not a zmqtasks node over tcp: {comm.ended}") from comm.ended
        if isinstance(comm.ended, CommError):
            raise ConnectionRefusedByPeerError(f"{address} turned the connection away: {comm.ended}") from comm.ended
        return comm

    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        where = parse_host_port(address, default_port=0)
        return TcpListener(await listening_socket(where), on_comm, settings, self.scheme)


async def _comm_over(sock: socket.socket, settings: LinkSettings, scheme: str, *, accepted: bool) -> TcpComm:
    """A comm over a connected socket, which it owns from now on; on failure the socket is closed."""
    loop = asyncio.get_running_loop()
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(sock, settings.heartbeat_s)
        comm = TcpComm(loop, sock, settings, scheme)
    except BaseException:
        sock.close()
        raise
    # Shielded, as it takes two turns of the loop and, cancelled half-way, uvloop would close a descriptor that `sock`
    # still thinks to own.
    if accepted:
        wrapping = loop.create_task(loop.connect_accepted_socket(lambda: comm, sock))
    else:
        wrapping = loop.create_task(loop.create_connection(lambda: comm, sock=sock))
    try:
        await asyncio.shield(wrapping)
    except asyncio.CancelledError:
        wrapping.add_done_callback(lambda done: None if done.cancelled() or done.exception() else comm.abort())
        raise
    return comm


def _address_of(scheme: str, name: tuple[str, int]) -> str:
    host = name[0].removeprefix("::ffff:") if "." in name[0] else name[0]
    return format_host_port(scheme, host, name[1])
