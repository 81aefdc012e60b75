"""Links over shm where something is full, short or gone: no wait without an end, no memory that stays, no link lost for it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from zmqtasks.errors import CommClosedError, ConnectError
from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.testing.comms import Recorder, open_descriptors, wait_until
from zmqtasks.testing.conformance_base import ConformanceBase
from zmqtasks.transports.shm import housekeeping, native, own_arena
from zmqtasks.transports.shm.arena import Arena
from zmqtasks.transports.shm.channel import GREETING, take_greeting_untrusted
from zmqtasks.transports.shm.comm import LEND_BYTES, ShmComm


def large(size_bytes: int = MIB) -> memoryview:
    return memoryview(np.ones(size_bytes, np.uint8))


def own() -> Arena:
    arena = own_arena.process_arena()
    assert arena is not None
    return arena


def close(arena: Arena) -> None:
    """Arenas of a process live as long as it."""
    os.close(arena.read_only)
    os.close(arena._file)
    native.unmap(arena._address, arena.size)


@pytest.fixture
def small_arena() -> Iterator[Arena]:
    arena = own()
    usual, arena.limit_bytes = arena.limit_bytes, arena.resident_bytes + 24 * MIB
    yield arena
    arena.limit_bytes = usual


class TestLimits(ConformanceBase):
    scheme = "shm"

    def test_drain_ends_when_a_message_went_inline_after_its_wait_for_a_block(self, small_arena: Arena) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                content = large(20 * MIB)
                ours.send([content])
                await there.wait_messages(1)  # which keeps the only block that there is room for
                ours.send([content])
                await there.wait_messages(2)
                async with asyncio.timeout(10):
                    await ours.drain()

        self.run(test())

    def test_many_leases_returned_at_once_are_all_told(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                assert isinstance(ours, ShmComm)
                Recorder(ours)
                there = Recorder(theirs)
                content = large(LEND_BYTES)
                count = 1000  # more than the channel's socket holds news of
                for number in range(count):
                    ours.send_lasting([content])
                    if number % 20 == 0:
                        await ours.drain()
                await there.wait_messages(count)
                channel = ours._channel
                assert channel is not None
                there.messages.clear()
                await wait_until(lambda: not channel.leases, "all leases are back")

        self.run(test())

    def test_many_leases_returned_after_the_link_are_all_told(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                assert isinstance(ours, ShmComm)
                Recorder(ours)
                there = Recorder(theirs)
                content = large(LEND_BYTES)
                for number in range(1000):
                    ours.send_lasting([content])
                    if number % 20 == 0:
                        await ours.drain()
                await there.wait_messages(1000)
                channel = ours._channel
                assert channel is not None
                await asyncio.gather(ours.close(), theirs.close())
                kept = there.messages.pop()
                there.messages.clear()
                await wait_until(lambda: len(channel.leases) == 1, "all leases but one are back")
                del kept
                await wait_until(lambda: not channel.leases, "the last lease is back")

        self.run(test())

    def test_the_arena_is_found_behind_many_news(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                content = large(LEND_BYTES)
                for number in range(270):
                    ours.send_lasting([content])
                    if number % 20 == 0:
                        await ours.drain()
                await there.wait_messages(270)
                theirs.send([b"the stream is read first"])
                there.messages.clear()
                theirs.send([large()])
                await here.wait_messages(2)

        self.run(test())

    def test_frames_that_begin_anywhere_in_allocated_memory(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                memory = ours.allocate(2 * MIB)
                memory[:] = bytes(range(256)) * (8 * KIB)
                ours.send([memory[8:]])
                ours.send([memory[64:]])
                await there.wait_messages(2)
                assert there.messages[0][0] == memory[8:]
                assert there.messages[1][0] == memory[64:]

        self.run(test())

    def test_frames_for_which_the_kernel_has_no_pages_go_through_the_socket(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                held = own().held_blocks
                usual = resource.getrlimit(resource.RLIMIT_FSIZE)
                size = 3 * MIB + os.getpid() % 1000 * KIB  # of which nobody has left a warm block
                resource.setrlimit(resource.RLIMIT_FSIZE, (4 * KIB, usual[1]))
                try:
                    ours.send([large(size)])
                    ours.send([b"behind it"])
                    await there.wait_messages(2)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
                assert there.messages[0][0] == large(size)
                assert own().held_blocks == held
                ours.send([large(size)])  # the block of before is not taken for one whose pages are there
                await there.wait_messages(3)
                assert there.messages[2][0] == large(size)

        self.run(test())

    def test_a_frame_that_is_no_run_of_bytes_is_refused_and_nothing_else(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                strided = memoryview(np.ones(4 * MIB, np.uint8))[::2]
                with pytest.raises(TypeError, match="contiguous"):
                    ours.send([strided])
                theirs.pause_receiving()
                for _ in range(3):  # the queue has something in it
                    ours.send([large(16 * MIB)])
                with pytest.raises(TypeError, match="contiguous"):
                    ours.send([strided])
                theirs.resume_receiving()
                await there.wait_messages(3)
                await ours.drain()

        self.run(test())

    def test_drain_tells_the_end_that_came_with_new_congestion(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                assert isinstance(ours, ShmComm)
                Recorder(ours)
                there = Recorder(theirs)
                theirs.pause_receiving()
                ours.send([large(20 * MIB)])
                draining = asyncio.ensure_future(ours.drain())
                await asyncio.sleep(0)
                channel = ours._channel
                assert channel is not None
                loop = asyncio.get_running_loop()

                def news() -> None:
                    ours._on_news()
                    if not ours._unread:  # the drain has been woken, and has not run yet
                        ours.send([large(20 * MIB)])
                        ours.abort()

                loop.add_reader(channel.fileno(), news)
                theirs.resume_receiving()
                await there.wait_messages(1)
                async with asyncio.timeout(10):
                    with pytest.raises(CommClosedError):
                        await draining

        self.run(test())

    def test_both_close_with_much_on_its_way(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                Recorder(theirs)
                for _ in range(5):
                    ours.send([large(8 * MIB)])
                    theirs.send([large(8 * MIB)])
                began = time.monotonic()
                await asyncio.gather(ours.close(), theirs.close())
                assert time.monotonic() - began < ours._settings.heartbeat_s / 2  # type: ignore[attr-defined]

        self.run(test())

    def test_memory_that_comes_back_late_is_given_back_too(self) -> None:
        async def test() -> None:
            arena = own()
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                await wait_until(lambda: not arena.resident_bytes and not arena.held_blocks, "nothing of before", 30)
                ours.send([large(48 * MIB)])
                await there.wait_messages(1)
                await wait_until(lambda: housekeeping._thread is None, "nothing to look after", 30)
                there.messages.clear()
                await wait_until(lambda: arena.resident_bytes == 0, "the memory is given back", 30)

        self.run(test())

    def test_an_error_while_a_message_goes_out_releases_its_blocks_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                assert isinstance(ours, ShmComm)
                there = Recorder(theirs)
                here = Recorder(ours)

                def no_memory(*args: object) -> None:
                    raise MemoryError

                monkeypatch.setattr(ours, "_put_out", no_memory)
                arena = own()
                ours.send([large()])
                taken = arena.take(MIB)
                assert taken is not None
                assert isinstance(await here.wait_end(), CommClosedError)
                await there.wait_end()
                other = arena.take(MIB)
                assert other is not None
                assert other is not taken
                arena.release(taken)
                arena.release(other)

        self.run(test())


def test_a_channel_that_is_no_socket_leaves_no_descriptor() -> None:
    one, other = socket.socketpair()
    file = os.open("/dev/zero", os.O_RDONLY)
    with one, other:
        before = set(open_descriptors())
        socket.send_fds(one, [GREETING], [file])
        with pytest.raises(ConnectError, match="descriptor"):
            take_greeting_untrusted(other)
        assert set(open_descriptors()) == before
    os.close(file)


def test_an_arena_is_made_when_there_are_descriptors_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_arena, "_arena", None)
    monkeypatch.setattr(own_arena, "_tried", False)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
    try:
        assert own_arena.process_arena() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    made = own_arena.process_arena()
    assert made is not None
    close(made)


def test_an_arena_that_cannot_be_mapped_leaves_no_descriptor() -> None:
    before = set(open_descriptors())
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        Arena(MIB, 1 << 52)
    assert set(open_descriptors()) == before


def test_a_block_that_can_never_fit_throws_nothing_away() -> None:
    arena = Arena(24 * MIB, 64 * MIB)
    block = arena.take(8 * MIB)
    assert block is not None
    arena.release(block)
    assert arena.take(32 * MIB) is None
    assert arena.free_bytes == 8 * MIB
    close(arena)
