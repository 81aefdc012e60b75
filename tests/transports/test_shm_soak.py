"""Leases by the million, without the sockets between: what is lent shows its content to the end, and all of it comes back.

`ZMQTASKS_FUZZ_LEASES` sets how many, `ZMQTASKS_FUZZ_SEED` the seed.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.channel import PeerArena, ReturningHalf
from zmqtasks.transports.shm.leases import borrow_untrusted, live_leases

LEASES = int(os.environ.get("ZMQTASKS_FUZZ_LEASES", "20000"))
SIZES = (8 * KIB, 100_000, 100_001, 512 * KIB, 600_000)
HELD = 150
STAMP = struct.Struct("<Q")


class Lender(ReturningHalf):
    """The blocks that are out; takes them back in whatever thread they return."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.out: dict[int, Block] = {}

    def lend(self, number: int, size: int) -> Block:
        block = self.arena.take(size)
        assert block is not None
        for place in places(size):
            self.arena.fill(block, place, memoryview(STAMP.pack(number)))
        if number % 3:
            self.arena.filled(block)
        self.out[number] = block
        return block

    def give_back(self, number: int) -> None:
        self.arena.release(self.out.pop(number))

    def __del__(self) -> None:
        pass


def places(size: int) -> tuple[int, int, int]:
    return 0, size // 2, size - STAMP.size


class Reader:
    """A view in one of many shapes, and what it must show; perhaps in a cycle, whose end is a look as well."""

    def __init__(self, frame: memoryview, number: int, kind: int, report: Callable[[str], None]) -> None:
        self.number, self.size, self.report = number, len(frame), report
        self.view: Any = frame
        self.whole = True
        match kind:
            case 0:
                self.view = np.frombuffer(frame, np.uint8)
            case 1:
                self.view = np.asarray(frame)[:][:].view(np.uint8)
            case 2:
                self.view, self.whole = memoryview(np.frombuffer(frame, np.uint8)[: STAMP.size]), False
            case 3:
                self.cycle = self
            case 4:
                array = np.frombuffer(frame, np.uint8)
                array[2000:2010] = 77  # a page of the reader's own
                array[-3000] = 77
                self.view = array
            case 5:
                self.cycle = [self, np.ndarray((len(frame),), np.uint8, buffer=frame)]  # type: ignore[assignment]

    def look(self) -> None:
        for place in places(self.size)[: 3 if self.whole else 1]:
            (found,) = STAMP.unpack_from(self.view, place)
            if found != self.number:
                self.report(f"lease {self.number} shows {found} at {place} of {self.size}")

    def __del__(self) -> None:
        self.look()


def test_soak() -> None:
    seed = int(os.environ.get("ZMQTASKS_FUZZ_SEED", "0")) or time.time_ns()
    print("seed", seed)
    rng = random.Random(seed)
    arena = Arena(256 * MIB, 512 * MIB)
    lender = Lender(arena)
    peer = PeerArena(os.dup(arena.read_only), arena.size)
    errors: list[str] = []
    dropped: deque[Reader] = deque()
    over = threading.Event()

    def drop() -> None:
        while not over.is_set() or dropped:
            try:
                dropped.popleft().look()
            except IndexError:
                over.wait(0.0005)

    thread = threading.Thread(target=drop)
    thread.start()
    held: list[Reader] = []
    try:
        for number in range(LEASES):
            size = rng.choice(SIZES)
            block = lender.lend(number, size)
            frame = borrow_untrusted(peer, block.offset, size, number, lender)
            held.append(Reader(frame, number, rng.randrange(7), errors.append))
            del frame
            if len(held) > HELD:
                reader = held.pop(rng.randrange(len(held)))
                if number % 4 and len(dropped) < HELD:
                    dropped.append(reader)
                del reader
            if number % 1000 == 0:
                gc.collect()
            if number % 5000 == 0:
                arena.trim(1e12)
            assert not errors, errors[:3]
        held.clear()
    finally:
        over.set()
        thread.join()
    gc.collect()
    assert not errors, errors[:3]
    assert not lender.out
    assert live_leases() == 0
    assert arena.held_blocks == 0
    arena.trim(1e12)
    assert arena.resident_bytes == 0
    assert os.fstat(arena.read_only).st_blocks == 0, "the kernel has all of it back"
    del peer
    os.close(arena.read_only)
    os.close(arena._file)
    native.unmap(arena._address, arena.size)
