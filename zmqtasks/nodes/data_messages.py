"""Values in messages of data links: how they are cut, and how they are read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.ids import Key
from zmqtasks.protocol.frames import DATA_LIMITS, MIB, Buffer
from zmqtasks.protocol.payload import Payload

CUT_BYTES = 64 * MIB
CUT_KEYS = 10_000
CUT_FRAMES = DATA_LIMITS.frames - 1


class Part(NamedTuple):
    """Values that travel in one message."""

    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    frames: list[Buffer]


def cut(items: Iterable[tuple[Key, Payload]]) -> Iterator[Part]:
    """Values in messages of about `CUT_BYTES`; a larger value has a message of its own."""
    part, size = Part([], [], [], []), 0
    for key, payload in items:
        added = payload.nbytes
        if part.keys and (
            size + added > CUT_BYTES
            or len(part.keys) >= CUT_KEYS
            or len(part.frames) + len(payload.frames) > CUT_FRAMES
        ):
            yield part
            part, size = Part([], [], [], []), 0
        part.keys.append(key)
        part.headers.append(payload.header)
        part.frame_counts.append(len(payload.frames))
        part.frames.extend(payload.frames)
        size += added
    if part.keys:
        yield part


def payloads_untrusted(
    keys: list[Key], headers: list[bytes], frame_counts: list[int], frames: list[memoryview]
) -> dict[Key, Payload]:
    """The values in a message from a peer; RemoteProtocolError when the columns and the frames do not fit together."""
    if not len(keys) == len(headers) == len(frame_counts):
        raise RemoteProtocolError(
            f"the peer sent {len(keys)} keys with {len(headers)} headers and {len(frame_counts)} frame counts"
        )
    if sum(frame_counts) != len(frames) - 1 or min(frame_counts, default=0) < 0:
        raise RemoteProtocolError(f"the peer sent {len(frames) - 1} frames and counts of {sum(frame_counts)}")
    values: dict[Key, Payload] = {}
    position = 1
    for key, header, count in zip(keys, headers, frame_counts, strict=True):
        values[key] = Payload(header, tuple(frames[position : position + count]))
        position += count
    return values
