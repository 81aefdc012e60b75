"""Messages over TCP, encrypted where they leave the host.

Comm and connecting are those of `stream_comm` and `stream_transport`, the wire that of `stream`, liveness that of
`liveness`, encryption that of `tls`. With a secret in the settings:

- the connecting side encrypts, unless the addresses of the socket say that both ends are on this host (and the settings
  leave such links alone);
- the listening side takes encrypted links from everywhere, and plain ones from this host only. It hears the first bytes
  of its caller before it says a word;
- the two sides may see different addresses (a port of a container that appears at the loopback address of its host,
  say): a plain caller that is told to encrypt dials once more and does. Nobody ever falls back to plain.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from zmqtasks.errors import CommBrokenError, ConnectError
from zmqtasks.protocol.frames import Frames
from zmqtasks.transports.address import format_host_port, parse_host_port
from zmqtasks.transports.base import Capabilities, Comm, Encryption, LinkSettings, Listener
from zmqtasks.transports.liveness import DETECTS_CUT_LINK, LinkWatch, set_keepalive
from zmqtasks.transports.sockets import connect_socket, connectable_host, first_bytes, listening_socket, stays_on_host
from zmqtasks.transports.stream import ENCRYPTION_NEEDED, PREAMBLE
from zmqtasks.transports.stream_comm import StreamComm
from zmqtasks.transports.stream_transport import ListenerEncryptsError, StreamListener, StreamTransport

if TYPE_CHECKING:
    from zmqtasks.transports.tls import TlsStream

_LAST_WORDS_S = 1.0
"""How long a caller that failed the TLS handshake has to read why."""


class TcpComm(StreamComm):
    """A comm over one TCP connection; made by `TcpTransport`."""

    _watch: LinkWatch | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if DETECTS_CUT_LINK:
            self._watch = LinkWatch(self._loop, self._sock, self._settings.heartbeat_s, self._cut)

    def _drop(self, *, hard: bool) -> None:
        if self._watch is not None:
            self._watch.stop()
        if hard and not self._lost.done():  # a reset: the kernel forgets what it has not sent yet
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        super()._drop(hard=hard)

    def _cut(self) -> None:
        self._end(
            CommBrokenError(
                f"the link to {self.peer_address} broke: nothing was acknowledged for {self._settings.heartbeat_s:g} s"
            ),
            hard=True,
        )


class EncryptedTcpComm(TcpComm):
    """A comm over one TLS link."""

    encrypted = True

    @property
    def ready_for_direct(self) -> bool:
        return False  # one TLS state serves both directions: it belongs to the loop

    def send_direct(self, frames: Frames) -> None:
        Comm.send_direct(self, frames)

    def _write_at_once(self, data: bytes) -> None:
        cast("TlsStream", self._transport).write_now(data)


class TcpTransport(StreamTransport):
    """Frames over TCP, between any two hosts."""

    scheme = "tcp"
    capabilities = Capabilities(
        crosses_hosts=True,
        crosses_processes=True,
        encrypts=True,
        shares_memory=False,
        detects_cut_link=DETECTS_CUT_LINK,
        uses_ip=True,
        untrusted_peers=True,
    )

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        try:
            return await super().connect(address, settings)
        except ListenerEncryptsError as exc:
            secret = settings.encryption.secret
            if secret is None:
                raise ConnectError(f"{exc}, and this side does not encrypt: --encryption must be the same") from exc
        comm = await super().connect(address, dataclasses.replace(settings, encryption=Encryption(secret, True)))
        comm.same_host = settings.encryption.same_host and comm.same_host
        return comm

    async def connect_socket(self, address: str, settings: LinkSettings) -> socket.socket:
        return await connect_socket(parse_host_port(address), settings.connect_timeout_s)

    def make_comm(self, sock: socket.socket, settings: LinkSettings, comm_class: type[TcpComm] = TcpComm) -> StreamComm:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(sock, settings.heartbeat_s)
        local, peer = (_address_of(self.scheme, name) for name in (sock.getsockname(), sock.getpeername()))
        comm = comm_class(asyncio.get_running_loop(), sock, settings, local, peer)
        comm.same_host = stays_on_host(sock)
        return comm

    async def open_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        encryption = settings.encryption
        if encryption.secret is not None and (encryption.same_host or not stays_on_host(sock)):
            return await self._open_encrypted(sock, settings, encryption.secret, server=False)
        return await super().open_comm(sock, settings)

    async def accept_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        secret = settings.encryption.secret
        if secret is None:
            return await super().open_comm(sock, settings)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                begin = await self._first_bytes(sock)
                if begin[0] != PREAMBLE[0]:  # TLS will say what else it is
                    return await self._open_encrypted(sock, settings, secret, server=True)
        except TimeoutError as exc:
            raise ConnectError(f"nothing came within {settings.connect_timeout_s:g} s") from exc
        if not settings.encryption.same_host and stays_on_host(sock):
            return await super().open_comm(sock, settings)
        with sock:
            sock.recv(len(PREAMBLE))  # else closing resets the link, and the caller never reads why
            sock.send(ENCRYPTION_NEEDED)
        raise ConnectError("a plain link came where this side encrypts: --encryption must be the same on all nodes")

    async def _first_bytes(self, sock: socket.socket) -> bytes:
        try:
            sock.setblocking(False)
            if begin := await first_bytes(sock, 1):
                return begin
            raise ConnectionResetError("the caller hung up without a word")
        except BaseException:
            sock.close()
            raise

    async def _open_encrypted(
        self, sock: socket.socket, settings: LinkSettings, secret: bytes, *, server: bool
    ) -> StreamComm:
        """Like `open_comm`; the TLS handshake is done when it returns."""
        from zmqtasks.transports.tls import TlsStream  # loads cryptography

        try:
            sock.setblocking(False)
            comm = self.make_comm(sock, settings, EncryptedTcpComm)
            stream = TlsStream(sock, secret, comm, server=server)
        except BaseException:
            sock.close()
            raise
        await self.attach(stream, sock)
        try:
            error = await asyncio.shield(stream.ready)
        except asyncio.CancelledError:
            stream.abort()
            raise
        if error is None:
            return comm
        await stream.end(_LAST_WORDS_S)
        raise error

    def why_no_answer(self) -> str:
        return "is a node running there, and does a firewall let it be reached?"

    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        sock = await listening_socket(parse_host_port(address, default_port=0))
        host, port = sock.getsockname()[:2]
        reached_at = format_host_port(self.scheme, connectable_host(host, sock.family), port)
        return StreamListener(self, sock, reached_at, on_comm, settings)


def _address_of(scheme: str, name: tuple[str, int]) -> str:
    host = name[0].removeprefix("::ffff:") if "." in name[0] else name[0]
    return format_host_port(scheme, host, name[1])
