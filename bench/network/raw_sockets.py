"""Sockets without anything around them, for the baselines: TCP over loopback, and of a unix domain."""

from __future__ import annotations

import contextlib
import socket

from .processes import START_TIMEOUT_S


def serve(scheme: str) -> socket.socket:
    """A socket that waits for others: `tcp` or `unix`."""
    if scheme == "tcp":
        server = socket.create_server(("127.0.0.1", 0))
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind("")  # the kernel finds an abstract name
        server.listen()
    server.settimeout(START_TIMEOUT_S)
    return server


def address_of(server: socket.socket) -> int | str:
    """What `connect` takes: a port, or the name in hexadecimal digits, as JSON has no bytes."""
    if server.family == socket.AF_UNIX:
        name: bytes = server.getsockname()
        return name.hex()
    port: int = server.getsockname()[1]
    return port


def accept(server: socket.socket) -> socket.socket:
    """The next one that connects."""
    sock, _ = server.accept()
    sock.settimeout(None)
    _send_at_once(sock)
    return sock


def connect(address: int | str) -> socket.socket:
    """To a server of another process."""
    if isinstance(address, int):
        sock = socket.create_connection(("127.0.0.1", address))
    else:
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            sock.connect(bytes.fromhex(address))
            stack.pop_all()
    _send_at_once(sock)
    return sock


def _send_at_once(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive(sock: socket.socket, memory: memoryview) -> bool:
    """Fills `memory`; False: the connection has ended."""
    filled = 0
    while filled < len(memory):
        count = sock.recv_into(memory[filled:])
        if not count:
            return False
        filled += count
    return True
