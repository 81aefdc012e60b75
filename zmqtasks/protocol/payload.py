"""A payload is a user object that nobody has opened: a header that says which family wrote it, and frames of bytes.

The header is MessagePack: `[family name, metadata of the family]`. Parsing a header or an inline blob opens nothing:
only `zmqtasks.protocol.serialize.deserialize` runs the family's code.

A small payload rides inside a control op as one *inline blob*. Its first byte tells the layout:

- 0x80: the blob is a plain pickle and nothing else. Every pickle of protocol 2 and later begins with this byte, so the
  commonest payload has neither tag nor header to write, copy or parse.
- 0x01: `tag, 3 zero bytes, header length, number of frames, length of each frame` (little-endian 32-bit), then the
  header and the frames, back to back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from zmqtasks.errors import DeserializationError, PayloadTooLargeError
from zmqtasks.protocol.frames import Buffer, as_bytes_view, total_size

__all__ = ["PICKLE_HEADER", "Payload", "make_header", "pack_inline", "parse_header", "unpack_inline"]

PICKLE_TAG = 0x80
GENERAL_TAG = 0x01

_PREFIX = struct.Struct("<BxxxII")
_LENGTH_BYTES = 4
_MAX_INLINE_BYTES = (1 << 32) - 1

_header_encode = msgspec.msgpack.Encoder().encode
_header_decode = msgspec.msgpack.Decoder(tuple[str, bytes]).decode


def make_header(family: str, metadata: bytes = b"") -> bytes:
    """The header of a payload that `family` wrote, with what the family needs to read it."""
    return _header_encode((family, metadata))


PICKLE_HEADER = make_header("pickle")


def parse_header(header: Buffer) -> tuple[str, bytes]:
    """Family name and family metadata; raises DeserializationError for anything that is not a header."""
    try:
        return _header_decode(header)
    except (msgspec.MsgspecError, RecursionError, ValueError) as exc:
        raise DeserializationError(f"a payload header of {len(header)} bytes is malformed: {exc}") from exc


class Payload(msgspec.Struct, frozen=True, gc=False):
    """An unopened user object. The frames may be views of memory that somebody else owns: they keep it alive."""

    header: bytes
    frames: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        """Bytes that the payload takes on a wire: header and frames."""
        return len(self.header) + total_size(self.frames)

    @property
    def family(self) -> str:
        """Name of the family that wrote the payload; raises DeserializationError when the header is malformed."""
        return parse_header(self.header)[0]


def pack_inline(payload: Payload) -> bytes:
    """`payload` as one byte string of its own; raises PayloadTooLargeError from 4 GiB on."""
    frames = payload.frames
    if len(frames) == 1 and payload.header == PICKLE_HEADER:
        (frame,) = frames
        if len(frame) and frame[0] == PICKLE_TAG:
            return bytes(frame)
    if payload.nbytes > _MAX_INLINE_BYTES:
        raise PayloadTooLargeError(f"a payload of {payload.nbytes} bytes cannot be inline: send its frames instead")
    views = [as_bytes_view(frame) for frame in frames]
    prefix = _PREFIX.pack(GENERAL_TAG, len(payload.header), len(views))
    lengths = struct.pack(f"<{len(views)}I", *(view.nbytes for view in views))
    return b"".join((prefix, lengths, payload.header, *views))


def unpack_inline(data: Buffer) -> Payload:
    """The payload in an inline blob; raises DeserializationError, and nothing else, for bytes that are not one.

    A plain pickle stays a view of `data`. Other frames are copied: each starts a fresh, writable allocation, so that
    arrays made on it are aligned and may be written, and a small value doesn't keep a whole received message alive.
    """
    if len(data) == 0:
        raise DeserializationError("an inline payload is empty")
    if isinstance(data, memoryview):
        data = as_bytes_view(data)
    if data[0] == PICKLE_TAG:
        return Payload(PICKLE_HEADER, (data,))
    return _unpack_general_untrusted(memoryview(data))


def _unpack_general_untrusted(view: memoryview) -> Payload:
    size = view.nbytes
    if view[0] != GENERAL_TAG:
        raise DeserializationError(f"an inline payload of {size} bytes begins with the unknown tag {view[0]:#04x}")
    if size < _PREFIX.size:
        raise DeserializationError(f"an inline payload is cut short: {size} bytes, {_PREFIX.size} at least")
    _, header_bytes, count = _PREFIX.unpack_from(view)
    start = _PREFIX.size + count * _LENGTH_BYTES
    if start + header_bytes > size:
        raise DeserializationError(
            f"an inline payload of {size} bytes announces {count} frames and a header of {header_bytes} bytes"
        )
    lengths = struct.unpack_from(f"<{count}I", view, _PREFIX.size)
    if start + header_bytes + sum(lengths) != size:
        raise DeserializationError(
            f"an inline payload of {size} bytes announces {start + header_bytes + sum(lengths)} bytes"
        )
    header = bytes(view[start : start + header_bytes])
    parse_header(header)
    frames = []
    position = start + header_bytes
    for length in lengths:
        frames.append(bytearray(view[position : position + length]))
        position += length
    return Payload(header, tuple(frames))
