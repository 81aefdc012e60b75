"""Compression on a data link: what is packed before it is sent, and unpacked before it is handled.

Large frames are compressed and decompressed in threads of their own (both codecs let go of the interpreter's lock); the
event loop goes on. Messages are handled in the order in which they came all the same: those behind one that is being
unpacked wait, and past `AHEAD_BYTES` of them no more is read from the link.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from zmqtasks.errors import LimitExceededError, ProtocolError, RemoteProtocolError
from zmqtasks.protocol import compression
from zmqtasks.protocol.compression import Codec, Counters, LinkRate, SampleBackoff, Verdict
from zmqtasks.protocol.frames import KIB, MIB, Buffer, Frames, total_size
from zmqtasks.protocol.ops import DataSent, PutData
from zmqtasks.transports import registry
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Comm
from zmqtasks.transports.host_memory import available_memory_bytes
from zmqtasks.transports.memory import allocate_aligned

_log = logging.getLogger(__name__)

INLINE_BYTES = 256 * KIB
"""Up to this much is (de)compressed at once: that takes less time than going to a thread and back."""
AHEAD_BYTES = 64 * MIB
"""Compressed or not, more than this behind a message that is being unpacked is left in the link."""
UNPACKED_SHARE = 0.75
"""Of the memory of this host: what one message may unpack to. A few KiB can stand for a GiB; all that goes uncompressed a peer
has at least to send."""
CODEC_THREADS = 8
"""Each packs 0.3 GB/s and more and unpacks 1.6 (`bench/compression.py`): what all links of a node bring is less."""

Values = TypeVar("Values", DataSent, PutData)
Batch = Sequence[Any]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads for codecs alone, started as they are needed.

    Not the loop's own executor: the program that runs the loop may fill it, with calls that wait for what is unpacked here.
    """
    return ThreadPoolExecutor(CODEC_THREADS, "zmqtasks-codec")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not come along


@functools.cache
def _most_unpacked_bytes() -> int:
    return int(UNPACKED_SHARE * available_memory_bytes())


