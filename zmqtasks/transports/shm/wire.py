"""Messages of shm on the stream: the framing of `stream`, in which a frame may be a lease.

A length with its highest bit set is that of a lent frame; in the place of its bytes stands the offset in the sender's
arena, 8 bytes. Leases are numbered in the order in which they stand on the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol.frames import HELLO_LIMITS, Buffer, Limits
from zmqtasks.transports.stream import StreamReader, pack_message

LENT = 1 << 63

_OFFSET = struct.Struct("<Q")
_TABLE_AT = 8  # of a message: after kind and count
_LENGTH_BYTES = 8


def pack_lent(frames: Sequence[Buffer], lent: dict[int, tuple[int, int]]) -> tuple[list[bytes | memoryview], int]:
    """One message like `pack_message`; `lent` has offset and size of those frames that are leases, by index."""
    inline = [_OFFSET.pack(lent[index][0]) if index in lent else frame for index, frame in enumerate(frames)]
    pieces, size = pack_message(inline)
    if lent:
        head = bytearray(pieces[0])
        for index, (_, size_bytes) in lent.items():
            _OFFSET.pack_into(head, _TABLE_AT + _LENGTH_BYTES * index, LENT | size_bytes)
        pieces[0] = bytes(head)
    return pieces, size


class ShmReader(StreamReader):
    """A `StreamReader` that gets lent frames by `borrow(offset, size)`."""

    __slots__ = ("_borrow", "_lent", "_open", "lent_bytes")

    def __init__(self, limits: Limits, borrow: Callable[[int, int], memoryview]) -> None:
        self._open = False
        super().__init__(limits)
        self._borrow = borrow
        self._lent: list[tuple[int, int]] = []
        self.lent_bytes = 0
        """Sum of all leases up to now."""

    def set_limits(self, limits: Limits) -> None:
        super().set_limits(limits)
        self._open = limits.frame_bytes > HELLO_LIMITS.frame_bytes

    def next_message_untrusted(self) -> list[memoryview] | None:
        frames = super().next_message_untrusted()
        if frames and self._lent:
            lent, self._lent = self._lent, []
            for index, size_bytes in lent:
                (offset,) = _OFFSET.unpack(frames[index])
                frames[index] = self._borrow(offset, size_bytes)
                self.lent_bytes += size_bytes
        return frames

    def _accept_lengths(self, lengths: tuple[int, ...]) -> None:
        if max(lengths) < LENT:
            super()._accept_lengths(lengths)
            return
        super()._accept_lengths(tuple(length & ~LENT for length in lengths))  # the limits are for what is delivered
        if not self._open:
            raise RemoteProtocolError("the peer lends memory before it has shown that it may")
        self._lent = [(index, length & ~LENT) for index, length in enumerate(lengths) if length & LENT]
        self._lengths = tuple(_OFFSET.size if length & LENT else length for length in lengths)
