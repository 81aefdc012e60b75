"""Conformance: messages arrive whole, in order, in good memory, and no faster than they are taken."""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import random
import signal
import threading
import time

import pytest

from zmqtasks.errors import CommClosedError, LimitExceededError, LocalProtocolError
from zmqtasks.protocol.frames import DATA_LIMITS, GIB, HELLO_LIMITS, KIB, MIB, Buffer
from zmqtasks.testing.comms import DEADLINE_S, Recorder, available_memory_bytes, memory_bytes, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase
from zmqtasks.testing.peer import is_aligned
from zmqtasks.transports import Comm, LinkSettings

_HUGE_BYTES = 4 * GIB + 4097
_HUGE_NEEDS_BYTES = 14 * GIB


class MessageTests(ConformanceBase):
    """What is sent is what arrives."""

    def test_order_and_boundaries(self) -> None:
        """Many small messages of many shapes, both ways at once."""
        seed = random.randrange(1 << 32)
        print("seed", seed)
        rng = random.Random(seed)
        sizes = [0, 1, 7, 8, 63, 64, 65, 100, 511, 512, 513, 1500, 5000]
        messages = [[rng.randbytes(rng.choice(sizes)) for _ in range(rng.randint(1, 5))] for _ in range(3000)]

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                for message in messages:
                    ours.send(message)
                    theirs.send(message[::-1])
                await there.wait_messages(len(messages))
                await here.wait_messages(len(messages))
                assert there.contents() == messages
                assert here.contents() == [message[::-1] for message in messages]

        self.run(test())

    def test_direct_sends(self) -> None:
        """Where other threads may send, what they and the loop send arrives whole, in the order of each, and at once."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                lock = threading.Lock()  # as whoever sends has it

                def send_by_thread() -> None:
                    number = 0
                    while number < 1000:
                        with lock:
                            if ours.ready_for_direct:
                                size = (number * 7919) % 700 if number % 50 else 3 * MIB
                                ours.send_direct([b"thread %6d" % number + bytes(size)])
                                number += 1
                        time.sleep(0)

                if not ours.ready_for_direct:
                    pytest.skip("this transport sends from its own loop only")
                thread = asyncio.create_task(asyncio.to_thread(send_by_thread))
                for number in range(2000):
                    with lock:
                        ours.send([b"loop   %6d" % number])
                    theirs.send([b"back   %6d" % number])
                    if number % 3 == 0:
                        await asyncio.sleep(0)
                await thread
                await there.wait_messages(3000)
                await here.wait_messages(2000)
                starts = [bytes(frames[0][:13]) for frames in there.contents()]
                assert [s for s in starts if s.startswith(b"thread")] == [b"thread %6d" % n for n in range(1000)]
                assert [s for s in starts if s.startswith(b"loop")] == [b"loop   %6d" % n for n in range(2000)]
                assert [frames[0] for frames in here.contents()] == [b"back   %6d" % n for n in range(2000)]

        self.run(test())

    def test_sizes_around_every_threshold(self) -> None:
        """Frames of all sizes up to 64 MiB, mixed with small ones."""
        edges = [512, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, MIB, 4 * MIB]
        sizes = [edge + delta for edge in edges for delta in (-65, -17, -16, -8, -1, 0, 1)] + [64 * MIB]
        pattern = random.Random(0).randbytes(64 * MIB)

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for number, size in enumerate(sizes):
                    tail = memoryview(pattern)[1 : 1 + size % 999]
                    ours.send([b"%d" % number, memoryview(pattern)[:size], b"", tail])
                    await ours.drain()
                await there.wait_messages(len(sizes))
                for number, (size, message) in enumerate(zip(sizes, there.messages, strict=True)):
                    first, frame, empty, last = message
                    assert bytes(first) == b"%d" % number
                    assert frame == memoryview(pattern)[:size], f"a frame of {size} bytes was damaged"
                    assert len(empty) == 0
                    assert last == memoryview(pattern)[1 : 1 + size % 999]

        self.run(test())

    def test_empty_frames(self) -> None:
        """Empty frames are frames; a message of no frames is refused."""
        messages: list[list[bytes]] = [[b""], [b"", b""], [b"", b"x", b""], [b""] * 300, [b"x"]]

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for message in messages:
                    ours.send(message)
                with pytest.raises(LocalProtocolError):
                    ours.send([])
                await there.wait_messages(len(messages))
                assert there.contents() == messages

        self.run(test())

    def test_kinds_of_buffers(self) -> None:
        """bytes, bytearray and memoryviews of any item type, small and large."""
        ints = memoryview(bytearray(range(240))).cast("I")
        large = memoryview(bytearray(random.Random(1).randbytes(3 * MIB))).cast("Q")
        frames: list[Buffer] = [b"bytes", bytearray(b"bytearray"), memoryview(b"view"), ints, large, ints[:0]]

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send(frames)
                ours.send(tuple(frames))
                ours.send([large])
                ours.send([ints])
                await there.wait_messages(4)
                wanted = [bytes(frame) for frame in frames]
                assert there.contents() == [wanted, wanted, [bytes(large)], [bytes(ints)]]

        self.run(test())

    def test_many_thousand_frames(self) -> None:
        """One message of 50,000 small frames, one of 3,000 mixed ones, and what follows is in step."""
        small = [b"%d" % number for number in range(50_000)]
        mixed = [b"m" * (40_000 if number % 100 == 0 else number % 700) for number in range(3_000)]

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for message in (small, mixed, [b"after"]):
                    ours.send(message)
                await there.wait_messages(3)
                assert there.contents() == [small, mixed, [b"after"]]

        self.run(test())

    def test_frame_of_more_than_4_gib(self) -> None:
        """Lengths are 64-bit all the way; needs memory for the frame and a copy in the library's hands."""
        if not self.sends_huge_frames:
            pytest.skip("this class declares sends_huge_frames=False")
        if available_memory_bytes() < _HUGE_NEEDS_BYTES:
            pytest.skip(f"needs {_HUGE_NEEDS_BYTES >> 30} GiB of available memory")
        # Untouched private pages read as the one page of zeros: the sender's copy takes no memory.
        pages = mmap.mmap(-1, _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        huge = memoryview(pages)
        marks = {0: 1, 2 * GIB: 2, 4 * GIB: 3, _HUGE_BYTES - 1: 4}
        for position, value in marks.items():
            huge[position] = value

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([b"before", huge, b"after"])
                await there.wait_messages(1, timeout_s=self.test_timeout_s)
                before, frame, after = there.messages.pop()
                assert (bytes(before), bytes(after), frame.nbytes) == (b"before", b"after", _HUGE_BYTES)
                assert {position: frame[position] for position in marks} == marks
                assert frame[2 * GIB + 1] == frame[4 * GIB - 1] == 0

        self.run(test())

    def test_received_frames_are_writable_and_aligned(self) -> None:
        """Frames from another process are the receiver's own memory, in both directions, at every size."""
        self.needs(crosses_processes=True)
        sizes = [0, 1, 64, 100, 512, 513, 5000, 16 * KIB, 40_000, 65 * KIB, 300_000, MIB, 5 * MIB]

        async def test() -> None:
            async with self.peer_process("inspect") as (comm, _peer):
                here = Recorder(comm)
                sent = [[b"\x05" * size for size in sizes], *([b"\x05" * size] for size in sizes)]
                for message in sent:
                    comm.send(message)
                await here.wait_messages(len(sent))
                for message, (report, *frames) in zip(sent, here.messages, strict=True):
                    for frame, entry, original in zip(frames, json.loads(bytes(report)), message, strict=True):
                        assert entry == {"size": len(original), "writable": True, "aligned": True}
                        assert not frame.readonly
                        assert is_aligned(frame), f"a frame of {len(original)} bytes is not aligned"
                        assert bytes(frame) == (b"\x06" + original[1:] if original else b"")

        self.run(test())

    def test_allocated_memory_can_be_sent(self) -> None:
        """`allocate` gives writable, aligned memory that arrives like any other."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for size in (0, 1, 1000, 2 * MIB):
                    memory = ours.allocate(size)
                    assert (memory.nbytes, memory.readonly, is_aligned(memory)) == (size, False, True)
                    memory[:] = b"a" * size
                    ours.send([memory])
                await there.wait_messages(4)
                assert there.contents() == [[b"a" * size] for size in (0, 1, 1000, 2 * MIB)]

        self.run(test())

    def test_statistics_count(self) -> None:
        """Messages are counted exactly, bytes at least by their content."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for _ in range(10):
                    ours.send([b"x" * 1000, b"y" * 100_000])
                await there.wait_messages(10)
                sent, received = ours.statistics(), theirs.statistics()
                assert (sent.messages_sent, sent.messages_received) == (10, 0)
                assert (received.messages_sent, received.messages_received) == (0, 10)
                assert min(sent.bytes_sent, received.bytes_received) >= 10 * 101_000
                await wait_until(lambda: ours.statistics().queued_bytes == 0, "the queue did not become empty")

        self.run(test())


class FlowTests(ConformanceBase):
    """Receiving can be held up, and then nothing grows without bound but what the sender itself queues."""

    def test_messages_before_start_are_held(self) -> None:
        """What comes before `start` is delivered after it."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here = Recorder(ours)
                for number in range(100):
                    ours.send([b"%d" % number, bytes(1000)])
                theirs.send([b"hello"])
                await here.wait_messages(1)
                there = Recorder(theirs)
                await there.wait_messages(100)
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(100)]

        self.run(test())

    def test_pause_and_resume(self) -> None:
        """A handler that pauses gets no further message until it resumes; none is lost."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs, lambda frames: theirs.pause_receiving())
                here = Recorder(ours)
                for number in range(20):
                    ours.send([b"%d" % number])
                for number in range(20):
                    await there.wait_messages(number + 1)
                    theirs.send([b"still alive"])  # its arrival shows that the loop has turned meanwhile
                    await here.wait_messages(number + 1)
                    assert len(there.messages) == number + 1
                    theirs.resume_receiving()
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(20)]

        self.run(test())

    def test_drain_waits_for_a_stalled_receiver(self) -> None:
        """A sender that drains stops when the receiver does, and loses nothing."""
        settings = LinkSettings(limits=DATA_LIMITS, high_water_bytes=4 * MIB, low_water_bytes=MIB)
        chunk = bytes(MIB)

        async def test() -> None:
            async with self.link(settings) as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                theirs.pause_receiving()
                sent = 0
                stalled = False
                while not stalled:
                    ours.send([b"%d" % sent, chunk])
                    sent += 1
                    assert sent * MIB < 8 * MIB + self.memory_slack_bytes, "drain did not wait for the receiver"
                    stalled = not await _drains(ours, 0.5)
                assert ours.queued_bytes > settings.low_water_bytes
                draining = asyncio.ensure_future(ours.drain())
                theirs.resume_receiving()
                await asyncio.wait_for(draining, DEADLINE_S)
                assert ours.queued_bytes <= settings.low_water_bytes + 64 * KIB
                await there.wait_messages(sent)
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(sent)]

        self.run(test())

    def test_memory_of_a_stalled_peer_is_bounded(self) -> None:
        """200 MiB for a process that does not read stay in the sender's queue; all arrives in the end."""
        self.needs(crosses_processes=True)
        chunk, count = bytes(MIB), 200

        async def test() -> None:
            async with self.peer_process("stall") as (comm, peer):
                here = Recorder(comm)
                before = memory_bytes(peer.pid)
                for _ in range(count):
                    comm.send([chunk])
                assert not await _drains(comm, 1.0), "drain did not wait for the receiver"
                taken = memory_bytes(peer.pid) - before
                limit = 2 * OPEN.high_water_bytes + self.memory_slack_bytes // 2
                assert taken < limit, f"the stalled peer took {taken >> 20} MiB"
                assert comm.queued_bytes > count * MIB - limit
                peer.send_signal(signal.SIGUSR1)
                await comm.drain()
                await here.wait_messages(count)

        self.run(test())

    def test_drain_is_woken_by_the_end(self) -> None:
        """`drain` raises what ended the comm, also when it was waiting already."""
        settings = LinkSettings(limits=DATA_LIMITS, high_water_bytes=MIB, low_water_bytes=MIB // 2)

        async def test() -> None:
            async with self.link(settings) as (ours, theirs):
                Recorder(ours)
                Recorder(theirs)
                theirs.pause_receiving()
                for _ in range(100):
                    ours.send([bytes(MIB)])
                draining = [asyncio.ensure_future(ours.drain()) for _ in range(2)]
                await asyncio.sleep(0)
                ours.abort()
                for task in draining:
                    with pytest.raises(CommClosedError):
                        await asyncio.wait_for(task, DEADLINE_S)
                with pytest.raises(CommClosedError):
                    await ours.drain()

        self.run(test())

    def test_handlers_can_be_exchanged(self) -> None:
        """`set_handler` holds from the very next message on, also within one batch."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                later = _Collector()
                first = Recorder(theirs, lambda frames: theirs.set_handler(later))
                Recorder(ours)
                for number in range(50):
                    ours.send([b"%d" % number])
                await wait_until(lambda: len(later.received) == 49, "the second handler did not get the rest")
                assert first.contents() == [[b"0"]]
                assert later.received == [b"%d" % number for number in range(1, 50)]
                ours.abort()
                await wait_until(lambda: later.ended == 1, "the second handler was not told of the end")
                assert not first.ends

        self.run(test())

    def test_limits_hold_from_the_next_message_on(self) -> None:
        """The limits of a new comm are those of its settings; `set_limits` within a handler counts at once."""
        narrow = LinkSettings(limits=HELLO_LIMITS)

        async def test() -> None:
            async with self.link(OPEN, narrow) as (ours, theirs):
                there = Recorder(theirs, lambda frames: theirs.set_limits(DATA_LIMITS))
                Recorder(ours)
                ours.send([b"a hello"])
                ours.send([bytes(MIB)] * 5)
                await there.wait_messages(2)
                theirs.set_limits(HELLO_LIMITS)
                ours.send([b""] * (HELLO_LIMITS.frames + 1))
                assert isinstance(await there.wait_end(), LimitExceededError)

        self.run(test())

    def test_a_failing_handler_ends_the_comm(self, caplog: pytest.LogCaptureFixture) -> None:
        """An exception from a handler is logged, and is the cause of the end; the other side sees a break."""

        async def test() -> None:
            def fail(frames: list[memoryview]) -> None:
                raise ZeroDivisionError("handler bug")

            async with self.link() as (ours, theirs):
                there, here = Recorder(theirs, fail), Recorder(ours)
                ours.send([b"1"])
                ours.send([b"2"])
                error = await there.wait_end()
                assert isinstance(error.__cause__, ZeroDivisionError)
                assert len(there.messages) == 1
                await here.wait_end()

        with caplog.at_level(logging.ERROR):
            self.run(test())
        assert "handler bug" in caplog.text


async def _drains(comm: Comm, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(comm.drain(), timeout_s)
    except TimeoutError:
        return False
    return True


class _Collector:
    """A handler to change to."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.ended = 0

    def message_received(self, frames: list[memoryview]) -> None:
        self.received.append(bytes(frames[0]))

    def comm_ended(self, error: Exception) -> None:
        self.ended += 1
