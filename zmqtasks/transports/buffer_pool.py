"""Large frames in memory that is warm: blocks that were filled before, and come back when nobody looks any more.

The first write to fresh memory takes a page fault for each page, which costs more than the copy: 256 MiB of new 4 KiB
pages are filled at 1.9 GB/s, of huge pages at 6.6, and once they are there at 14 (`python -m bench.buffers`).

When a block is free again must be known exactly: a block lent twice is silent corruption. Views can be cut, cast,
pickled out of band, or become arrays; numpy shortens chains of bases, so a finalizer on a view or slice fires while
arrays still live. So one ctypes object per lending, the *owner*, stands below every view, and keeps the *source* of its
block. The end of the owner, noted by a weak reference, is the hint to look at the block. It is no more than that: when
the garbage collector finds an owner in a cycle, it calls weak references (and `__del__` in any order) while finalizers
of other objects in the cycle still have the view, and may even save it. What counts is that the source has nobody left
but its block: its count of references says so.

The hint may come in any thread, at any allocation, within this very code: all it does is `deque.append`. So may a
finalizer that allocates: a thread that finds the lock taken by itself gets a new block.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from zmqtasks.protocol.frames import GIB, MIB
from zmqtasks.transports.host_memory import available_memory_bytes

POOLED_FROM_BYTES = 1 * MIB
"""Below this malloc's own heap is warm most of the time, and lending (3 us) begins to be felt; from 32 MiB on malloc gives
everything back at once."""

IDLE_S = 2.0
"""Blocks that nobody wanted for as long go back to the system."""

IDLE_BYTES = 2 * GIB
"""Most memory that waits for its next use, where an eighth of the memory is not less (`idle_bound`). It has to hold a message for
its block to be warm for the next."""

_MEMORY_SHARE = 8

MOST_BLOCKS = 8_192
"""Blocks at a time, lent and idle: each may take a mapping of its own, and Linux allows a process 65,530."""

_STEPS_PER_DOUBLING = 8
_HUGE_FROM_BYTES = 4 * MIB
_TRIM_EVERY_S = 0.5
_LONGEST_WAIT_S = 0.1
"""For the lock: whoever has it may, by some finalizer, be waiting for the one who waits."""

AVAILABLE = hasattr(mmap, "MAP_PRIVATE") and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Elsewhere (Windows; builds without the GIL, where counts of references are not exact) memory is always new."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of a pool."""

    lent_blocks: int
    lent_bytes: int
    idle_blocks: int
    idle_bytes: int
    reused: int
    """Lendings of a block that was warm."""
    made: int
    """Lendings of a new one."""


class _Lease(weakref.ref["ctypes.Array[ctypes.c_ubyte]"]):
    """Watches the owner of one lending."""

    __slots__ = ("block",)

    block: _Block


class _Block:
    """Memory of its own mapping, page-aligned, and what tells whether anybody has it."""

    __slots__ = ("_free_count", "_memory", "_source", "_type", "idle_since", "lease", "size")

    def __init__(self, size_bytes: int) -> None:
        try:
            memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as exc:
            raise MemoryError(f"the system has no {size_bytes} bytes: {exc}") from exc
        if size_bytes >= _HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size_bytes
        self.idle_since = 0.0
        self.lease: _Lease | None = None
        self._type = ctypes.c_ubyte * size_bytes
        self._memory = memory
        self._source = self._type.from_buffer(memory)
        self._free_count = sys.getrefcount(self._source)

    @property
    def free(self) -> bool:
        """Nobody but this object reaches the memory."""
        return sys.getrefcount(self._source) == self._free_count

    def lend(self, returned: Callable[[weakref.ref[ctypes.Array[ctypes.c_ubyte]]], None]) -> memoryview:
        """The whole block, taken for as long as any view of it lives; `returned` gets the lease at its end, or before."""
        owner = self._type.from_buffer(self._source)
        self.lease = lease = _Lease(owner, returned)
        lease.block = self
        return memoryview(owner).cast("B")


