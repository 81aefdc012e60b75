"""Sampled compression of frames: codecs, samples, the decision, and blocks back into memory. Pure: no link, no thread.

Theory of operation
-------------------
A frame is compressed in blocks of `BLOCK_BYTES`; what travels is one frame: for each block its compressed length (4 bytes,
little endian) and that many bytes. The raw size travels beside it, so the number of blocks and the raw size of each are
known before any of them is opened: `decompress_untrusted` believes a raw size only when just as many blocks are there,
none smaller than its codec can make it, takes exactly that much memory, and refuses a block that gives a byte more or less
than its share.

A frame is worth it (`Decision`) when it is large enough, a few samples of it shrink, and the link is so slow that
compressing, sending the rest and decompressing, one after the other, takes less time than sending it as it is. The rates of
codecs are measured as they work; that of a link by `LinkRate`.
"""

from __future__ import annotations

import functools
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from zmqtasks.config import COMPRESSION_MODES
from zmqtasks.errors import ConfigError, LimitExceededError, RemoteProtocolError
from zmqtasks.protocol.frames import KIB, MIB, Buffer, as_bytes_view

BLOCK_BYTES = MIB
"""Bounds the memory that compressing takes beside its result, and keeps a block in the processor's cache."""
SMALLEST_BYTES = 64 * KIB
"""Smaller frames are left alone: they cost a link less than looking at them costs (`bench/compression.py`)."""
SAMPLE_BYTES = 10_000
SAMPLES = 5
WORTHWHILE = 0.9
"""Samples must shrink to this or less; what shrinks by a few percent is paid for at both ends and hardly seen between."""
TELLING_BYTES = MIB
"""An answer to less says how fast nodes are, not how fast the link is."""
REMEASURE_EVERY = 32
"""So often a frame that would be compressed goes as it is: a link that became faster shows only by what it carries."""
HIDDEN_BYTES = 8 * MIB
"""What the kernels at both ends may hold (tcp_wmem and tcp_rmem reach 4 and 6 MiB by default): gone at once, not sent."""

_length = struct.Struct("<I")


class Codec(ABC):
    """One way to compress a block, with the rates that it has shown in this process (bytes of raw data a second)."""

    name: str
    most_ratio: int
    """A block never shrinks by more, whatever is in it: what claims to is refused before memory is taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.compress_rate = 0.0
        self.decompress_rate = 0.0

    @abstractmethod
    def compress(self, block: memoryview) -> bytes:
        """The block, compressed; without the interpreter's lock, for any thread."""

    @abstractmethod
    def decompress(self, block: memoryview, raw_size: int) -> bytes:
        """Exactly `raw_size` bytes, or an exception of whatever kind; takes no more memory than that."""

    def compressed(self, raw_bytes: int, seconds: float) -> None:
        """Tells how long compressing took."""
        with self._lock:
            self.compress_rate = _smoothed(self.compress_rate, raw_bytes / max(seconds, 1e-9))

    def decompressed(self, raw_bytes: int, seconds: float) -> None:
        """Tells how long decompressing took."""
        with self._lock:
            self.decompress_rate = _smoothed(self.decompress_rate, raw_bytes / max(seconds, 1e-9))


class Lz4(Codec):
    """Blocks of lz4: fast, a moderate ratio."""

    name = "lz4"
    most_ratio = 255  # a byte adds at most 255 to the length of a match (lz4_Block_format.md)

    def __init__(self) -> None:
        import lz4.block

        super().__init__()
        self._module = lz4.block

    def compress(self, block: memoryview) -> bytes:
        made: bytes = self._module.compress(block, store_size=False)
        return made

    def decompress(self, block: memoryview, raw_size: int) -> bytes:
        raw: bytes = self._module.decompress(block, uncompressed_size=raw_size)
        return raw


class Zstd(Codec):
    """Frames of zstd at level 1: a better ratio for more work."""

    name = "zstd"
    most_ratio = (128 * KIB) // 4  # the largest block and the smallest that stands for one: RFC 8878, 3.1.1.2

    def __init__(self) -> None:
        import zstandard

        super().__init__()
        self._module = zstandard

    def compress(self, block: memoryview) -> bytes:
        return self._module.ZstdCompressor(level=1).compress(block)

    def decompress(self, block: memoryview, raw_size: int) -> bytes:
        # The size in the block's own head wins over `max_output_size` in zstandard, and is the peer's word: look first.
        if self._module.frame_content_size(block) != raw_size:
            raise ValueError("the block names another size")
        return self._module.ZstdDecompressor().decompress(block, max_output_size=raw_size, allow_extra_data=False)


