"""Shared memory between two processes of this host: `python -m bench.shm [--size-mib 64 ...]`.

A reader asks a lender for arrays and sums them. *First read*: a value that nobody has asked for before, copied into the
arena, from the request to the array in hand; beside it a copy between warm memory (`memcpy`) in the same rounds. *Next
read*: the same value again. *Sum*: reading all of it, over a sum of the reader's own memory. Then what the first use of
memory costs, leases per second, and from which size on lending wins over the socket. Medians of all rounds.

All of its processes copy past the caches, as those of workers do that a nanny has started. `python -m bench.shm --non-temporal`
compares that with others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import uvloop

from zmqtasks.protocol.frames import DATA_LIMITS, GIB, KIB, MIB
from zmqtasks.transports import Comm, LinkSettings, connect, listen, non_temporal
from zmqtasks.transports.shm import comm as shm_comm
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.copying import Copy

_SETTINGS = LinkSettings(limits=DATA_LIMITS, high_water_bytes=64 * MIB)
_ROUNDS = 9
_LEASES = 3_000
_THRESHOLDS = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 4 * MIB)
_COPIED = (4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 256 * MIB)
_WAIT_S = 60.0


class _Lender:
    """Answers requests `(what, size, count)`, in text, with arrays."""

    def __init__(self, comm: Comm, over: asyncio.Event) -> None:
        self._comm = comm
        self._over = over
        self._arrays: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
        self._frames: dict[int, memoryview] = {}
        comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        what, size, count = bytes(frames[0]).decode().split()
        if what == "limit":
            shm_comm.LEND_BYTES = int(size)
            self._comm.send([b"done"])
            return
        array = self._arrays.get(int(size))
        if array is None:
            array = self._arrays[int(size)] = np.ones(int(size), np.uint8)
        if what == "first":
            self._frames[int(size)] = array.data
        for _ in range(int(count)):
            if what == "once":
                self._comm.send([array.data])
            else:
                self._comm.send_lasting([self._frames[int(size)]])

    def comm_ended(self, error: Exception) -> None:
        self._over.set()


async def _lend() -> None:
    over = asyncio.Event()
    lenders: list[_Lender] = []
    listener = await listen("shm://", lambda comm: lenders.append(_Lender(comm, over)), _SETTINGS)
    print(listener.address, flush=True)
    await over.wait()
    await listener.close()


class _Reader:
    """Asks, and waits for so many messages."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.last: memoryview | None = None
        self._left = 0
        self._done: asyncio.Future[None] | None = None
        comm.start(self)

    async def ask(self, what: str, size: int, count: int = 1) -> float:
        """Seconds until all is here; the last frame is kept."""
        self.last = None
        self._left = count
        self._done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.comm.send([f"{what} {size} {count}".encode()])
        await asyncio.wait_for(self._done, _WAIT_S)
        return time.perf_counter() - began

    def message_received(self, frames: list[memoryview]) -> None:
        self.last = frames[0]
        self._left -= 1
        if not self._left and self._done is not None:
            self._done.set_result(None)

    def comm_ended(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def _reads(reader: _Reader, size: int) -> None:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    words = source.view(np.uint64)
    took: dict[str, list[float]] = {"memcpy": [], "first": [], "next": [], "sum": [], "own sum": []}
    cold = await reader.ask("first", size)
    for _ in range(_ROUNDS):
        took["memcpy"].append(_timed(lambda: np.copyto(target, source)))
        took["first"].append(await reader.ask("first", size))
        took["next"].append(await reader.ask("next", size))
        assert reader.last is not None
        lent = np.frombuffer(reader.last, np.uint64)
        took["sum"].append(_timed(lent.sum))
        took["own sum"].append(_timed(words.sum))
        del lent
    reader.last = None
    found = {name: statistics.median(times) for name, times in took.items()}
    ratio = statistics.median(copy / first for copy, first in zip(took["memcpy"], took["first"], strict=True))
    print(
        f"{size >> 20:4d} MiB: memcpy {size / found['memcpy'] / 1e9:5.1f} GB/s, first read {size / found['first'] / 1e9:5.1f}"
        f" ({ratio:.2f} of memcpy; into new memory {size / cold / 1e9:.1f}), next read {found['next'] * 1e6:6.0f} us,"
        f" sum {found['sum'] * 1e3:.1f} ms (own memory {found['own sum'] * 1e3:.1f})"
    )


def _copy(copy: Copy) -> None:
    while not copy.is_complete():
        copy.advance(8 * MIB)


def _fills(size: int) -> None:
    """What the first uses of memory of the arena cost."""
    arena = Arena(GIB, GIB)
    source = memoryview(np.ones(size, np.uint8))
    block = arena.take(size)
    assert block is not None
    written = _timed(lambda: arena.fill(block, 0, source))
    rewritten = _timed(lambda: arena.fill(block, 0, source))
    arena.filled(block)
    arena.release(block)
    arena.trim(0.0)  # maps it
    assert arena.take(size) is block
    warm = statistics.median(_timed(lambda: arena.fill(block, 0, source)) for _ in range(_ROUNDS))
    helped = statistics.median(_timed(lambda: _copy(Copy(arena, block, source))) for _ in range(_ROUNDS))
    address = native.map_private(arena.read_only, block.offset, size)
    words = np.frombuffer(native.owned_memory(address, size).data, np.uint64)
    faults = _timed(words.sum)
    again = min(_timed(words.sum) for _ in range(3))
    looked = _timed(lambda: native.has_own_pages(address, size))
    del words
    native.unmap(address, size)
    rates = {
        "new pages": written,
        "the same before they are mapped": rewritten,
        "warm": warm,
        "warm, with a helper": helped,
    }
    print(f"filling {size >> 20} MiB, GB/s: " + ", ".join(f"{name} {size / s / 1e9:.1f}" for name, s in rates.items()))
    print(
        f"reading {size >> 20} MiB, ms: new mapping {faults * 1e3:.1f}, kept mapping {again * 1e3:.1f}"
        f" + {looked * 1e3:.2f} for the look at the books"
    )


def _warm_block(arena: Arena, source: memoryview) -> tuple[Block, memoryview]:
    """A block with that content, and its memory."""
    size = len(source)
    block = arena.take(size)
    assert block is not None
    arena.fill(block, 0, source)
    arena.filled(block)
    arena.release(block)
    arena.trim(0.0)  # maps it
    assert arena.take(size) is block
    mapped = arena.mapped(block, size)
    assert mapped is not None
    return block, mapped


def _copies(size: int) -> list[float]:
    """Milliseconds of a copy by one thread, of a sum of what was copied, and of a copy by two threads."""
    arena = Arena(GIB, GIB)
    source = np.ones(size // 8, np.uint64)
    content = source.data.cast("B")
    block, mapped = _warm_block(arena, content)
    target = np.frombuffer(mapped, np.uint64)
    took: list[list[float]] = [[], [], []]
    for _ in range(max(_ROUNDS, 256 * MIB // size)):
        took[0].append(_timed(lambda: np.copyto(target, source)))
        took[1].append(_timed(target.sum))
        took[2].append(_timed(lambda: _copy(Copy(arena, block, content))))
    return [statistics.median(times) * 1e3 for times in took]


def _compare_copies() -> None:
    """Copies through the caches and past them, by processes in turns."""
    through = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    past = dict(through)
    non_temporal.set_for_child(past)
    if past == through:
        raise SystemExit("this C library or processor has no such setting: nothing to compare")
    found: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(5):
        for kind, environment in (("through", through), ("past", past)):
            command = [sys.executable, "-m", "bench.shm", "--copies"]
            lines = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.split("\n")
            for size, line in zip(_COPIED, lines, strict=False):
                found.setdefault((kind, size), []).append([float(word) for word in line.split()])
    print("ms, through the caches / past them: one thread, a sum of it then, two threads")
    for size in _COPIED:
        through, beyond = (
            [statistics.median(c) for c in zip(*found[kind, size], strict=True)] for kind in ("through", "past")
        )
        print(f"{size >> 20:4d} MiB: " + ",  ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(through, beyond, strict=True)))


async def _measure(address: str, sizes: list[int]) -> None:
    reader = _Reader(await connect(address, _SETTINGS))
    for size in sizes:
        await _reads(reader, size)
    took = await reader.ask("once", shm_comm.LEND_BYTES, _LEASES)
    print(f"leases of {shm_comm.LEND_BYTES >> 10} KiB: {_LEASES / took:.0f} per second")
    rates: dict[int, list[str]] = {size: [] for size in _THRESHOLDS}
    for limit in (1, 1 << 62):
        await reader.ask("limit", limit)
        for size in _THRESHOLDS:
            await reader.ask("once", size, 50)
            took = statistics.median([await reader.ask("once", size, 200) for _ in range(5)])
            rates[size].append(f"{took / 200 * 1e6:.0f}")
    print(
        "us per frame, lent / through the socket: " + ", ".join(f"{n >> 10} KiB {' / '.join(rates[n])}" for n in rates)
    )
    reader.last = None
    await reader.comm.close()


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--non-temporal", action="store_true", help="copies through the caches and past them")
    parser.add_argument("--lend", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--copies", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.non_temporal:
        _compare_copies()
        return
    if arguments.copies:
        for size in _COPIED:
            print(*_copies(size))
        return
    if arguments.lend:
        uvloop.run(_lend())
        return
    environment = dict(os.environ)
    non_temporal.set_for_child(environment)
    if environment != dict(os.environ):  # which counts from the start of a process
        os.execve(sys.executable, [sys.executable, "-m", "bench.shm", *sys.argv[1:]], environment)
    _fills(64 * MIB)
    with subprocess.Popen([sys.executable, "-m", "bench.shm", "--lend"], stdout=subprocess.PIPE, text=True) as lender:
        assert lender.stdout is not None
        try:
            uvloop.run(_measure(lender.stdout.readline().strip(), [size * MIB for size in arguments.size_mib]))
            lender.wait(10)
        finally:
            lender.kill()


if __name__ == "__main__":
    main()
