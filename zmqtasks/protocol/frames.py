"""A message is a list of frames; a frame is a buffer of bytes.

Frame 0 holds a batch of ops, further frames the buffers of payloads. Limits bound what is read from a peer before memory is
taken for it: every length on a wire is checked against the limits in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

Buffer: TypeAlias = bytes | bytearray | memoryview
Frames: TypeAlias = Sequence[Buffer]

ALIGNMENT = 64
"""Received frames start at a multiple of this: one cache line, and enough for any SIMD load."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one message; `frame_bytes` for each of its frames, `message_bytes` for their sum."""

    frames: int
    frame_bytes: int
    message_bytes: int


HELLO_LIMITS = Limits(frames=4, frame_bytes=64 * KIB, message_bytes=128 * KIB)
"""In force until the peer has authenticated: room for a hello or a proof with an introduction, and nothing else."""

CONTROL_LIMITS = Limits(frames=64, frame_bytes=256 * MIB, message_bytes=256 * MIB)
"""For authenticated control links: ops carry small payloads only, senders split batches well below this."""

DATA_LIMITS = Limits(frames=1 << 20, frame_bytes=1 << 46, message_bytes=1 << 46)
"""For authenticated data links: whatever the memory holds."""


def as_bytes_view(buffer: Buffer) -> memoryview:
    """A flat memoryview of bytes over `buffer`, without a copy; raises TypeError when that is not C-contiguous."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    return view.cast("B")  # which raises it


def total_size(frames: Frames) -> int:
    """Sum of the sizes of `frames`, in bytes."""
    return sum(frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames)
