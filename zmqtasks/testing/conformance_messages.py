"""Conformance: messages arrive whole, in order, and in good memory."""

from __future__ import annotations

import asyncio
import json
import mmap
import queue
import random
import sys
import threading
import time

import pytest

from zmqtasks.errors import LocalProtocolError
from zmqtasks.protocol.frames import GIB, KIB, MIB, Buffer
from zmqtasks.testing.comms import DEADLINE_S, Recorder, available_memory_bytes, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, end
from zmqtasks.testing.peer import is_aligned
from zmqtasks.transports import Comm, connect

_HUGE_BYTES = 4 * GIB + 4097
_HUGE_NEEDS_BYTES = 14 * GIB


class _Teller:
    """Handles a comm: hands what has come to another thread."""

    def __init__(self, arrived: queue.SimpleQueue[list[bytes]]) -> None:
        self._arrived = arrived

    def message_received(self, frames: list[memoryview]) -> None:
        self._arrived.put([bytes(frame) for frame in frames])

    def comm_ended(self, error: Exception) -> None:
        pass


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
        """Where other threads may send, what they and the loop send arrives whole, and in the order in which it was sent."""
        sizes = [(number * 7919) % 700 for number in range(1000)]
        sizes[7::10] = [(number * 7919) % (300 * KIB) for number in range(100)]
        sizes[9::50] = [MIB - 64 + number * 16 for number in range(20)]
        sizes[19::200] = [3 * MIB] * 5
        pattern = random.randbytes(3 * MIB + 1000)
        direct = [
            [b"thread %6d" % number, pattern[number : number + size], b""][: 2 + number % 2]
            for number, size in enumerate(sizes)
        ]

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                lock = threading.Lock()  # as whoever sends has it
                sent: list[list[bytes]] = []

                def send_by_thread() -> None:
                    number = 0
                    while number < 1000 and ours.ended is None:
                        with lock:
                            if ours.ready_for_direct:
                                ours.send_direct(direct[number])
                                sent.append(direct[number])
                                number += 1
                        time.sleep(0)

                if not ours.ready_for_direct:
                    pytest.skip("this transport sends from its own loop only")
                thread = asyncio.create_task(asyncio.to_thread(send_by_thread))
                for number in range(2000):
                    with lock:
                        ours.send([b"loop   %6d" % number])
                        sent.append([b"loop   %6d" % number])
                    theirs.send([b"back   %6d" % number])
                    if number % 3 == 0:
                        await asyncio.sleep(0 if number % 30 else 0.0005)  # the thread's turn comes in between, too
                await thread
                await there.wait_messages(3000)
                await here.wait_messages(2000)
                arrived = there.contents()
                assert [frames[0] for frames in arrived] == [frames[0] for frames in sent]
                assert arrived == sent
                assert [frames[0] for frames in here.contents()] == [b"back   %6d" % n for n in range(2000)]

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # the threads take turns wherever they can
        try:
            self.run(test())
        finally:
            sys.setswitchinterval(interval)

    def test_direct_sends_do_not_wait_for_the_loop(self) -> None:
        """They are there while the loop they belong to does nothing, as one does whose program computes."""
        self.needs(crosses_processes=True)
        arrived: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        messages = [[random.randbytes(size)] for size in (1, 16 * KIB, 16 * KIB + 1, 48 * KIB)]
        messages.append([b"", random.randbytes(20 * KIB), random.randbytes(9)])

        async def listen_elsewhere(address: asyncio.Future[str], over: threading.Event) -> None:
            comms: list[Comm] = []

            def accept(comm: Comm) -> None:
                comms.append(comm)
                comm.start(_Teller(arrived))

            async with self.listening(accept) as listener:
                address.get_loop().call_soon_threadsafe(address.set_result, listener.address)
                await asyncio.to_thread(over.wait)
                for comm in comms:
                    await end(comm)

        def other_thread(address: asyncio.Future[str], over: threading.Event) -> None:
            with asyncio.Runner(loop_factory=type(self).loop_factory) as runner:
                runner.run(listen_elsewhere(address, over))

        async def test() -> None:
            address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            over = threading.Event()
            listening = asyncio.create_task(asyncio.to_thread(other_thread, address, over))
            try:
                await asyncio.wait((address, listening), return_when=asyncio.FIRST_COMPLETED)
                if listening.done():
                    listening.result()
                ours = await connect(await address, self.encrypting(OPEN))
                Recorder(ours)
                try:
                    if not ours.ready_for_direct:
                        pytest.skip("this transport sends from its own loop only")
                    for message in messages:
                        assert ours.ready_for_direct, "it was to send at once"
                        ours.send_direct(message)
                        assert arrived.get(timeout=DEADLINE_S) == message  # the loop stands still meanwhile
                finally:
                    await end(ours)
            finally:
                over.set()
                await listening

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
