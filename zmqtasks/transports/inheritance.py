"""What a forked child must not keep open: while it does, the peer takes a process that has died for one that lives.

The kernel ends a connection when its last descriptor is closed, and a child has a copy of each. So a child puts `/dev/null`
in their places: closing them would free their numbers, which objects that it has inherited close once more, later.
"""

from __future__ import annotations

import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_children(sock: socket.socket) -> None:
    """Children that are forked from now on do not hold this socket open."""
    _sockets.add(sock)


def _let_go() -> None:
    descriptors = [sock.fileno() for sock in _sockets]
    _sockets.clear()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in descriptors:
        if descriptor >= 0:
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
