"""Messages over TCP.

Comm and connecting are those of `stream_comm` and `stream_transport`, the wire that of `stream`, liveness that of
`liveness`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from zmqtasks.errors import CommBrokenError
from zmqtasks.transports.address import format_host_port, parse_host_port
from zmqtasks.transports.base import Capabilities, Comm, LinkSettings, Listener
from zmqtasks.transports.liveness import DETECTS_CUT_LINK, LinkWatch, set_keepalive
from zmqtasks.transports.sockets import connect_socket, connectable_host, listening_socket
from zmqtasks.transports.stream_comm import StreamComm
from zmqtasks.transports.stream_transport import StreamListener, StreamTransport


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


class TcpTransport(StreamTransport):
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

    async def connect_socket(self, address: str, settings: LinkSettings) -> socket.socket:
        return await connect_socket(parse_host_port(address), settings.connect_timeout_s)

    def make_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(sock, settings.heartbeat_s)
        local, peer = (_address_of(self.scheme, name) for name in (sock.getsockname(), sock.getpeername()))
        return TcpComm(asyncio.get_running_loop(), sock, settings, local, peer)

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
