"""Messages between processes of one user on one Linux host, through shared memory: `shm://name`.

Names, users and liveness are those of `unix`; small frames and the order of all go through its socket. A frame of
`LEND_BYTES` and more is copied once, into the sender's arena (or made there, see `Comm.allocate`), and lent: the reader
maps it, copy on write. See `arena` for the memory, `channel` for the life of leases, `leases` for the reader's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket

from zmqtasks.errors import ConnectError
from zmqtasks.transports.base import Capabilities, LinkSettings
from zmqtasks.transports.shm.channel import Channel, greet, take_greeting_untrusted
from zmqtasks.transports.shm.comm import ShmComm
from zmqtasks.transports.shm.own_arena import process_arena
from zmqtasks.transports.stream_comm import StreamComm
from zmqtasks.transports.unix import UnixTransport, widen

_NAME_DIGITS = 40


class ShmTransport(UnixTransport):
    """Frames through memory that two processes of one user share."""

    scheme = "shm"
    kernel_prefix = b"\0zmqtasks-shm/"
    capabilities = Capabilities(
        crosses_hosts=False,
        crosses_processes=True,
        encrypts=False,
        shares_memory=True,
        detects_cut_link=False,
        uses_ip=False,
        untrusted_peers=True,
    )

    async def open_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        try:
            sock.setblocking(False)
            local, peer = self.addresses_of(sock)
            channel = greet(sock)
        except BaseException:
            sock.close()
            raise
        return await self._attach(sock, channel, settings, local, peer)

    async def accept_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        try:
            sock.setblocking(False)
            local, peer = self.addresses_of(sock)
            channel = await _channel_from(sock, settings.connect_timeout_s)
        except BaseException:
            sock.close()
            raise
        return await self._attach(sock, channel, settings, local, peer)

    async def _attach(
        self, sock: socket.socket, channel: socket.socket, settings: LinkSettings, local: str, peer: str
    ) -> StreamComm:
        widen(sock)
        arena = process_arena()
        loop = asyncio.get_running_loop()
        comm = ShmComm(loop, sock, settings, local, peer, Channel(channel, arena), arena)
        return await self.attach(comm, sock)


def shm_address(address: str) -> str:
    """Where a node that takes data at `address` takes it over shm, from processes on the same host.

    Whoever can find the name shares the host and the network namespace, in which `address` means one listener.
    """
    return f"{ShmTransport.scheme}://{hashlib.sha256(address.encode()).hexdigest()[:_NAME_DIGITS]}"


async def _channel_from(sock: socket.socket, timeout_s: float) -> socket.socket:
    """The channel that the caller hands over first; raises ConnectError when it does not."""
    if (channel := take_greeting_untrusted(sock)) is not None:
        return channel
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock.fileno(), wake)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await readable
    finally:
        loop.remove_reader(sock.fileno())
    if (channel := take_greeting_untrusted(sock)) is None:
        raise ConnectError("a caller over shm said nothing")
    return channel
