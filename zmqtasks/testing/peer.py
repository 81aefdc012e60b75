"""The other end of a link, in a process of its own: `python -m zmqtasks.testing.peer ROLE ADDRESS [--heartbeat S] [--encrypted]`.

With `--encrypted`, the first line of standard input is the secret of the link, in hexadecimal digits.

The first line of standard output is the address it listens at, or `connected`; the last tells how the comm ended: the
class of the error, and `by=` where it has one. Roles:

- `echo`: sends back every message; `listen-echo` the same, but it is the peer that listens, for one comm;
- `inspect`: answers every message with one line of JSON per frame about the memory it came in, and the frame, altered;
- `stall`: reads nothing until SIGUSR1, then echoes;
- `source`: sends 1 MiB messages without end, as fast as they drain;
- `close`: sends 3 messages and closes in good order.

It ends when its comm does, so nothing is left when the test's side goes.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import signal
import sys

import uvloop

from zmqtasks.errors import ConnectError
from zmqtasks.protocol.frames import ALIGNMENT, DATA_LIMITS, MIB
from zmqtasks.transports import Comm, Encryption, LinkSettings, connect, listen


class _Peer:
    """The handler of the one comm, playing a role."""

    def __init__(self, comm: Comm, role: str) -> None:
        self.comm = comm
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._answer = inspected if role == "inspect" else list
        comm.start(self)
        if role == "stall":
            comm.pause_receiving()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, comm.resume_receiving)

    def message_received(self, frames: list[memoryview]) -> None:
        self.comm.send(self._answer(frames))

    def comm_ended(self, error: Exception) -> None:
        self.ended.set_result(error)


def inspected(frames: list[memoryview]) -> list[bytes | memoryview]:
    """A frame of JSON about the memory of `frames`, then the frames with their first byte increased by one."""
    report = []
    for frame in frames:
        entry = {"size": frame.nbytes, "writable": not frame.readonly, "aligned": is_aligned(frame)}
        report.append(entry)
        if frame.nbytes and not frame.readonly:
            frame[0] = (frame[0] + 1) % 256
    return [json.dumps(report).encode(), *frames]


def is_aligned(frame: memoryview) -> bool:
    """Whether a writable frame starts where frames of other processes must; an empty one starts anywhere."""
    if frame.nbytes == 0:
        return True
    return not frame.readonly and ctypes.addressof(ctypes.c_char.from_buffer(frame)) % ALIGNMENT == 0


async def _act(comm: Comm, role: str) -> None:
    if role == "close":
        for number in range(3):
            comm.send([b"message %d" % number])
        await comm.close()
    elif role == "source":
        chunk = bytes(MIB)
        while True:
            comm.send([chunk])
            await comm.drain()


async def _play(role: str, address: str, settings: LinkSettings) -> Exception:
    listener = None
    if role.startswith("listen-"):
        role = role.removeprefix("listen-")
        arrival: asyncio.Future[Comm] = asyncio.get_running_loop().create_future()
        listener = await listen(address, arrival.set_result, settings)
        print(listener.address, flush=True)
        comm = await arrival
    else:
        try:
            comm = await connect(address, settings)
        except ConnectError as exc:
            return exc
        print("connected", flush=True)
    peer = _Peer(comm, role)
    acting = asyncio.create_task(_act(comm, role))
    error = await peer.ended
    if role != "close":  # a close that is cancelled aborts the link, which the other side may not have read to its end
        acting.cancel()
    await asyncio.wait([acting])
    await comm.close()
    if listener is not None:
        await listener.close()
    return error


def main() -> None:
    """Plays the role given on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("address")
    parser.add_argument("--heartbeat", type=float, default=LinkSettings().heartbeat_s)
    parser.add_argument("--encrypted", action="store_true")
    options = parser.parse_args()
    secret = bytes.fromhex(sys.stdin.readline()) if options.encrypted else None
    encryption = Encryption(secret, same_host=True)
    settings = LinkSettings(heartbeat_s=options.heartbeat, limits=DATA_LIMITS, encryption=encryption)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the test, whose end is the peer's
    error = uvloop.run(_play(options.role, options.address, settings))
    print(type(error).__name__, f"by={getattr(error, 'by', '')}", error, flush=True)


if __name__ == "__main__":
    main()
