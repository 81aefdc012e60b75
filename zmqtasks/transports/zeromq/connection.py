"""Connections, which belong to libzmq: what can be known of them, and done to them, from outside.

libzmq may close a descriptor at any time, and the kernel give it to something else, perhaps to another link with the same
peer: every look takes a handle of its own, and goes by the names of both ends.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zmqtasks.transports.sockets import stays_on_host
from zmqtasks.transports.zeromq.sockets import borrowed_socket

if TYPE_CHECKING:
    from zmqtasks.transports.zeromq.router import RouterComm

_TCP_INFO = getattr(socket, "TCP_INFO", 11)  # elsewhere the option is unknown, and so the answer
_BYTES_RECEIVED_OFFSET = 128  # struct tcp_info in linux/tcp.h, since Linux 4.1
_TCP_INFO_BYTES = 136
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


@dataclass(slots=True, eq=False)
class Connection:
    """A connection, from the monitor's ACCEPTED or CONNECTED to its DISCONNECTED."""

    fd: int
    name: tuple[str, int]
    """Of the other end."""
    own_name: tuple[str, int]
    hang_up_at: float = float("inf")
    """When to hang up; infinity: not at all."""
    comm: RouterComm | None = None
    over: bytes | None = None
    """The routing id of its comm that has ended: what still comes from there is of no interest."""
    seen_bytes: int = 0
    """Taken from ZeroMQ, with what the ZMTP framing takes at most."""

    @classmethod
    def found(cls, fd: int) -> Connection | None:
        """What that descriptor of libzmq's is now; None when it is nothing."""
        handle = borrowed_socket(fd)
        if handle is None:
            return None
        with handle:
            try:
                return cls(fd, handle.getpeername()[:2], handle.getsockname()[:2])
            except OSError:
                return None

    def received_bytes(self) -> int:
        """What the kernel has received by it in all; 0 where it does not tell, or when it is gone."""
        handle = self._handle()
        if handle is None:
            return 0
        with handle:
            try:
                info = handle.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
            except OSError:
                return 0
        return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED_OFFSET)[0]) if len(info) >= _TCP_INFO_BYTES else 0

    def stays_on_host(self) -> bool:
        """Whether the caller is on this host, as far as its address tells."""
        handle = self._handle()
        if handle is None:
            return False
        with handle, contextlib.suppress(OSError):
            return stays_on_host(handle)
        return False

    def hang_up(self) -> None:
        """Ends it under ZeroMQ, which notices and cleans up; ROUTER has no call for that, and DEALER's is not safe."""
        handle = self._handle()
        if handle is not None:
            with handle, contextlib.suppress(OSError):
                # With a reset: after an orderly end a caller in the middle of a flood would wait for room.
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
                handle.shutdown(socket.SHUT_RDWR)

    def _handle(self) -> socket.socket | None:
        handle = borrowed_socket(self.fd)
        if handle is not None:
            try:
                if handle.getpeername()[:2] == self.name and handle.getsockname()[:2] == self.own_name:
                    return handle
            except OSError:
                pass
            handle.close()
        return None