class Packer:
    """Compresses what is sent over one link, when it pays."""

    def __init__(self, comm: Comm, mode: str, theirs: Sequence[str], totals: Counters) -> None:
        """`theirs`: codecs that the peer can read; `totals` counts along. Raises ConfigError as `codec_for` does."""
        scheme, _ = split_scheme(comm.peer_address)
        leaves = registry.get_transport(scheme).capabilities.crosses_hosts
        self._comm = comm
        self._forced = mode not in ("auto", "off")
        useful = leaves and (self._forced or not comm.same_host)
        self.codec: Codec | None = compression.codec_for(mode, theirs) if useful else None
        self.rate = LinkRate()
        self.counters = Counters()
        self._totals = totals
        self._compressible = 0
        self._samples = SampleBackoff()
        self._decided: tuple[Sequence[Buffer], list[int]] | None = None

    def goes_at_once(self, frames: Sequence[Buffer]) -> bool:
        """Whether a message needs neither `pack` nor `drain`: nothing of it shrinks, and it tells nothing about the link.

        What was decided here is remembered for `pack`, should that be called with the same frames next.
        """
        codec = self.codec
        if codec is None:
            return True
        size = frames[0].nbytes if len(frames) == 1 and isinstance(frames[0], memoryview) else total_size(frames)
        if size < compression.SMALLEST_BYTES:
            return True
        if size >= compression.HIDDEN_BYTES and not self._forced:
            return False
        if len(frames) == 1 and self._samples.are_spared(size):  # the common case of `_choose`, in a microsecond
            self.counters.declined_by_sample += 1
            self._totals.declined_by_sample += 1
            return True
        chosen = self._choose(codec, frames)
        self._decided = (frames, chosen) if chosen else None
        return not chosen

    async def pack(self, op: Values, frames: Sequence[Buffer]) -> tuple[Values, Sequence[Buffer]]:
        """The op and its payload frames, as they are to be sent; the frames given are left alone."""
        codec = self.codec
        if codec is None:
            return op, frames
        decided, self._decided = self._decided, None
        chosen = decided[1] if decided is not None and decided[0] is frames else self._choose(codec, frames)
        del decided
        if not chosen:
            return op, frames
        packed = list(frames)
        codecs, raw_sizes = [""] * len(packed), [0] * len(packed)
        counted = Counters()
        for index in chosen:
            raw = frames[index]
            size = total_size((raw,))
            if size <= INLINE_BYTES:
                made = compression.compress(raw, codec)
            else:
                made = await asyncio.get_running_loop().run_in_executor(_threads(), compression.compress, raw, codec)
            if made is None:
                counted.declined_by_sample += 1
                self._samples.declined()
                continue
            self._samples.accepted()
            packed[index], codecs[index], raw_sizes[index] = made, codec.name, size
            counted.compressed += 1
            counted.bytes_in += size
            counted.bytes_out += len(made)
        self._count(counted)
        if not counted.compressed:
            return op, frames
        return msgspec.structs.replace(op, codecs=codecs, raw_sizes=raw_sizes), packed

    def send(self, message: Frames, *, lasting: bool = False) -> None:
        """Sends on the link, and notes it for the link's rate, unless that decides nothing.

        `lasting`: see `Comm.send_lasting`.
        """
        if self.codec is not None and not self._forced:
            self.rate.sending(total_size(message), self._comm.queued_bytes, time.monotonic())
        if lasting:
            self._comm.send_lasting(message)
        else:
            self._comm.send(message)

    async def drain(self) -> None:
        """Drains the link, and measures how fast it did."""
        await self._comm.drain()
        if self.codec is not None and not self._forced:
            self.rate.looked(self._comm.queued_bytes, time.monotonic())

    def decompressed(self, frames: int) -> None:
        """Counts frames that came compressed."""
        self._count(Counters(decompressed=frames))

    def _choose(self, codec: Codec, frames: Sequence[Buffer]) -> list[int]:
        link_rate = None if self._forced else self.rate.bytes_per_s
        counted, chosen = Counters(), []
        for index, frame in enumerate(frames):
            size = total_size((frame,))
            if size >= compression.SMALLEST_BYTES and self._samples.are_spared(size):
                counted.declined_by_sample += 1
                continue
            match compression.decide(frame, codec, link_rate).verdict:
                case Verdict.COMPRESS:
                    self._compressible += 1
                    if self._forced or self._compressible % compression.REMEASURE_EVERY:
                        chosen.append(index)
                    else:
                        counted.declined_by_rate += 1
                case Verdict.TOO_SMALL:
                    counted.too_small += 1
                case Verdict.RATE:
                    counted.declined_by_rate += 1
                case Verdict.SAMPLE:
                    self._samples.declined()
                    counted.declined_by_sample += 1
        self._count(counted)
        return chosen

    def _count(self, counted: Counters) -> None:
        self.counters.add(counted)
        self._totals.add(counted)


