"""Makes connected and listening TCP sockets, with errors that name the address."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from typing import Any

from zmqtasks.errors import AddressError, ConnectError
from zmqtasks.transports.address import LOOPBACK, HostPort

_BACKLOG = 4096  # the kernel takes the smaller of this and net.core.somaxconn
_WILDCARDS = {"0.0.0.0", "::"}
_OUTSIDE = {
    socket.AF_INET: "192.0.2.1",
    socket.AF_INET6: "2001:db8::1",
}  # RFC 5737, RFC 3849: never answered, nor sent to

_AddrInfo = tuple[socket.AddressFamily, Any]


async def connect_socket(where: HostPort, timeout_s: float) -> socket.socket:
    """A socket connected to `where`: the first of the host's addresses that answers.

    Raises `ConnectError` for an unknown host, else the `OSError` of the last address tried. Each address but the last
    gets its share of `timeout_s`; the caller bounds the whole.
    """
    loop = asyncio.get_running_loop()
    targets = await resolve(where)
    failure: OSError = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    for index, (family, target) in enumerate(targets):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout_s / (len(targets) - index) if index < len(targets) - 1 else None):
                await loop.sock_connect(sock, target)
            if sock.getsockname() != sock.getpeername():
                return sock
            # TCP lets a socket connect to itself when the port it was given is the one it calls: nobody listens there.
            sock.close()
        except OSError as exc:  # TimeoutError is one
            failure = exc
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise failure


async def listening_socket(where: HostPort) -> socket.socket:
    """A socket that listens at `where`; raises `ConnectError` when the address is taken, or not of this host."""
    family, target = (await resolve(where))[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if where.host == "::" else 1)
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        match exc.errno:
            case errno.EADDRINUSE:
                hint = "the port is taken: choose another, or 0 for any free one"
            case errno.EADDRNOTAVAIL:
                hint = "the host is not an address of this machine"
            case _:
                hint = str(exc.strerror or exc)
        raise ConnectError(f"cannot listen at {where}: {hint}") from exc
    return sock


def is_loopback(numeric_host: str) -> bool:
    """Whether an address of an interface, as a number, is of this host alone."""
    return ipaddress.ip_address(numeric_host.partition("%")[0]).is_loopback


def stays_on_host(sock: socket.socket) -> bool:
    """Whether a connected socket's peer is on this host, as far as addresses tell: loopback, or one address for both."""
    own, peer = (ipaddress.ip_address(name[0].partition("%")[0]) for name in (sock.getsockname(), sock.getpeername()))
    mapped = getattr(peer, "ipv4_mapped", None) or peer
    return bool(mapped.is_loopback) or own == peer


async def first_bytes(sock: socket.socket, size: int) -> bytes:
    """Up to `size` bytes that the peer has sent, which stay to be read; waits for one; none: it has hung up."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sock.recv(size, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            pass
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)


def connectable_host(bound_host: str, family: int) -> str:
    """`bound_host`, or for a wildcard the address of the interface that leads outside, else loopback."""
    if bound_host not in _WILDCARDS:
        return bound_host
    # The wildcard of IPv6 takes IPv4 callers too, so a host without IPv6 to the outside is named by its IPv4 address.
    families = [socket.AF_INET6, socket.AF_INET] if family == socket.AF_INET6 else [socket.AF_INET]
    for candidate in families:
        with contextlib.suppress(OSError), socket.socket(candidate, socket.SOCK_DGRAM) as probe:
            probe.connect((_OUTSIDE[candidate], 9))
            return str(probe.getsockname()[0])
    return "::1" if family == socket.AF_INET6 else LOOPBACK


async def resolve(where: HostPort) -> list[_AddrInfo]:
    """Family and socket address for each address of a host.

    IPv4 comes first when it is this one: `localhost` is bound and tried at 127.0.0.1.
    """
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise ConnectError(f"{where}: the host {where.host!r} is not known here: {exc}") from exc
    infos = [(socket.AddressFamily(family), target) for family, _type, _proto, _name, target in found]
    if not infos:
        raise AddressError(f"{where}: the host {where.host!r} has no address")
    if where.host == "localhost":
        infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return infos