_CODECS: dict[str, type[Codec]] = {"lz4": Lz4, "zstd": Zstd}


@functools.cache
def available() -> dict[str, Codec]:
    """The codecs whose packages are installed here, by name; the default first."""
    found: dict[str, Codec] = {}
    for name, kind in _CODECS.items():
        try:
            found[name] = kind()
        except ImportError:
            continue
    for codec in found.values():
        _calibrate(codec)
    return found


def own_codecs() -> list[str]:
    """What a node tells its peers that it can decompress; costs no import of them."""
    from importlib.util import find_spec

    return [name for name, package in (("lz4", "lz4"), ("zstd", "zstandard")) if find_spec(package) is not None]


def check_mode(mode: str) -> None:
    """Raises ConfigError when the mode (`Config.compression`) is none, or asks for a codec that this node lacks.

    For where nodes begin: found on the first data link, it would look like a fault of the link.
    """
    if mode not in COMPRESSION_MODES:
        raise ConfigError(f"compression={mode!r} is none of {', '.join(COMPRESSION_MODES)}")
    if mode not in ("auto", "off") and mode not in available():
        package = "zmqtasks[zstd]" if mode == "zstd" else mode
        raise ConfigError(
            f"compression={mode!r} (--compression, ZMQTASKS_COMPRESSION) needs a package that is not installed here: "
            f"pip install '{package}'"
        )


def codec_for(mode: str, theirs: Sequence[str]) -> Codec | None:
    """The codec for what is sent to a peer that has `theirs`; None: nothing is compressed.

    Raises ConfigError as `check_mode` does.
    """
    check_mode(mode)
    if mode == "off":
        return None
    name = "lz4" if mode == "auto" else mode
    return available().get(name) if name in theirs else None


class Verdict(Enum):
    """What becomes of a frame, and why."""

    COMPRESS = "compress"
    TOO_SMALL = "too small"
    RATE = "the link is faster"
    SAMPLE = "the samples do not shrink"


class Counters(msgspec.Struct):
    """Frames and bytes of one link, or of all of a node."""

    compressed: int = 0
    declined_by_sample: int = 0
    """The samples did not shrink, or the rest of the frame did not as they had, or frames before it had not."""
    declined_by_rate: int = 0
    too_small: int = 0
    bytes_in: int = 0
    """Raw bytes of the frames that were compressed."""
    bytes_out: int = 0
    """What they became."""
    decompressed: int = 0
    """Frames that came compressed."""

    def add(self, other: Counters) -> None:
        """Adds the other's numbers to these."""
        for name in self.__struct_fields__:
            if value := getattr(other, name):
                setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, int]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class LinkRate:
    """Bytes/s that a link takes, from what has left its queue and from answers; times are given by the caller.

    *From the queue:* a busy period begins when something is sent on an empty queue. What has gone since, less
    `HIDDEN_BYTES`, over the time since, is a measurement once it is four times `HIDDEN_BYTES`: at most a quarter too low.
    *From answers:* so many bytes were acknowledged within a time, so the link is at least that fast. The best of the last
    few stands against a lower measurement. The peer says the same of what it received (`told`).
    """

    def __init__(self) -> None:
        self._measured = 0.0
        self._proven: deque[float] = deque(maxlen=16)
        self.told = 0.0
        self._since = 0.0
        self._period_bytes = 0

    @property
    def bytes_per_s(self) -> float:
        """The best estimate; 0.0: nothing has told yet."""
        return max(self._measured, self.proven, self.told)

    @property
    def proven(self) -> float:
        """What it is at least, by answers; 0.0 when there were none."""
        return max(self._proven, default=0.0)

    def sending(self, size_bytes: int, queued_bytes: int, now: float) -> None:
        """A message is about to be queued behind `queued_bytes`."""
        if queued_bytes == 0 or not self._period_bytes:
            self._since, self._period_bytes = now, queued_bytes
        self._period_bytes += size_bytes

    def looked(self, queued_bytes: int, now: float) -> None:
        """So much is still queued."""
        gone = self._period_bytes - queued_bytes
        if gone >= 4 * HIDDEN_BYTES and now > self._since:
            self._measured = _smoothed(self._measured, (gone - HIDDEN_BYTES) / (now - self._since))
            self._proven.clear()  # older than this
            # What comes next is a period of its own, with full buffers ahead of it: it measures low, never high.
            self._since, self._period_bytes = now, queued_bytes

    def at_least(self, size_bytes: int, seconds: float) -> None:
        """So many bytes have arrived within a time that includes whatever else was done."""
        if seconds > 0 and (size_bytes >= TELLING_BYTES or size_bytes / seconds > self.bytes_per_s > 0):
            self._proven.append(size_bytes / seconds)


