"""What the stream of a ucx link has beyond that of `stream`. No I/O in here.

    OFFER:u32 length:u32 tag:u64 crc:u32 address:bytes*length   the sender takes large frames by UCX, under this tag
    LARGE:u32 0:u32                                             of the message that follows, frames of at least
                                                                `LARGE_BYTES` are not on the stream: UCX brings them, in order

The tag is random and chosen by the receiver, so that only its peer can know it. UCX does not check addresses: one that is
damaged may end the process. The checksum (CRC-32) keeps accidents out; who has the cluster key is trusted not to forge one.
"""

from __future__ import annotations

import struct
import zlib

from zmqtasks.errors import LimitExceededError, RemoteProtocolError
from zmqtasks.protocol.frames import MIB, Frames, Limits, as_bytes_view
from zmqtasks.transports.stream import StreamReader

LARGE_BYTES = 1 * MIB
"""Frames from here on go by UCX. UCX sends these by rendezvous, that is when the receiver asks for them: what is smaller it
sends at once, and buffers at a receiver that does not read."""

CHUNK_BYTES = 4 * MIB
"""About what is given to UCX at once: a transfer of 256 MiB in one piece holds the loop up for long, and over shared memory
chunks of 8 MiB are slower."""

_MESSAGE, _OFFER, _LARGE = 1, 3, 4
_HEADER = struct.Struct("<II")
_OFFER_HEADER = struct.Struct("<IIQI")
_ADDRESS_BYTES = 4096


def pack_offer(tag: int, address: bytes) -> bytes:
    """An offer to take large frames."""
    return _OFFER_HEADER.pack(_OFFER, len(address), tag, zlib.crc32(address)) + address


def large_of(frames: Frames) -> list[memoryview]:
    """The frames of a message that UCX takes."""
    return [view for frame in frames if (view := as_bytes_view(frame)).nbytes >= LARGE_BYTES]


def pack_large(frames: Frames) -> bytes:
    """What is on the stream of a message with large frames."""
    views = [as_bytes_view(frame) for frame in frames]
    head = _HEADER.pack(_LARGE, 0) + struct.pack(
        f"<II{len(views)}Q", _MESSAGE, len(views), *(view.nbytes for view in views)
    )
    return b"".join([head, *(view for view in views if view.nbytes < LARGE_BYTES)])


def chunks(frame: memoryview) -> list[memoryview]:
    """The pieces in which a large frame is transferred; none is much smaller than the others."""
    count = -(-frame.nbytes // CHUNK_BYTES)
    size = -(-frame.nbytes // count)
    return [frame[start : start + size] for start in range(0, frame.nbytes, size)]


class UcxReader(StreamReader):
    """Parses the stream of a ucx link; offers and large frames are left in attributes, for the comm."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.offer: tuple[int, bytes] | None = None
        """Tag and worker address of the peer."""
        self.large: list[memoryview] = []
        """Memory that UCX has to fill before the last message is whole."""
        self._large_follows = False
        self._places: list[tuple[int, memoryview]] = []

    def next_message_untrusted(self) -> list[memoryview] | None:
        if self._frames is None and self._direct is None and not self._take_prefixes_untrusted():
            return None
        frames = super().next_message_untrusted()
        if frames is None:
            return None
        if self._large_follows:
            raise RemoteProtocolError("the peer announced large frames, and sent a message without any")
        for index, memory in self._places:
            frames.insert(index, memory)
            self.large.append(memory)
        self._places = []
        return frames

    def whole_message_untrusted(self, size_bytes: int, data: memoryview | None = None) -> list[memoryview] | None:
        return None if self._large_follows else super().whole_message_untrusted(size_bytes, data)

    def _take_prefixes_untrusted(self) -> bool:
        """Takes what stands before a message; False: it is not complete."""
        if self._pos < self._end and self._data[self._pos] == _MESSAGE:
            return True
        while self._end - self._pos >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._data, self._pos)
            if kind == _LARGE and length == 0 and not self._large_follows:
                self._pos += _HEADER.size
                self._large_follows = True
            elif kind == _OFFER and not self._large_follows:
                if self.offer is not None or not 0 < length <= _ADDRESS_BYTES:
                    raise RemoteProtocolError(f"the peer offered UCX a second time, or by an address of {length} bytes")
                start = self._pos + _OFFER_HEADER.size
                if start + length > self._end:
                    return False
                _, _, tag, checksum = _OFFER_HEADER.unpack_from(self._data, self._pos)
                address = bytes(self._data[start : start + length])
                if zlib.crc32(address) != checksum:
                    raise RemoteProtocolError("the peer offered UCX by an address that is damaged")
                self.offer = tag, address
                self._pos = start + length
            else:
                return True
        return True

    def _accept_lengths(self, lengths: tuple[int, ...]) -> None:
        super()._accept_lengths(lengths)
        if not self._large_follows:
            return
        places = [index for index, length in enumerate(lengths) if length >= LARGE_BYTES]
        if not places:
            raise RemoteProtocolError("the peer announced large frames, and sent a message without any")
        self._large_follows = False
        try:
            self._places = [(index, self._allocate_untrusted(lengths[index])) for index in places]
        except LimitExceededError:
            self._places = []
            raise
        self._lengths = tuple(length for length in lengths if length < LARGE_BYTES)