class BufferPool:
    """Lends large blocks and takes them back by itself; any thread may use it."""

    def __init__(
        self,
        idle_bytes: int = IDLE_BYTES,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_idle_bytes = idle_bytes
        self._idle_s = idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._inside = 0  # the thread that has the lock
        self._lent: set[_Block] = set()  # each keeps its lease: a weak reference that is gone itself tells nothing
        self._returned: deque[weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = deque()
        self._unclear: list[_Block] = []  # their owner has ended, or is about to
        self._idle: dict[int, list[_Block]] = {}  # by size; the longest idle first
        self._idle_bytes = 0
        self._next_trim = 0.0
        self._reused = 0
        self._made = 0
        os.register_at_fork(after_in_child=self._after_fork)

    def allocate(self, size_bytes: int) -> memoryview | None:
        """Writable, page-aligned memory of `size_bytes` with arbitrary content, for as long as any view of it lives.

        None: `MOST_BLOCKS` are lent already. Raises MemoryError.
        """
        size = block_size(size_bytes)
        block: _Block | None = None
        if self._enter():
            try:
                self._take_back()
                if blocks := self._idle.get(size):
                    block = blocks.pop()
                    self._idle_bytes -= size
                    self._reused += 1
                now = self._clock()
                if now >= self._next_trim:
                    self._trim(now)
            finally:
                self._leave()
        if block is None:
            if len(self._lent) >= MOST_BLOCKS:
                return None
            block = _Block(size)
            self._made += 1
        self._lent.add(block)
        return block.lend(self._returned.append)[:size_bytes]

    def trim(self) -> None:
        """Gives blocks that were idle for long back to the system; cheap, for nodes to call about once a second."""
        if (self._returned or self._unclear or self._idle_bytes) and self._enter():
            try:
                self._take_back()
                self._trim(self._clock())
            finally:
                self._leave()

    @property
    def used(self) -> bool:
        """Anything is lent or idle, as far as is known."""
        return bool(self._lent or self._unclear or self._idle_bytes)

    def limit(self, idle_bytes: int) -> None:
        """Sets the most memory that is kept idle; 0 keeps none."""
        self._most_idle_bytes = idle_bytes
        if self._enter():
            try:
                self._take_back()
                self._make_room(0)
            finally:
                self._leave()

    def statistics(self) -> PoolStatistics:
        """Counters and sizes, after all that has come back was taken back."""
        if self._enter():
            try:
                self._take_back()
            finally:
                self._leave()
        lent = [block.size for block in self._lent.copy()] + [block.size for block in self._unclear]
        return PoolStatistics(
            lent_blocks=len(lent),
            lent_bytes=sum(lent),
            idle_blocks=sum(map(len, self._idle.values())),
            idle_bytes=self._idle_bytes,
            reused=self._reused,
            made=self._made,
        )

    def _enter(self) -> bool:
        """Takes the lock; False: this thread has it already, or it took too long."""
        if self._inside == threading.get_ident() or not self._lock.acquire(timeout=_LONGEST_WAIT_S):
            return False
        self._inside = threading.get_ident()
        return True

    def _leave(self) -> None:
        self._inside = 0
        self._lock.release()

    def _take_back(self) -> None:
        """Makes idle what is free."""
        while self._returned:
            lease = self._returned.popleft()
            assert isinstance(lease, _Lease)
            block = lease.block
            block.lease = None
            self._lent.discard(block)
            self._unclear.append(block)
        if not self._unclear:
            return
        unclear, self._unclear = self._unclear, []
        now = self._clock()
        while unclear:
            block = unclear.pop()
            if not block.free:
                self._unclear.append(block)
            elif self._make_room(block.size):
                block.idle_since = now
                self._idle.setdefault(block.size, []).append(block)
                self._idle_bytes += block.size

    def _make_room(self, size_bytes: int) -> bool:
        """Drops the longest idle blocks until `size_bytes` more are within the bound; False: they never are."""
        most = self._most_idle_bytes - size_bytes
        if most < 0:
            return False
        while self._idle_bytes > most:
            self._drop_first(min((blocks for blocks in self._idle.values() if blocks), key=_idle_since))
        return True

    def _trim(self, now: float) -> None:
        self._next_trim = now + _TRIM_EVERY_S
        for blocks in list(self._idle.values()):
            while blocks and blocks[0].idle_since <= now - self._idle_s:
                self._drop_first(blocks)
        self._idle = {size: blocks for size, blocks in self._idle.items() if blocks}

    def _drop_first(self, blocks: list[_Block]) -> None:
        self._idle_bytes -= blocks.pop(0).size

    def _after_fork(self) -> None:  # the parent's other threads may have been at any point
        self._idle = {}
        self._idle_bytes = 0
        self._inside = 0
        self._lock = threading.Lock()


def idle_bound(idle_bytes: int, memory_limit_bytes: int = 0) -> int:
    """`idle_bytes`, or an eighth of the process's memory limit (0: of the host's memory) where that is less."""
    return min(idle_bytes, (memory_limit_bytes or available_memory_bytes()) // _MEMORY_SHARE)


def block_size(size_bytes: int) -> int:
    """The size of the block that holds `size_bytes`: at most an eighth more, and whole pages."""
    step = max(1 << max(0, (size_bytes - 1).bit_length() - 1), 1) // _STEPS_PER_DOUBLING or 1
    step = max(step, mmap.PAGESIZE)
    return -(-size_bytes // step) * step


def _idle_since(blocks: list[_Block]) -> float:
    return blocks[0].idle_since


POOL = BufferPool(idle_bound(IDLE_BYTES) if AVAILABLE else 0)
"""The pool of this process."""
