"""The reader's side of leases: blocks of the peer's arena as frames, mapped privately, until their last view is gone.

A lease is one mapping of its own, copy on write: a frame may be written to like any other, what is written is this
process's alone and goes with the mapping, and the same block lent twice is two frames.

What tells that nobody looks any more stands below every view, and is unknown to the garbage collector: see
`native.owned_memory`. Its end may come in any thread, at any allocation: what happens then takes no lock.
"""

from __future__ import annotations

import os
import weakref

from zmqtasks.errors import LimitExceededError, RemoteProtocolError
from zmqtasks.protocol.frames import ALIGNMENT
from zmqtasks.transports.memory import allocate_aligned
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.channel import PeerArena, ReturningHalf
from zmqtasks.transports.shm.mappings import Mappings
from zmqtasks.transports.shm.native import PAGE_BYTES

MOST_MAPPINGS = 16_384
"""Leases that are mapped at the same time; further ones are copied. Linux allows a process 65,530 mappings."""


class _Lease(weakref.ref["native.Owner"]):
    """Watches the owner of a mapping."""

    __slots__ = ("address", "mappings", "number", "offset", "returning", "size")

    address: int
    mappings: Mappings
    offset: int
    number: int
    returning: ReturningHalf
    size: int


_leases: dict[int, _Lease] = {}


def live_leases() -> int:
    """How many leases of this process are mapped."""
    return len(_leases)


def borrow_untrusted(
    arena: PeerArena, offset: int, size_bytes: int, number: int, returning: ReturningHalf
) -> memoryview:
    """The frame at `offset` of the peer's arena, lent as lease `number`.

    Raises RemoteProtocolError when it does not lie within the arena, LimitExceededError when there is no memory.
    """
    if size_bytes <= 0 or offset % ALIGNMENT or not 0 <= offset <= arena.size - size_bytes:
        raise RemoteProtocolError(
            f"the peer lent {size_bytes} bytes at {offset} of an arena that has {arena.size}, in steps of {ALIGNMENT}"
        )
    if len(_leases) < MOST_MAPPINGS and native.ends_exactly():
        skipped = offset % PAGE_BYTES
        length = skipped + size_bytes
        length += -length % PAGE_BYTES
        kept = arena.mappings.take(offset - skipped, length)
        try:
            address, length = kept or (native.map_private(arena.descriptor, offset - skipped, length), length)
        except OSError:
            pass  # no room for addresses, or a strict system that counts them as memory
        else:
            owner = native.owned_memory(address, length)
            lease = _Lease(owner, _gone)
            lease.address, lease.size, lease.number, lease.returning = address, length, number, returning
            lease.mappings, lease.offset = arena.mappings, offset - skipped
            _leases[id(lease)] = lease
            return owner.data[skipped : skipped + size_bytes]
    return _copy_untrusted(arena, offset, size_bytes, number, returning)


def _gone(lease: weakref.ref[native.Owner]) -> None:
    assert isinstance(lease, _Lease)
    _leases.pop(id(lease), None)
    lease.mappings.keep_or_unmap(lease.offset, lease.address, lease.size)
    lease.returning.give_back(lease.number)


def _copy_untrusted(
    arena: PeerArena, offset: int, size_bytes: int, number: int, returning: ReturningHalf
) -> memoryview:
    try:
        memory = allocate_aligned(size_bytes)
    except (MemoryError, ValueError, OverflowError) as exc:
        raise LimitExceededError(
            f"the peer lent {size_bytes} bytes within the limits in force, but there is no memory for them"
        ) from exc
    read = 0
    while read < size_bytes:
        try:
            got = os.preadv(arena.descriptor, [memory[read:]], offset + read)
        except OSError as exc:
            raise RemoteProtocolError(f"the peer's arena cannot be read: {exc}") from exc
        if not got:
            raise RemoteProtocolError("the peer's arena ended before its size")
        read += got
    returning.give_back(number)
    return memory