class SampleBackoff:
    """How much of a link's data goes unlooked at after samples that did not shrink: such data rarely comes alone.

    A decline spares what follows for `FIRST_BYTES`, each further one for twice as much, up to `MOST_BYTES`. A frame that is
    larger than what is left is looked at: beside sending it, its samples cost nothing.
    """

    FIRST_BYTES = MIB
    MOST_BYTES = 16 * MIB
    """Samples cost 20 us (lz4) to 80 (zstd), and so many bytes 5 ms at least: below 1 %, mostly."""

    def __init__(self) -> None:
        self._next = self.FIRST_BYTES
        self._left = 0

    def are_spared(self, size_bytes: int) -> bool:
        """Whether a frame is taken for one that does not shrink, without a look."""
        if size_bytes > self._left:
            return False
        self._left -= size_bytes
        return True

    def declined(self) -> None:
        """Samples, or the frame behind them, did not shrink."""
        self._left = self._next
        self._next = min(2 * self._next, self.MOST_BYTES)

    def accepted(self) -> None:
        """The whole of a frame did: of samples alone it would forget, time and again, what frames like this one do."""
        self._left, self._next = 0, self.FIRST_BYTES


class Decision(NamedTuple):
    """Whether a frame is compressed, and what its samples became (1.0: none were taken)."""

    verdict: Verdict
    ratio: float = 1.0


def decide(frame: Buffer, codec: Codec, link_rate: float | None) -> Decision:
    """Looks at a frame's size, then at rates, then at samples.

    `link_rate` 0.0: not known yet, so nothing is compressed; None: whatever the link, only samples count.
    """
    if memoryview(frame).nbytes < SMALLEST_BYTES:  # a view without elements can't be cast
        return Decision(Verdict.TOO_SMALL)
    view = as_bytes_view(frame)
    if link_rate is not None and not _pays(codec, link_rate, 0.0):
        return Decision(Verdict.RATE)
    ratio = sampled_ratio(view, codec)
    if ratio > WORTHWHILE:
        return Decision(Verdict.SAMPLE, ratio)
    if link_rate is not None and not _pays(codec, link_rate, ratio):
        return Decision(Verdict.RATE, ratio)
    return Decision(Verdict.COMPRESS, ratio)


