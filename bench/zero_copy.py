"""How often a value is copied on its way from the producer's memory to the consumer's, and what memory that takes.

`python -m bench.zero_copy [--size-mib 256] [SCHEME ...]`: per transport, two processes; one serializes an array and sends
it, the other deserializes what comes. Counted from outside (`syscall_trace`): of the array's bytes, how many the
producer's kernel took from the array's own memory, and how many the consumer's kernel put into the memory of the array
that the consumer's code gets. What is missing to all of them was copied in user space. Peak memory is that of the
kernel's own books (VmHWM), over what the process had before; the producer's array is part of what it had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import msgspec
import numpy as np
import uvloop

from zmqtasks.protocol.frames import DATA_LIMITS, MIB
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, serialize
from zmqtasks.transports import Comm, LinkSettings, connect, get_transport, listen

from .syscall_trace import Moved, trace

SCHEMES = ("tcp", "unix", "zmq", "shm", "inproc")
_SETTINGS = LinkSettings(limits=DATA_LIMITS)
_WAIT_S = 60.0


class Copies(msgspec.Struct, kw_only=True):
    """What one transfer of an array took."""

    scheme: str
    size_bytes: int
    taken_bytes: int = 0
    """Handed to the producer's kernel in the array's own memory; bytes sent twice count twice."""
    filled_bytes: int = 0
    """Put by the consumer's kernel into the memory of the consumer's array."""
    same_memory: bool = False
    """The consumer's array is the producer's."""
    producer_peak_bytes: int = 0
    """Beyond what the process had with the array, before sending."""
    consumer_peak_bytes: int = 0
    """Beyond what the process had before."""


class _Process(NamedTuple):
    address: int
    peak_bytes: int


def count_copies(scheme: str, size_bytes: int, *, traced: bool = True) -> Copies:
    """Sends one array of `size_bytes`; `traced` counts copies (and slows things), else only memory is looked at.

    This process must have no other children.
    """
    copies = Copies(scheme=scheme, size_bytes=size_bytes)
    if not get_transport(scheme).capabilities.crosses_processes:
        sent, received, peak = uvloop.run(_within(scheme, size_bytes))
        copies.same_memory, copies.consumer_peak_bytes = sent == received, peak
        return copies
    consumer = _start("consume", scheme, size_bytes)
    link = consumer.stdout.readline().decode().strip()
    producer = _start("produce", link, size_bytes)
    try:
        if producer.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the producer did not start: {scheme}")
        moved: list[Moved] = []
        if traced:
            moved = trace([consumer.pid, producer.pid], producer.stdin.fileno())
        else:
            os.write(producer.stdin.fileno(), b"go\n")
        made, got = _Process(*json.loads(producer.stdout.read())), _Process(*json.loads(consumer.stdout.read()))
    finally:
        for process in (producer, consumer):
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    copies.producer_peak_bytes, copies.consumer_peak_bytes = made.peak_bytes, got.peak_bytes
    for piece in moved:
        array = made.address if piece.outwards else got.address
        within = min(piece.address + piece.size, array + size_bytes) - max(piece.address, array)
        if within > 0 and piece.pid == (producer.pid if piece.outwards else consumer.pid):
            if piece.outwards:
                copies.taken_bytes += within
            else:
                copies.filled_bytes += within
    return copies


def _start(role: str, where: str, size_bytes: int) -> Any:
    command = [sys.executable, "-m", "bench.zero_copy", "--role", role, "--size-bytes", str(size_bytes), where]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class _Got:
    """Takes one message, a serialized array, and answers."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.array: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        if not self.array.done():
            self.array.set_result(deserialize(Payload(bytes(frames[0]), frames[1:])) if len(frames) > 1 else None)

    def comm_ended(self, error: Exception) -> None:
        self.ended.set_result(None)


async def _produce(address: str, size_bytes: int) -> None:
    array = np.full(size_bytes // 8, 0.5)
    comm = await connect(address, _SETTINGS)
    answer = _Got(comm)
    base = _reset_peak()
    print("ready", flush=True)
    sys.stdin.readline()
    payload = serialize(array)
    comm.send([payload.header, *payload.frames])
    async with asyncio.timeout(_WAIT_S):
        await answer.array
    print(json.dumps((array.ctypes.data, _peak() - base)), flush=True)
    await comm.close()


async def _consume(scheme: str, size_bytes: int) -> None:
    comms: asyncio.Queue[Comm] = asyncio.Queue()
    address = f"{scheme}://127.0.0.1:0" if get_transport(scheme).capabilities.uses_ip else f"{scheme}://"
    listener = await listen(address, comms.put_nowait, _SETTINGS)
    print(listener.address, flush=True)
    async with asyncio.timeout(_WAIT_S):
        comm = await comms.get()
        base = _reset_peak()
        got = _Got(comm)
        array = await got.array
        assert array.nbytes == size_bytes
        assert array[0] == array[-1] == 0.5
        assert array.flags.writeable
        comm.send([b"got it"])
        await got.ended
    print(json.dumps((array.ctypes.data, _peak() - base)), flush=True)
    await comm.close()
    await listener.close()


async def _within(scheme: str, size_bytes: int) -> tuple[int, int, int]:
    """Addresses of the array sent and of the one received, and the memory that it took, all in this process."""
    comms: asyncio.Queue[Comm] = asyncio.Queue()
    listener = await listen(f"{scheme}://", comms.put_nowait, _SETTINGS)
    array = np.full(size_bytes // 8, 0.5)
    sender = await connect(listener.address, _SETTINGS)
    answer, got = _Got(sender), _Got(await comms.get())
    base = _reset_peak()
    payload = serialize(array)
    sender.send([payload.header, *payload.frames])
    received = await got.array
    peak = _peak() - base
    await sender.close()
    await asyncio.gather(answer.ended, got.ended)
    await listener.close()
    return array.ctypes.data, received.ctypes.data, peak


def _reset_peak() -> int:
    """Memory of this process now, from which its peak counts anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


def main() -> None:
    """Prints a table, or plays one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="SCHEME")
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--size-bytes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        side = _produce if args.role == "produce" else _consume
        uvloop.run(side(args.schemes[0], args.size_bytes))
        return
    for scheme in args.schemes or SCHEMES:
        copies = count_copies(scheme, args.size_mib * MIB)
        if args.json:
            print(msgspec.json.encode(copies).decode(), flush=True)
            continue
        if copies.same_memory:
            way = "not copied at all: the consumer has the producer's memory"
        else:
            out, into = (100 * part / copies.size_bytes for part in (copies.taken_bytes, copies.filled_bytes))
            way = f"{out:5.1f} % sent from the array, {into:5.1f} % received into the array"
        peaks = (100 * part / copies.size_bytes for part in (copies.producer_peak_bytes, copies.consumer_peak_bytes))
        print(
            f"{scheme:7s} {way}; peak memory: producer {next(peaks):+.1f} %, consumer {next(peaks):+.1f} %", flush=True
        )


if __name__ == "__main__":
    main()
