"""Leases that end within the garbage collector: run by `test_shm_collector` as a program of its own, since it may crash."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from typing import Any

import numpy as np

from zmqtasks.protocol.frames import MIB
from zmqtasks.transports.shm.arena import Arena
from zmqtasks.transports.shm.channel import PeerArena, ReturningHalf
from zmqtasks.transports.shm.leases import borrow_untrusted, live_leases

SIZE = MIB
ROUNDS = 20


class Returning(ReturningHalf):
    """Notes what is returned."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def give_back(self, number: int) -> None:
        self.numbers.append(number)

    def __del__(self) -> None:
        pass


class Reader:
    """Part of a cycle; looks at its view when it ends, and may save it."""

    saved: list[tuple[int, Any]] = []
    looked = 0

    def __init__(self, view: Any, expected: int, save: bool) -> None:
        self.view, self.expected, self.save = view, expected, save
        self.cycle = self

    def __del__(self) -> None:
        array = np.frombuffer(self.view, np.uint8)
        assert int(array.min()) == int(array.max()) == self.expected
        Reader.looked += 1
        if self.save:
            Reader.saved.append((self.expected, array[1::2] if self.expected % 2 else self.view))


class Memory:
    """An arena, and blocks of it as frames: lent by a peer, or allocated here."""

    def __init__(self) -> None:
        self.arena = Arena(256 * MIB, 256 * MIB)
        self.peer = PeerArena(os.dup(self.arena.read_only), self.arena.size)
        self.returning = Returning()
        self.lent = 0

    def borrowed(self, number: int) -> memoryview:
        block = self.arena.take(SIZE)
        assert block is not None
        self.arena.fill(block, 0, memoryview(bytes([number]) * SIZE))
        self.lent += 1
        return borrow_untrusted(self.peer, block.offset, SIZE, self.lent, self.returning)

    def allocated(self, number: int) -> memoryview:
        view = self.arena.allocate(SIZE)
        assert view is not None
        view[:] = bytes([number]) * SIZE
        return view


def finalizers(memory: Memory, kind: str) -> None:
    """Finalizers look at views whose cycle is being collected, and save some of them."""
    make = getattr(memory, kind)
    watched = []
    for number in range(1, ROUNDS + 1):
        reader = Reader(make(number), number, number % 3 == 0)
        watched.append(weakref.ref(reader, lambda _: None))
        other: list[Any] = [reader]
        if number % 2:  # arrays hide what they stand on from the collector
            other.append(np.frombuffer(reader.view, np.uint8)[4:].reshape(4, -1).T)
        reader.cycle = other  # type: ignore[assignment]
        del reader, other
    gc.collect()
    assert Reader.looked == ROUNDS
    kept = len(Reader.saved)
    assert kept == ROUNDS // 3
    if kind == "allocated":
        assert memory.arena.held_blocks == kept
        for _ in range(ROUNDS):  # blocks that are free are written again
            memory.allocated(99)
    else:
        assert live_leases() == kept
        assert len(memory.returning.numbers) == ROUNDS - kept
    for number, saved in Reader.saved:
        assert int(np.asarray(saved).min()) == int(np.asarray(saved).max()) == number
    del saved
    Reader.saved.clear()
    gc.collect()
    assert live_leases() == 0
    assert kind == "borrowed" or memory.arena.held_blocks == 0


def threads(memory: Memory, kind: str) -> None:
    """The collector runs in whatever thread; several make and drop cycles at the same time."""
    make = getattr(memory, kind)
    gc.set_threshold(50)
    errors: list[BaseException] = []
    lock = threading.Lock()

    def work(first: int) -> None:
        try:
            for number in range(ROUNDS):
                with lock:
                    view = make(first + number)
                Reader(view, first + number, False)
                if number % 5 == 0:
                    gc.collect()
        except BaseException as exc:
            errors.append(exc)

    running = [threading.Thread(target=work, args=(first,)) for first in (1, 50, 100, 150)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors, errors
    gc.collect()
    assert Reader.looked == 4 * ROUNDS
    assert live_leases() == 0
    assert kind == "borrowed" or memory.arena.held_blocks == 0


def reentrant(memory: Memory, kind: str) -> None:
    """A finalizer that runs inside the arena, and uses the arena."""
    del kind
    arena = memory.arena
    block = arena.take(SIZE)
    assert block is not None
    assert arena._enter()
    try:
        assert arena.take(SIZE) is None
        assert arena.allocate(SIZE) is None
        arena.release(block)
        assert arena.trim(0.0)
    finally:
        arena._leave()
    assert arena.held_blocks == 0
    assert arena.free_bytes == SIZE


if __name__ == "__main__":
    unraisable: list[object] = []
    sys.unraisablehook = lambda found: unraisable.append(found.exc_value)
    {"finalizers": finalizers, "threads": threads, "reentrant": reentrant}[sys.argv[1]](Memory(), sys.argv[2])
    assert not unraisable, unraisable
