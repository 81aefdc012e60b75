"""The memory from which a process sends over shm: one sparse memory file, cut into blocks that are lent and come back.

Theory of operation
-------------------
A *block* is a run of pages of the file. It is held by whoever may still look at it: each lease to a peer, memory from
`allocate` that lives on here, the memory of what was sent before. When nobody holds it any more it is free, and *warm*:
its pages are there. Warm blocks are taken first, the last one returned first. What has been free
for `IDLE_S` is given back to the kernel, and so is what is over half the limit.

The file is as large as it may ever be wanted, and takes memory where it has been written only; `limit_bytes` bounds that.
An arena that is full lends nothing, and the sender finds another way.

How a block is filled depends on its pages (`python -m bench.shm`, 256 MiB, against 13.5 GB/s of a copy between warm
memory): new pages through the mapping 0.9 GB/s, by `pwrite` 2.8; pages that exist but are not mapped yet 3.2 and 5.1;
mapped pages 11 to 13. So new pages are written by the kernel, which `trim` maps in the background, once
they are free, for the next time.

*Threads.* All methods may be called from any thread. Finalizers, which run wherever the last reference is dropped, and
so perhaps within one of these methods, do nothing but append to a deque. What allocates may run finalizers of anybody,
which may call anything here: a thread that is inside already finds the arena full, and what it releases waits.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable

from zmqtasks.protocol.frames import ALIGNMENT, MIB, Buffer
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.free_ranges import FreeRanges
from zmqtasks.transports.shm.native import PAGE_BYTES

_log = logging.getLogger(__name__)

FILE_NAME = "zmqtasks-arena"

IDLE_S = 5.0
"""Free memory that nobody has used for this long goes back to the kernel, and so do copies kept for a next reader."""

KEPT_BYTES = 256 * MIB
"""Copies kept for a next reader, at most; past it the longest unused one makes room, and its warm block serves the next
copy: values that are read once must not each take a cold one."""

_MAPPED_BLOCK_BYTES = 128 * MIB
"""Larger blocks are mapped when they are used again, and not for nothing."""
_MAPPED_BYTES = 4 * MIB
"""Mapped in one go, in about 1 ms."""

_SIZES_PER_DOUBLING = 8
"""Sizes of blocks: 12.5 % may be left over, of addresses only, as what is not written takes no memory."""


class Block:
    """A run of pages of the arena; see the module's docstring."""

    __slots__ = ("filled", "free_since", "holds", "offset", "present", "size", "spoiled")

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.filled = 0
        """How much of it, from its beginning, is counted as memory."""
        self.present = 0
        """How much of that is mapped, so that writing to it costs no page faults."""
        self.holds = 0
        self.free_since = 0.0
        self.spoiled = False
        """It goes back to the kernel when it is free."""


