"""Messages between processes of one user on one Linux host, over Unix domain sockets: `unix://name`.

Comm and connecting are those of `stream_comm` and `stream_transport`, the wire that of `stream`. Without TCP below, a
small message takes three quarters of the time, or less (`python -m bench.links`). What is particular:

- *Names* are those of Linux' abstract namespace (unix(7)), `\\0zmqtasks/NAME`: no file that could be left behind, or be
  in a folder that others can write to. A name is free again as soon as its listener is gone. `unix://` listens at a
  random name. The namespace belongs to the network namespace, so containers do not see each other's.
- *Users.* Abstract names have no permissions: anybody on the host can connect, and can take a name that is free. So each
  side asks the kernel who the other is (SO_PEERCRED) before a byte is read, and has nothing to do with anybody but the
  same user and root.
- *Liveness.* Both ends have the same kernel, which tells of every end at once: there is no cable to be cut.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import socket
import struct
import sys
from collections.abc import Callable
from typing import ClassVar

from zmqtasks.errors import AddressError, ConnectError
from zmqtasks.protocol.frames import KIB
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Capabilities, Comm, LinkSettings, Listener
from zmqtasks.transports.stream_comm import StreamComm
from zmqtasks.transports.stream_transport import StreamListener, StreamTransport

_NAME = re.compile(r"[A-Za-z0-9_.\-]+\Z")
_PATH_BYTES = 108  # of sockaddr_un.sun_path, see unix(7)
_RANDOM_NAME_BYTES = 8
_BACKLOG = 4096  # the kernel takes the smaller of this and net.core.somaxconn
_BACKLOG_FULL_RETRY_S = 0.01

_SEND_BUFFER_BYTES = 512 * KIB
"""What is under way in the kernel; the receiver's buffer does not matter (unix(7)). 64 MiB messages pass at 2.4 GB/s with
the default of 208 KiB, 2.9 with this, no more with 1 or 2 MiB, less with 4 (`python -m bench.links`, medians of 6)."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ROOT = 0


def widen(sock: socket.socket) -> None:
    """Lets the kernel take more of what a connected socket sends."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


class UnixTransport(StreamTransport):
    """Frames over Unix domain sockets, between processes of one user on one host."""

    scheme = "unix"
    kernel_prefix: ClassVar[bytes] = b"\0zmqtasks/"
    """In front of every name: the kernel's names of these listeners."""
    listener_class: ClassVar[type[StreamListener]] = StreamListener
    capabilities = Capabilities(
        crosses_hosts=False,
        crosses_processes=True,
        encrypts=False,
        shares_memory=False,
        detects_cut_link=False,
        uses_ip=False,
        untrusted_peers=True,
    )

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise AddressError(
                f"{self.scheme}:// needs the abstract socket names of Linux, and this is {sys.platform}: "
                f"use tcp://127.0.0.1:PORT"
            )

    async def connect_socket(self, address: str, settings: LinkSettings) -> socket.socket:
        target = self.kernel_prefix + self._name_in(address).encode()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(target)
                except BlockingIOError:  # no "in progress": the listener's backlog is full, and nothing tells when not
                    await asyncio.sleep(_BACKLOG_FULL_RETRY_S)
                else:
                    return sock
        except BaseException:
            sock.close()
            raise

    def make_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        local, peer = self.addresses_of(sock)
        widen(sock)
        comm = StreamComm(asyncio.get_running_loop(), sock, settings, local, peer)
        comm.same_host = True
        return comm

    def addresses_of(self, sock: socket.socket) -> tuple[str, str]:
        """Local and peer address of a connected socket; raises `ConnectError` when the peer is another user's."""
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        # Our calling side has no name: it is known by the listener's and its process. A stranger may have any.
        accepted = bool(sock.getsockname())
        name: bytes = sock.getsockname() if accepted else sock.getpeername()
        listener = f"{self.scheme}://{name.removeprefix(self.kernel_prefix).decode()}"
        local, peer = (listener, f"{listener}#{pid}") if accepted else (f"{listener}#{os.getpid()}", listener)
        if uid not in (os.geteuid(), _ROOT):
            what = "was called" if accepted else "is listened at"
            raise ConnectError(
                f"{listener} {what} by user {uid}: over {self.scheme}://, user {os.geteuid()} has only links with itself "
                f"and root; use tcp:// between users"
            )
        return local, peer

    def why_no_answer(self) -> str:
        return "is the process that listens there stopped, or busy?"

    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        if split_scheme(address) == (self.scheme, ""):
            address = f"{self.scheme}://{secrets.token_hex(_RANDOM_NAME_BYTES)}"
        name = self._name_in(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(self.kernel_prefix + name.encode())
            sock.listen(_BACKLOG)
        except OSError as exc:
            sock.close()
            taken = exc.errno == errno.EADDRINUSE
            hint = "the name is taken: choose another, or none for a random one" if taken else exc.strerror or exc
            raise ConnectError(f"cannot listen at {address}: {hint}") from exc
        return self.listener_class(self, sock, f"{self.scheme}://{name}", on_comm, settings)

    def _name_in(self, address: str) -> str:
        scheme, name = split_scheme(address)
        longest = _PATH_BYTES - len(self.kernel_prefix)
        if not name:
            raise AddressError(f"{address!r} names no listener: write it as '{scheme}://some-name'")
        if not _NAME.match(name):
            raise AddressError(f"{address!r}: {name!r} is no name for a socket: take letters, digits and any of '_.-'")
        if len(name) > longest:
            raise AddressError(f"{address!r}: the name has {len(name)} characters, at most {longest} are possible")
        return name