def sampled_ratio(frame: Buffer, codec: Codec) -> float:
    """What samples of a frame's bytes shrink to, as a share: on average, or the middle one if that is more; nothing is copied.

    One sample for each `SMALLEST_BYTES`, at most `SAMPLES`, from the middle of equal parts. The ends of arrays are no good
    sample: a halo around noise is there. Nor is the average alone: a few samples of zeros would outweigh the others.
    """
    if not memoryview(frame).nbytes:
        return 1.0
    view = as_bytes_view(frame)
    size = min(SAMPLE_BYTES, view.nbytes)
    count = max(1, min(SAMPLES, view.nbytes // SMALLEST_BYTES))
    starts = [(view.nbytes - size) * (2 * number + 1) // (2 * count) for number in range(count)]
    ratios = sorted(len(codec.compress(view[start : start + size])) / size for start in starts)
    return max(sum(ratios) / count, ratios[count // 2])


def compress(frame: Buffer, codec: Codec) -> bytearray | None:
    """A frame in compressed blocks; None as soon as they are not worth it. For any thread."""
    view = as_bytes_view(frame)
    made = bytearray()
    began = time.perf_counter()
    for start in range(0, view.nbytes, BLOCK_BYTES):
        raw = view[start : start + BLOCK_BYTES]
        block = codec.compress(raw)
        made += _length.pack(len(block))
        made += block
        if len(made) > WORTHWHILE * (start + raw.nbytes):
            return None  # the samples were better than what follows
    codec.compressed(view.nbytes, time.perf_counter() - began)
    return made


def check_untrusted(frame: memoryview, codec_name: str, raw_size: int) -> None:
    """Raises RemoteProtocolError unless a frame from a peer can be what it is said to be; takes no memory.

    The codec is known here, there are exactly the blocks that `raw_size` bytes have, and each can be its share of them.
    """
    codec = available().get(codec_name)
    if codec is None:
        raise RemoteProtocolError(f"the peer compressed by {codec_name[:20]!r}, known here: {', '.join(available())}")
    if raw_size <= 0:
        raise RemoteProtocolError(f"the peer sent a compressed frame of {raw_size} bytes")
    due, found, position = -(-raw_size // BLOCK_BYTES), 0, 0
    while position + _length.size <= frame.nbytes and found <= due:
        size = _length.unpack_from(frame, position)[0]
        share = min(BLOCK_BYTES, raw_size - found * BLOCK_BYTES)
        if share > size * codec.most_ratio:
            raise RemoteProtocolError(
                f"the peer sent a block of {size} bytes for {share}: {codec_name} shrinks nothing by more than "
                f"{codec.most_ratio} : 1"
            )
        position += _length.size + size
        found += 1
    if position != frame.nbytes or found != due:
        raise RemoteProtocolError(
            f"the peer sent {frame.nbytes} bytes in {found} blocks for a frame of {raw_size} bytes, due are {due} blocks"
        )


def decompress_untrusted(
    frame: memoryview, codec_name: str, raw_size: int, allocate: Callable[[int], memoryview]
) -> memoryview:
    """The raw frame, in memory of exactly `raw_size` from `allocate`; for any thread.

    Raises RemoteProtocolError for anything that does not give exactly that, LimitExceededError when there is no memory.
    """
    check_untrusted(frame, codec_name, raw_size)
    codec = available()[codec_name]
    try:
        made = allocate(raw_size)
    except MemoryError:
        raise LimitExceededError(f"no memory for a frame of {raw_size} bytes from the peer") from None
    began = time.perf_counter()
    position = 0
    for start in range(0, raw_size, BLOCK_BYTES):
        share = min(BLOCK_BYTES, raw_size - start)
        end = position + _length.size + _length.unpack_from(frame, position)[0]
        try:
            raw = codec.decompress(frame[position + _length.size : end], share)
        except Exception as exc:
            raise RemoteProtocolError(f"the peer sent a block that {codec_name} cannot read: {exc}") from None
        if len(raw) != share:
            raise RemoteProtocolError(f"the peer sent a block of {len(raw)} bytes where {share} were due")
        made[start : start + share] = raw
        position = end
    codec.decompressed(raw_size, time.perf_counter() - began)
    return made


def _pays(codec: Codec, link_rate: float, ratio: float) -> bool:
    """Compressing, sending and decompressing one after the other beats sending by at least a twentieth."""
    if not link_rate:
        return False
    plain = 1 / link_rate
    return ratio * plain + 1 / codec.compress_rate + 1 / codec.decompress_rate < 0.95 * plain


def _calibrate(codec: Codec) -> None:
    """First rates, from numbers of 8 bytes with 3 of noise (some ms); work corrects them.

    Small matches everywhere are what codecs are slowest with: long runs would promise five times as much.
    """
    import random

    noise, block_of_numbers = random.Random(1), bytearray(BLOCK_BYTES)
    for place in range(3):
        block_of_numbers[place::8] = noise.randbytes(BLOCK_BYTES // 8)
    raw = memoryview(block_of_numbers)
    best = [float("inf"), float("inf")]
    for _ in range(3):  # the first meets cold memory
        began = time.perf_counter()
        block = codec.compress(raw)
        middle = time.perf_counter()
        codec.decompress(memoryview(block), raw.nbytes)
        best = [min(best[0], middle - began), min(best[1], time.perf_counter() - middle)]
    codec.compressed(raw.nbytes, best[0])
    codec.decompressed(raw.nbytes, best[1])


def _smoothed(before: float, now: float) -> float:
    return now if not before else 0.7 * before + 0.3 * now
