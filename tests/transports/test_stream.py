"""The stream protocol without a stream: any cut of the bytes gives the same messages; bad bytes raise the named
error.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqtasks.errors import LimitExceededError, LocalProtocolError, RemoteProtocolError
from zmqtasks.protocol.frames import DATA_LIMITS, HELLO_LIMITS, Limits
from zmqtasks.testing.comms import memory_bytes
from zmqtasks.transports.stream import GOODBYE, PREAMBLE, StreamReader, pack_message

_rng = random.Random(3)
MESSAGES = [
    [b""],
    [b"x"],
    [b"x" * 512],
    [b"x" * 513],
    [b"", b"a", b""],
    [_rng.randbytes(20_000), b"b" * 100],
    [_rng.randbytes(32 * 1024), _rng.randbytes(32 * 1024 + 1)],
    [b"%d" % number for number in range(6_000)],
    [_rng.randbytes(size) for size in (512, 0, 513, 63, 16 * 1024, 16 * 1024 + 1) * 20],
    [_rng.randbytes(300_000), b"after"],
]


def packed(message: list[bytes]) -> bytes:
    pieces, size = pack_message(message)
    wire = b"".join(pieces)
    assert len(wire) == size
    return wire


def read(data: bytes, step: int, limits: Limits = DATA_LIMITS) -> list[list[bytes]]:
    """All messages of a stream fed in pieces of `step` bytes; a goodbye is an empty list."""
    reader = StreamReader(limits)
    greeted = False
    messages = []
    position = 0
    while position < len(data):
        buffer = reader.get_buffer()
        piece = data[position : position + min(step, len(buffer))]
        buffer[: len(piece)] = piece
        position += len(piece)
        reader.received(len(piece))
        greeted = greeted or reader.next_preamble_untrusted()
        while greeted and (message := reader.next_message_untrusted()) is not None:
            messages.append([bytes(frame) for frame in message])
            if not message:
                return messages
        reader.keep_rest()
    return messages


@pytest.mark.parametrize("step", [1, 7, 4096, 65_537, 1 << 30])
def test_any_cut_gives_the_same_messages(step: int) -> None:
    chosen = MESSAGES if step > 1 else MESSAGES[:6]
    assert read(PREAMBLE + b"".join(map(packed, chosen)) + GOODBYE + b"ignored", step) == [*chosen, []]


@given(st.lists(st.lists(st.binary(max_size=2000), min_size=1, max_size=6)), st.integers(1, 5000))
def test_messages_survive(messages: list[list[bytes]], step: int) -> None:
    assert read(PREAMBLE + b"".join(map(packed, messages)), step) == messages


@given(st.binary(max_size=3000), st.integers(1, 3000))
def test_any_bytes_parse_or_raise_the_named_error(data: bytes, step: int) -> None:
    try:
        read(PREAMBLE + data, step, HELLO_LIMITS)
    except RemoteProtocolError:
        pass


def test_large_frames_are_not_joined() -> None:
    large = bytearray(100_000)
    pieces, _ = pack_message([b"a", large, b"b"])
    assert len(pieces) == 3
    assert isinstance(pieces[1], memoryview)
    assert pieces[1].obj is large


def test_no_frames() -> None:
    with pytest.raises(LocalProtocolError):
        pack_message([])


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"\xf5ztasks\x02", b"\xf5ztaskt"])
def test_wrong_preamble(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"version 2|began (with|a TLS handshake)"):
        read(data, 1)


@pytest.mark.parametrize(
    "announced",
    [
        struct.pack("<II", 1, HELLO_LIMITS.frames + 1),
        struct.pack("<II", 1, 0xFFFFFFFF),
        struct.pack("<IIQ", 1, 1, HELLO_LIMITS.frame_bytes + 1),
        struct.pack("<IIQ", 1, 1, 0xFFFFFFFFFFFFFFFF),
        struct.pack("<IIQQQ", 1, 3, *[HELLO_LIMITS.frame_bytes] * 3),
    ],
)
def test_limits_come_before_memory(announced: bytes) -> None:
    before = memory_bytes()
    with pytest.raises(LimitExceededError):
        read(PREAMBLE + announced, 1000, HELLO_LIMITS)
    assert memory_bytes() - before < 1 << 20


def test_no_memory_within_the_limits() -> None:
    with pytest.raises(LimitExceededError, match="no memory"):
        read(PREAMBLE + struct.pack("<IIQ", 1, 1, 1 << 46), 1000)


@pytest.mark.parametrize("kind", [0, 3, 0xFFFFFFFF])
def test_unknown_kind(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="where a message should begin"):
        read(PREAMBLE + struct.pack("<II", kind, 1), 1000)


def test_message_of_no_frames() -> None:
    with pytest.raises(RemoteProtocolError):
        read(PREAMBLE + struct.pack("<II", 1, 0), 1000)