class Inbox:
    """Hands on a link's messages in order, each with its frames as they were before compression."""

    def __init__(
        self,
        comm: Comm,
        handle: Callable[[Batch, list[memoryview]], None],
        fail: Callable[[ProtocolError], None],
        count: Callable[[int], None],
    ) -> None:
        """`handle` gets each message, `fail` the error that ends the link; `count` the number of frames unpacked."""
        self._comm = comm
        self._handle = handle
        self._fail = fail
        self._count = count
        self._waiting: deque[tuple[Batch, list[memoryview]]] = deque()
        self._waiting_bytes = 0
        self._too_much_waits = False
        self._pauses = 0
        self._task: asyncio.Task[None] | None = None
        self._ended: Callable[[], None] | None = None

    def received_untrusted(self, ops: Batch, frames: list[memoryview]) -> None:
        """Handles a message now or, when it or one before it has to be unpacked, later.

        Raises ProtocolError, when it is handled now.
        """
        if self._task is None:
            op = _packed_untrusted(ops, frames)
            if op is None:
                self._handle(ops, frames)
                return
            if sum(op.raw_sizes) <= INLINE_BYTES:
                self._handle(ops, _unpack_untrusted(op, frames))
                self._count(sum(map(bool, op.codecs)))
                return
        self._waiting.append((ops, frames))
        self._waiting_bytes += total_size(frames)
        if self._waiting_bytes > AHEAD_BYTES and not self._too_much_waits:
            self._too_much_waits = True
            self.pause()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    def pause(self) -> None:
        """Nothing more is received until as many calls of `resume` as of this: who has a reason of its own undoes no other's."""
        self._pauses += 1
        if self._pauses == 1:
            self._comm.pause_receiving()

    def resume(self) -> None:
        """Undoes one `pause`."""
        self._pauses -= 1
        if not self._pauses:
            self._comm.resume_receiving()

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls when what has come is handled: at once, mostly."""
        if self._task is None:
            call()
        else:
            self._ended = call

    def stop(self) -> None:
        """Drops what waits."""
        self._waiting.clear()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            self._task = None

    async def _work(self) -> None:
        try:
            while self._waiting:
                ops, frames = self._waiting.popleft()
                size = total_size(frames)
                op = _packed_untrusted(ops, frames)
                if op is not None:
                    frames = await asyncio.get_running_loop().run_in_executor(_threads(), _unpack_untrusted, op, frames)
                    self._count(sum(map(bool, op.codecs)))
                self._waiting_bytes -= size
                self._handle(ops, frames)
                del ops, frames, op
                if self._too_much_waits and self._waiting_bytes <= AHEAD_BYTES // 2:
                    self._too_much_waits = False
                    self.resume()
        except ProtocolError as exc:
            self._waiting.clear()
            self._fail(exc)
        except Exception as exc:
            _log.exception("handling data from %s failed", self._comm.peer_address)
            self._comm.abort(f"{type(exc).__name__}: {exc}")
        finally:
            self._task = None
        if self._ended is not None:
            self._ended()


def _packed_untrusted(ops: Batch, frames: list[memoryview]) -> DataSent | PutData | None:
    """The op whose frames came compressed, checked as far as that takes no memory; None: there is none."""
    found: DataSent | PutData | None = None
    for op in ops:
        if isinstance(op, DataSent | PutData) and (op.codecs or op.raw_sizes):
            if found is not None:
                raise RemoteProtocolError("the peer sent two columns of codecs with one list of frames")
            found = op
    if found is None:
        return None
    if not len(found.codecs) == len(found.raw_sizes) == len(frames) - 1:
        raise RemoteProtocolError(
            f"the peer sent {len(frames) - 1} frames with {len(found.codecs)} codecs and {len(found.raw_sizes)} sizes"
        )
    total = 0
    for frame, codec, raw_size in zip(frames[1:], found.codecs, found.raw_sizes, strict=True):
        if codec:
            total += raw_size
            if total > _most_unpacked_bytes():
                raise LimitExceededError(
                    f"the peer sent a message of {total} bytes and more, compressed: {_most_unpacked_bytes()} are taken, "
                    f"{UNPACKED_SHARE:.0%} of the memory here; it is to be smaller, or not compressed (--compression off)"
                )
            compression.check_untrusted(frame, codec, raw_size)
        elif raw_size:
            raise RemoteProtocolError(f"the peer sent a size of {raw_size} bytes for a frame that is not compressed")
    return found


def _unpack_untrusted(op: DataSent | PutData, frames: list[memoryview]) -> list[memoryview]:
    unpacked = [frames[0]]
    for frame, codec, raw_size in zip(frames[1:], op.codecs, op.raw_sizes, strict=True):
        if codec:
            frame = compression.decompress_untrusted(frame, codec, raw_size, allocate_aligned)
        unpacked.append(frame)
    return unpacked
