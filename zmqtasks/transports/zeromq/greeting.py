"""What a listener says of itself in ZMTP's greeting, read without libzmq, which may lose it.

Both ends of a ZMTP connection send 64 bytes, in pieces: a signature; the version, once they have read the other's
signature; the mechanism, once they have read the other's version. A listener of libzmq 4.3.5 that finds version and
mechanism in one read, and does not like the mechanism, closes the connection before it has sent its own: mostly so when
the ends are of two processes, and all that the caller learns is that it was hung up on. Who sends a version and no
mechanism is told the listener's.
"""

from __future__ import annotations

import asyncio
import contextlib

from zmqtasks.transports.address import HostPort
from zmqtasks.transports.sockets import connect_socket

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = b"\x03"
_MECHANISM = slice(12, 32)


async def mechanism_at(where: HostPort, timeout_s: float) -> str | None:
    """The security mechanism of the ZeroMQ listener at `where`, "NULL" or "CURVE"; None: it hangs up or is no such listener.

    Raises what `connect_socket` does; the caller bounds the time, as a listener of another kind may never answer.
    """
    loop = asyncio.get_running_loop()
    greeting = b""
    with await connect_socket(where, timeout_s) as sock, contextlib.suppress(ConnectionError):
        await loop.sock_sendall(sock, _SIGNATURE + _VERSION)
        while len(greeting) < _MECHANISM.stop and (came := await loop.sock_recv(sock, _MECHANISM.stop - len(greeting))):
            greeting += came
    if len(greeting) < _MECHANISM.stop or greeting[:1] != _SIGNATURE[:1] or greeting[9:10] != _SIGNATURE[9:]:
        return None
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
