"""Compression of frames: samples, the decision, blocks there and back, and peers that lie."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqtasks.errors import ConfigError, RemoteProtocolError
from zmqtasks.protocol import compression
from zmqtasks.protocol.compression import BLOCK_BYTES, HIDDEN_BYTES, Codec, LinkRate, SampleBackoff, Verdict
from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.protocol.serialize import serialize

CODECS = ["lz4", "zstd"]
every_codec = pytest.mark.parametrize("name", CODECS)
SIZES = [1, 64 * KIB, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 17]


def memory(size: int) -> memoryview:
    return memoryview(bytearray(size))


def codec(name: str) -> Codec:
    return compression.available()[name]


def text(size: int) -> bytes:
    return (b"line %d of a text that repeats itself\n" * (size // 30 + 1))[:size]


def packed(raw: bytes, name: str) -> memoryview:
    """Blocks of a frame, whether they are worth it or not."""
    made = b""
    for start in range(0, len(raw), BLOCK_BYTES):
        block = codec(name).compress(memoryview(raw)[start : start + BLOCK_BYTES])
        made += struct.pack("<I", len(block)) + block
    return memoryview(made)


@every_codec
@pytest.mark.parametrize("size", SIZES)
def test_frames_come_back_as_they_were(name: str, size: int) -> None:
    for raw in (text(size), os.urandom(size), bytes(size)):
        back = compression.decompress_untrusted(packed(raw, name), name, size, memory)
        assert back == raw
        assert not back.readonly


@every_codec
def test_what_does_not_shrink_as_its_samples_did_is_given_up(name: str) -> None:
    raw = text(64 * KIB) + os.urandom(8 * MIB)
    assert compression.compress(raw, codec(name)) is None
    assert compression.compress(os.urandom(64 * KIB), codec(name)) is None
    made = compression.compress(text(4 * MIB), codec(name))
    assert made is not None
    assert len(made) < MIB


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1000, 1000)),
        np.asfortranarray(np.zeros((1000, 1000))),
        np.zeros((2000, 2000))[::2, ::2],
        np.zeros((10, 20, 30, 400))[:, ::-1].transpose(3, 1, 0, 2),
        np.zeros(300_000, "datetime64[us]"),
        np.array(["x" * 100] * 10_000),
    ],
    ids=["C", "Fortran", "strided", "transposed", "datetime", "text"],
)
def test_samples_are_of_bytes_whatever_the_shape(array: np.ndarray) -> None:
    frames = [frame for frame in serialize(array).frames if len(memoryview(frame).cast("B")) >= 64 * KIB]
    assert frames
    for frame in frames:
        assert compression.sampled_ratio(frame, codec("lz4")) < 0.1
        assert compression.decide(frame, codec("lz4"), None).verdict is Verdict.COMPRESS


def test_a_multidimensional_view_is_sampled_in_place() -> None:
    frame = memoryview(np.zeros((100, 50, 40)))
    assert compression.decide(frame, codec("lz4"), None).verdict is Verdict.COMPRESS
    assert compression.sampled_ratio(memoryview(np.zeros((0, 3))), codec("lz4")) == 1.0


def test_samples_are_spread_over_the_frame() -> None:
    """A head that shrinks does not stand for a body that does not, nor the other way round."""
    head = text(1 * MIB) + os.urandom(9 * MIB)
    assert compression.sampled_ratio(head, codec("lz4")) > 0.7
    assert compression.sampled_ratio(os.urandom(1 * MIB) + text(9 * MIB), codec("lz4")) < 0.4


def noise_with_zeros(size: int, places: Sequence[float], patch: int) -> bytes:
    """Noise with patches of zeros around these places (shares of its length)."""
    made = bytearray(os.urandom(size))
    for place in places:
        start = max(0, min(size - patch, int(size * place) - patch // 2))
        made[start : start + patch] = bytes(patch)
    return bytes(made)


@every_codec
@pytest.mark.parametrize("size", [128 * KIB, 200 * KIB, 256 * KIB, 360 * 360 * 8, 8 * MIB])
@pytest.mark.parametrize("places", [(0, 1), (0.1, 0.9), (0, 0.5, 1)], ids=["halo", "two samples of five", "cross"])
def test_noise_is_not_compressed_for_zeros_at_some_places(name: str, size: int, places: Sequence[float]) -> None:
    raw = noise_with_zeros(size, places, min(20_000, size // 50))
    assert compression.decide(raw, codec(name), None).verdict is Verdict.SAMPLE


@every_codec
@pytest.mark.parametrize("size", [300 * KIB, MIB, 3 * MIB])
def test_a_frame_that_shrinks_by_a_few_percent_goes_as_it_is(name: str, size: int) -> None:
    assert compression.compress(noise_with_zeros(size, [0.1], size // 20), codec(name)) is None
    assert compression.compress(noise_with_zeros(size, [0.1], size // 5), codec(name)) is not None


def test_the_decision() -> None:
    lz4 = codec("lz4")
    good, bad = text(MIB), os.urandom(MIB)
    assert compression.decide(good[: 64 * KIB - 1], lz4, 1e6).verdict is Verdict.TOO_SMALL
    assert compression.decide(good, lz4, 1e6).verdict is Verdict.COMPRESS
    assert compression.decide(good, lz4, 1e12).verdict is Verdict.RATE
    assert compression.decide(good, lz4, 0.0).verdict is Verdict.RATE
    assert compression.decide(good, lz4, None).verdict is Verdict.COMPRESS
    for rate in (1e6, None):
        assert compression.decide(bad, lz4, rate) == (Verdict.SAMPLE, pytest.approx(1.0, abs=0.01))


def test_which_codec() -> None:
    assert compression.codec_for("off", CODECS) is None
    assert compression.codec_for("auto", []) is None
    assert compression.codec_for("zstd", ["lz4"]) is None
    found = compression.codec_for("auto", CODECS)
    assert found is not None
    assert found.name == "lz4"
    assert compression.own_codecs() == CODECS


def test_a_codec_that_is_asked_for_and_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "available", lambda: {"lz4": codec})
    with pytest.raises(ConfigError, match=r"pip install 'zmqtasks\[zstd\]'"):
        compression.codec_for("zstd", CODECS)


def test_a_link_is_measured_by_what_leaves_its_queue() -> None:
    rate = LinkRate()
    assert rate.bytes_per_s == 0
    size = 8 * HIDDEN_BYTES
    rate.sending(size, 0, 10.0)
    rate.looked(size - HIDDEN_BYTES, 10.1)  # gone into the kernel, which says nothing
    assert rate.bytes_per_s == 0
    rate.looked(0, 17.0)
    assert rate.bytes_per_s == pytest.approx(HIDDEN_BYTES)


def test_answers_show_that_a_link_is_at_least_so_fast() -> None:
    rate = LinkRate()
    rate.at_least(100, 1e-9)  # too little to tell
    assert rate.bytes_per_s == 0
    rate.at_least(MIB, 0.1)
    rate.at_least(100, 1)  # nor does it say that the link is slow
    assert rate.bytes_per_s == pytest.approx(MIB * 10)
    rate.told = 1e9
    assert rate.bytes_per_s == 1e9


def test_declines_spare_the_data_behind_them_for_a_while() -> None:
    backoff = SampleBackoff()
    assert not backoff.are_spared(64 * KIB)
    backoff.declined()
    assert [backoff.are_spared(256 * KIB) for _ in range(5)] == [True] * 4 + [False]
    backoff.declined()
    assert not backoff.are_spared(2 * MIB + 1)  # large enough to be worth a look
    for _ in range(10):
        backoff.declined()
    spared = 0
    while backoff.are_spared(MIB):
        spared += 1
    assert spared == 16
    backoff.accepted()
    assert not backoff.are_spared(1)


@every_codec
def test_packing_and_unpacking_take_the_result_and_a_few_blocks(name: str) -> None:
    half = b"".join(os.urandom(256) + bytes(256) for _ in range(32 * 2 * KIB))  # 32 MiB
    tracemalloc.start()
    try:
        made = compression.compress(half, codec(name))
        assert made is not None
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < len(made) * 9 / 8 + 4 * BLOCK_BYTES  # a growing bytearray takes an eighth more
        target = memoryview(bytearray(len(half)))
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        back = compression.decompress_untrusted(memoryview(made), name, len(half), lambda _: target)
        assert tracemalloc.get_traced_memory()[1] - before < 4 * BLOCK_BYTES
        assert back == half
    finally:
        tracemalloc.stop()


def refused(frame: bytes, name: str, size: int, match: str) -> None:
    def allocate(_: int) -> memoryview:
        raise AssertionError("memory was taken")

    with pytest.raises(RemoteProtocolError, match=match):
        compression.decompress_untrusted(memoryview(frame), name, size, allocate)


def test_no_memory_is_taken_for_a_size_without_its_blocks() -> None:
    honest = bytes(packed(text(3 * MIB), "lz4"))
    for size in (1 << 46, 4 * MIB, 3 * MIB + 1, 2 * MIB):
        refused(honest, "lz4", size, "blocks")
    for frame in (b"", b"\xff", b"\xff\xff\xff\xff", honest[:-1], honest + b"\0", honest + b"\0\0\0\0"):
        refused(frame, "lz4", 3 * MIB, "blocks")
    for size in (0, -1):
        refused(honest, "lz4", size, f"a compressed frame of {size} bytes")
    refused(honest, "brotli", 3 * MIB, "known here: lz4, zstd")


@every_codec
def test_no_memory_is_taken_for_a_block_smaller_than_its_codec_makes_any(name: str) -> None:
    empty = struct.pack("<I", 0)
    zeros = bytes(packed(bytes(MIB), name))
    refused(empty, name, 1, "block of 0 bytes for 1")
    refused(empty * 4096, name, 4096 * MIB, "block of 0 bytes for 1048576")
    refused(zeros + empty, name, MIB + 1, "block of 0 bytes for 1")
    least = -(-MIB // codec(name).most_ratio)
    refused(struct.pack("<I", least - 1) + bytes(least - 1), name, MIB, f"block of {least - 1} bytes")
    assert least < len(zeros) < 2 * least  # zeros are what shrinks best: no honest block is refused


@every_codec
@pytest.mark.parametrize("declared", [100_000, 99_999, 100_001, 1000, MIB])
def test_a_block_gives_its_share_or_is_refused(name: str, declared: int) -> None:
    frame = packed(bytes(100_000), name)
    if declared == 100_000:
        assert compression.decompress_untrusted(frame, name, declared, memory).nbytes == declared
        return
    with pytest.raises(RemoteProtocolError, match="block"):
        compression.decompress_untrusted(frame, name, declared, memory)


@every_codec
def test_a_bomb_in_a_block_is_not_unpacked(name: str) -> None:
    """64 MiB of zeros in a block that stands for 1 MiB; zstd's own head would have its way if nobody looked."""
    block = codec(name).compress(memoryview(bytes(64 * MIB)))
    frame = memoryview(struct.pack("<I", len(block)) + block)
    with pytest.raises(RemoteProtocolError, match="block"):
        compression.decompress_untrusted(frame, name, MIB, memory)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.integers(1, 2 * BLOCK_BYTES),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    st.integers(-8, 8),
)
def test_damaged_frames_give_their_size_or_one_error(
    name: str, size: int, changes: list[tuple[int, int]], shift: int
) -> None:
    frame = bytearray(packed(text(1000) + bytes(max(0, size - 1000)), name))
    for position, value in changes:
        frame[position % len(frame)] = value
    try:
        back = compression.decompress_untrusted(memoryview(frame), name, size + shift, memory)
    except RemoteProtocolError:
        return
    assert back.nbytes == size + shift


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CODECS), st.binary(max_size=200), st.integers(-2, 1 << 47))
def test_any_bytes_give_their_size_or_one_error(name: str, frame: bytes, size: int) -> None:
    try:
        back = compression.decompress_untrusted(memoryview(frame), name, size, memory)
    except RemoteProtocolError:
        return
    assert back.nbytes == size