class Arena:
    """See the module's docstring. Raises OSError when the system has no memory files, or no room for addresses."""

    def __init__(self, limit_bytes: int, reserved_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size = reserved_bytes - reserved_bytes % PAGE_BYTES
        self._file = native.memory_file(FILE_NAME, self.size)
        try:
            self.read_only = native.read_only(self._file)
            """What peers get."""
            try:
                self._address = native.map_shared(self._file, self.size)
            except BaseException:
                os.close(self.read_only)
                raise
        except BaseException:
            os.close(self._file)
            raise
        self._memory = memoryview(native.memory_at(self._address, self.size)).cast("B")
        self._lock = threading.Lock()
        self._inside = 0  # the thread that has the lock
        self._new = FreeRanges(self.size)  # what has no pages
        self._warm: dict[int, list[Block]] = {}  # by size; the last one was returned last
        self._warm_bytes = 0
        self._resident = 0
        self._held = 0
        self._held_by_size: dict[int, int] = {}
        self._own: dict[int, weakref.ref[object]] = {}  # memory from `allocate`, by offset
        self._own_blocks: list[tuple[int, Block]] = []  # the same, sorted by offset
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by id of the frame, the last used one last
        self._kept_bytes = 0
        self.copied_bytes = 0
        """What has been copied into it so far."""
        # What others, finalizers among them, have let go of; taken up inside the lock.
        self._dropped: deque[Block] = deque()
        self._released: deque[Block] = deque()
        self._unmapped: deque[Block] = deque()
        self._unwanted: deque[weakref.ref[memoryview]] = deque()

    @property
    def resident_bytes(self) -> int:
        """Memory that it takes."""
        return self._resident

    @property
    def unmapped(self) -> bool:
        """`trim` has something to do at once."""
        return bool(self._unmapped)

    @property
    def free_bytes(self) -> int:
        """Of that, what nobody holds."""
        if self._enter():
            try:
                self._settle()
            finally:
                self._leave()
        return self._warm_bytes

    @property
    def held_blocks(self) -> int:
        """Blocks that somebody holds."""
        if self._enter():
            try:
                self._settle()
            finally:
                self._leave()
        return self._held

    # -- blocks

    def take(self, size_bytes: int) -> Block | None:
        """A block of at least that size, held once; None: the arena is full."""
        size = block_size(size_bytes)
        if not self._enter():
            return None
        try:
            self._settle()
            block = self._take_warm(size) or self._take_new(size, size_bytes)
            if block is None:
                return None
            block.holds = 1
            self._held += 1
            self._held_by_size[size] = self._held_by_size.get(size, 0) + 1
            pages = size_bytes + -size_bytes % PAGE_BYTES
            if pages > block.filled:
                self._resident += pages - block.filled
                block.filled = pages
            return block
        finally:
            self._leave()

    def may_return(self, size_bytes: int) -> bool:
        """Whether a warm block of that size is not here, but held by somebody."""
        size = block_size(size_bytes)
        if not self._enter():
            return False
        try:
            self._settle()
            return not self._warm.get(size) and bool(self._held_by_size.get(size))
        finally:
            self._leave()

    def release(self, block: Block) -> None:
        """One less looks at it."""
        self._released.append(block)
        if self._enter():
            try:
                self._settle()
            finally:
                self._leave()

    def discard(self, block: Block) -> None:
        """Like `release`, of a block whose pages could not all be had: whoever has it next must not count on them."""
        block.spoiled = True
        self.release(block)

    def fill(self, block: Block, start: int, content: memoryview) -> None:
        """Copies into a block that is held, and that nobody else looks at yet."""
        self.copied_bytes += len(content)
        at = block.offset + start
        end = start + len(content)
        if end <= block.present:
            self._memory[at : at + len(content)] = content
            return
        written = 0
        while written < len(content):
            written += os.pwrite(self._file, content[written:], at + written)

    def mapped(self, block: Block, size_bytes: int) -> memoryview | None:
        """The memory of a block that is held, to copy so much into it; None when its pages are not all there."""
        if size_bytes > block.present:
            return None
        self.copied_bytes += size_bytes
        return self._memory[block.offset : block.offset + size_bytes]

    def filled(self, block: Block) -> None:
        """The content is complete. Its pages are there now, mapped or not."""
        if block.filled > _MAPPED_BLOCK_BYTES:
            block.present = block.filled

    # -- memory for senders who make their content in place

    def allocate(self, size_bytes: int) -> memoryview | None:
        """Writable memory that is sent without a copy; it comes back when its last view and its last lease are gone."""
        block = self.take(size_bytes) if native.ends_exactly() else None
        if block is None:
            return None
        block.present = block.filled
        owner = native.owned_memory(self._address + block.offset, block.size)
        dropped = self._dropped

        def gone(_: object) -> None:
            dropped.append(block)

        if not self._enter():
            self.release(block)
            return None
        try:
            self._own[block.offset] = weakref.ref(owner, gone)
            bisect.insort(self._own_blocks, (block.offset, block), key=_offset)
        finally:
            self._leave()
        return owner.data[:size_bytes]

    def find(self, frame: Buffer) -> tuple[Block, int] | None:
        """The block, now held once more, and the offset in the file of a frame that lies in memory from `allocate`.

        Not of one that begins off the steps in which is lent (`ALIGNMENT`).
        """
        if not self._own_blocks:
            return None
        offset = native.address_of(frame) - self._address
        if not 0 <= offset < self.size or offset % ALIGNMENT or not self._enter():
            return None
        try:
            index = bisect.bisect_right(self._own_blocks, offset, key=_offset) - 1
            if index < 0:
                return None
            block = self._own_blocks[index][1]
            if offset + len(frame) > block.offset + block.size:
                return None
            block.holds += 1
            return block, offset
        finally:
            self._leave()

    # -- copies for the next reader

    def keep(self, frame: memoryview, block: Block) -> None:
        """Remembers that `block` has the content of `frame`, which will not change any more, for as long as it lives."""
        if not self._enter():
            return
        try:
            self._settle()
            self._forget(id(frame))
            block.holds += 1
            self._kept[id(frame)] = _Kept(frame, block, self._unwanted.append)
            self._kept_bytes += block.filled
            while self._kept_bytes > min(KEPT_BYTES, self.limit_bytes // 2) and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))
        finally:
            self._leave()

    def kept(self, frame: memoryview) -> Block | None:
        """The block, held once more, with the content of that very frame."""
        if not self._enter():
            return None
        try:
            kept = self._kept.get(id(frame))
            if kept is None or kept.frame() is not frame:
                return None
            kept.used = time.monotonic()
            self._kept.move_to_end(id(frame))
            kept.block.holds += 1
            return kept.block
        finally:
            self._leave()

    # -- giving memory back

    def trim(self, now: float) -> bool:
        """Gives idle memory back, and maps what will be used again; says whether there is more to give back later."""
        while self._map_some():
            pass
        if not self._enter():
            return True
        try:
            self._settle()
            for number, kept in list(self._kept.items()):
                if kept.block.holds == 1 and now - kept.used >= IDLE_S:
                    self._forget(number)
            for blocks in list(self._warm.values()):
                while blocks and now - blocks[0].free_since >= IDLE_S:
                    self._cool(blocks.pop(0))
            return bool(self._warm_bytes or self._kept or self._own)
        finally:
            self._leave()

    def _map_some(self) -> bool:
        """Maps a piece of what was written by the kernel, others wait for at most that; False: there is nothing to do."""
        if not self._unmapped or not self._enter():
            return False
        try:
            block = self._unmapped[0]
            size = min(block.filled - block.present, _MAPPED_BYTES)
            if size > 0 and native.populate(self._address + block.offset + block.present, size):
                block.present += size
            else:
                block.present = block.filled
            if block.present == block.filled:
                self._unmapped.popleft()
        except IndexError:  # another thread has done it
            pass
        finally:
            self._leave()
        return True

    # -- inside the lock

    def _enter(self) -> bool:
        """Takes the lock; False: this thread is inside already, by way of somebody's finalizer."""
        me = threading.get_ident()
        if self._inside == me:
            return False
        self._lock.acquire()
        self._inside = me
        return True

    def _leave(self) -> None:
        self._inside = 0
        self._lock.release()

    def _settle(self) -> None:
        while self._released:
            self._release(self._released.popleft())
        while self._unwanted:
            frame = self._unwanted.popleft()
            assert isinstance(frame, _FrameRef)
            kept = self._kept.get(frame.number)
            if kept is not None and kept.frame is frame:
                self._forget(frame.number)
        while self._dropped:
            block = self._dropped.popleft()
            self._own.pop(block.offset, None)
            index = bisect.bisect_left(self._own_blocks, block.offset, key=_offset)
            if index < len(self._own_blocks) and self._own_blocks[index][1] is block:
                del self._own_blocks[index]
            self._release(block)

    def _release(self, block: Block) -> None:
        block.holds -= 1
        if block.holds:
            return
        self._held -= 1
        self._held_by_size[block.size] -= 1
        self._warm_bytes += block.filled
        if block.spoiled:
            self._cool(block)
            return
        block.free_since = time.monotonic()
        self._warm.setdefault(block.size, []).append(block)
        if block.present < block.filled:
            self._unmapped.append(block)  # not sooner: what peers keep is none of this process's memory
        while self._warm_bytes > self.limit_bytes // 2:
            self._cool_one()

    def _forget(self, number: int) -> None:
        if (kept := self._kept.pop(number, None)) is not None:
            self._kept_bytes -= kept.block.filled
            self._release(kept.block)

    def _take_warm(self, size: int) -> Block | None:
        if not (blocks := self._warm.get(size)):
            return None
        block = blocks.pop()
        self._warm_bytes -= block.filled
        return block

    def _take_new(self, size: int, size_bytes: int) -> Block | None:
        if self._resident - self._warm_bytes - self._kept_bytes + size_bytes > self.limit_bytes:
            return None  # whatever is given back
        while self._resident + size_bytes > self.limit_bytes:
            if not self._cool_one():
                return None
        while (offset := self._new.take(size)) is None:
            if not self._cool_one():
                return None
        return Block(offset, size)

    def _cool_one(self) -> bool:
        """Gives one free block back, or makes one free by forgetting a copy; False: there is none."""
        if not self._warm_bytes:
            resident = self._resident
            for number, kept in self._kept.items():
                if kept.block.holds == 1:
                    self._forget(number)
                    break
            else:
                return False
            if self._resident < resident:  # more than may be warm: it is gone
                return True
        blocks = [blocks for blocks in self._warm.values() if blocks]
        if not blocks:
            return False
        oldest = min(blocks, key=lambda some: some[0].free_since)
        self._cool(oldest.pop(0))
        return True

    def _cool(self, block: Block) -> None:
        self._warm_bytes -= block.filled
        try:
            native.punch_hole(self._address + block.offset, block.size)
            self._resident -= block.filled
            block.filled = block.present = 0  # it may wait to be mapped
        except OSError as exc:
            _log.warning("memory of the arena could not be given back: %s", exc)
            return  # neither used again nor counted as free
        self._new.give_back(block.offset, block.size)


class _FrameRef(weakref.ref[memoryview]):
    """Watches a frame; when it tells the frame's end too early, a copy is made again, and that is all."""

    __slots__ = ("number",)

    number: int


class _Kept:
    """A copy, and the frame that it is of."""

    __slots__ = ("block", "frame", "used")

    def __init__(self, frame: memoryview, block: Block, ended: Callable[[weakref.ref[memoryview]], None]) -> None:
        self.frame = _FrameRef(frame, ended)
        self.frame.number = id(frame)
        self.block = block
        self.used = time.monotonic()


def block_size(size_bytes: int) -> int:
    """The size of the block that is taken for so many bytes."""
    step = max(PAGE_BYTES, (1 << max(size_bytes - 1, 1).bit_length()) // (2 * _SIZES_PER_DOUBLING))
    return size_bytes + -size_bytes % step


def _offset(entry: tuple[int, Block]) -> int:
    return entry[0]
