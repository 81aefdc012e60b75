"""Connecting and listening for `ucx`: as for `tcp`, on whose stream a link is controlled."""

from __future__ import annotations

import socket

from zmqtasks.errors import ConnectError
from zmqtasks.transports.base import Capabilities, LinkSettings
from zmqtasks.transports.liveness import DETECTS_CUT_LINK
from zmqtasks.transports.stream_comm import StreamComm
from zmqtasks.transports.stream_transport import StreamTransport
from zmqtasks.transports.tcp import TcpComm, TcpTransport
from zmqtasks.transports.ucx import library
from zmqtasks.transports.ucx.comm import UcxComm


class UcxTransport(TcpTransport):
    """Large frames by UCX, everything else over TCP."""

    scheme = "ucx"
    capabilities = Capabilities(
        crosses_hosts=True,
        crosses_processes=True,
        encrypts=False,
        shares_memory=False,
        detects_cut_link=DETECTS_CUT_LINK,
        uses_ip=True,
        untrusted_peers=True,
    )

    def __init__(self) -> None:
        library.load()

    async def connect(self, address: str, settings: LinkSettings) -> StreamComm:  # nobody asks to encrypt here
        return await StreamTransport.connect(self, address, settings)  # type: ignore[return-value]

    def make_comm(self, sock: socket.socket, settings: LinkSettings, comm_class: type[TcpComm] = UcxComm) -> StreamComm:
        if settings.encryption.secret is not None:  # on loopback too: UCX's own sockets are not only there
            raise ConnectError(
                "ucx does not encrypt, and links shall be: take tcp, or --encryption off on a network that is trusted"
            )
        return super().make_comm(sock, settings, comm_class)

    async def open_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        return await StreamTransport.open_comm(self, sock, settings)

    async def accept_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        return await StreamTransport.open_comm(self, sock, settings)
