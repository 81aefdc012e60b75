"""Payload headers and inline blobs: round trips, the plain-pickle layout, and any bytes from a peer."""

from __future__ import annotations

import os
import pickle
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.payload import (
    PICKLE_HEADER,
    Payload,
    make_header,
    pack_inline,
    parse_header,
    unpack_inline,
)

frame_lists = st.lists(st.binary(max_size=300), max_size=5)


def test_header_is_plain_messagepack():
    assert msgpack.unpackb(make_header("numpy", b"\x01\x02")) == ["numpy", b"\x01\x02"]
    assert parse_header(make_header("numpy", b"\x01\x02")) == ("numpy", b"\x01\x02")
    assert parse_header(PICKLE_HEADER) == ("pickle", b"")


def test_nbytes_counts_header_and_frames():
    payload = Payload(b"abc", (b"12", memoryview(bytearray(40)).cast("d"), bytearray(5)))
    assert payload.nbytes == 3 + 2 + 40 + 5


def test_plain_pickle_is_its_own_blob():
    data = pickle.dumps((1, "a"), 5)
    blob = pack_inline(Payload(PICKLE_HEADER, (data,)))
    assert blob is data
    payload = unpack_inline(blob)
    assert payload.header == PICKLE_HEADER
    assert payload.frames[0] is data


def test_pickle_in_a_memoryview_stays_a_view():
    data = bytearray(pickle.dumps([1, 2], 5))
    (frame,) = unpack_inline(memoryview(data)).frames
    assert isinstance(frame, memoryview)
    assert frame.obj is data


@given(family=st.text(min_size=1, max_size=20), metadata=st.binary(max_size=100), frames=frame_lists)
def test_general_blobs_round_trip(family, metadata, frames):
    payload = Payload(make_header(family, metadata), tuple(frames))
    back = unpack_inline(memoryview(pack_inline(payload)))
    assert back.header == payload.header
    assert [bytes(frame) for frame in back.frames] == frames
    assert back.family == family
    assert not any(memoryview(frame).readonly for frame in back.frames)


def test_frames_of_any_format_are_packed_as_bytes():
    doubles = memoryview(struct.pack("<3d", 1, 2, 3)).cast("d")
    (frame,) = unpack_inline(pack_inline(Payload(make_header("x"), (doubles,)))).frames
    assert frame == doubles.tobytes()


def test_unpacked_frames_do_not_keep_the_message_alive():
    message = bytearray(pack_inline(Payload(make_header("x"), (b"abc",))))
    payload = unpack_inline(memoryview(message))
    message.clear()  # a bytearray with a live view raises BufferError
    assert payload.frames[0] == b"abc"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x01",
        b"\x01" + bytes(11),
        struct.pack("<BxxxII", 1, 0, 0xFFFFFFFF),
        struct.pack("<BxxxII", 1, 0xFFFFFFFF, 0),
        struct.pack("<BxxxIII", 1, len(PICKLE_HEADER), 1, 0xFFFFFFFF) + PICKLE_HEADER,
        struct.pack("<BxxxIII", 1, len(PICKLE_HEADER), 1, 2) + PICKLE_HEADER + b"abc",
        struct.pack("<BxxxII", 1, 3, 0) + b"abc",
        struct.pack("<BxxxII", 1, 5, 0) + b"\xdd\xff\xff\xff\xff",
    ],
)
def test_malformed_blobs_are_refused(data):
    with pytest.raises(DeserializationError, match="payload"):
        unpack_inline(data)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda data: b"\x01\0\0\0" + data)))
def test_any_bytes_give_a_payload_or_the_named_error(data):
    try:
        payload = unpack_inline(data)
    except DeserializationError:
        return
    assert isinstance(payload, Payload)


@given(st.binary(max_size=100))
def test_any_bytes_as_header_give_a_family_or_the_named_error(data):
    try:
        name, metadata = parse_header(data)
    except DeserializationError:
        return
    assert isinstance(name, str)
    assert isinstance(metadata, bytes)


@given(frames=frame_lists, position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_payload_or_the_named_error(frames, position, value):
    blob = bytearray(pack_inline(Payload(make_header("x", b"meta"), tuple(frames))))
    blob[position % len(blob)] = value
    try:
        unpack_inline(blob)
    except DeserializationError:
        pass


def test_parsing_opens_nothing(tmp_path):
    target = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    blob = pack_inline(Payload(PICKLE_HEADER, (pickle.dumps(Bomb()),)))
    payload = unpack_inline(blob)
    assert payload.family == "pickle"
    assert payload.nbytes > 0
    repr(payload)
    assert not target.exists()
