"""Mappings of a peer's arena that outlive their lease, and serve the next one of the same block.

Page faults cost a reader as much as the copy costs the sender: 64 MiB are summed in 8 ms through a new mapping, and in 3
through one whose pages are there (`python -m bench.shm`). So a mapping to which nobody has written is kept, and
serves the next lease of the same block: what the lender writes shows in it, and where the lender has given memory back
the kernel has taken the pages out. Whether somebody has written is read off the kernel's books, page by page.
"""

from __future__ import annotations

from collections import OrderedDict

from zmqtasks.protocol.frames import KIB
from zmqtasks.transports.shm import native

KEPT_FROM_BYTES = 512 * KIB
"""Mappings of this size on are kept for the block's next lease: the look at the books takes 30 us and 0.4 more per MiB."""
KEPT_MAPPINGS = 32
"""Of one link. They take addresses and page tables (2 KiB per MiB), no memory."""


class Mappings:
    """Mappings of a peer's arena that wait for the next lease of their block; any thread may call, none waits."""

    __slots__ = ("_by_offset", "_over")

    def __init__(self) -> None:
        self._by_offset: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._over = False

    def take(self, offset: int, size_bytes: int) -> tuple[int, int] | None:
        """Address and size of a mapping from `offset` on, of at least that size."""
        found = self._by_offset.pop(offset, None)
        if found is not None and found[1] < size_bytes:
            native.unmap(*found)
            return None
        return found

    def keep_or_unmap(self, offset: int, address: int, size_bytes: int) -> None:
        """What becomes of a mapping whose lease has ended, before the lender hears of it."""
        if size_bytes < KEPT_FROM_BYTES or self._over or native.has_own_pages(address, size_bytes):
            native.unmap(address, size_bytes)
            return
        before = self._by_offset.pop(offset, None)
        self._by_offset[offset] = (address, size_bytes)
        if before is not None:
            native.unmap(*before)
        while self._over or len(self._by_offset) > KEPT_MAPPINGS:
            try:
                _, oldest = self._by_offset.popitem(last=False)
            except KeyError:  # another thread has taken it
                return
            native.unmap(*oldest)

    def end(self) -> None:
        """Nothing will be lent any more."""
        self._over = True
        while self._by_offset:
            try:
                _, found = self._by_offset.popitem()
            except KeyError:
                return
            native.unmap(*found)
