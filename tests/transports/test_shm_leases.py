"""Leases over shm: no stale byte, no leaked block, whoever looks at them, wherever, and however they end.

`ZMQTASKS_FUZZ_LEASES` sets the number of leases of the soaks; of those here, over a link, a twentieth.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase
from zmqtasks.transports import LinkSettings
from zmqtasks.transports.shm import patience
from zmqtasks.transports.shm.arena import Arena
from zmqtasks.transports.shm.comm import LEND_BYTES
from zmqtasks.transports.shm.leases import live_leases
from zmqtasks.transports.shm.own_arena import process_arena

LEASES = max(4000, int(os.environ.get("ZMQTASKS_FUZZ_LEASES", "0")) // 20)


def the_arena() -> Arena:
    arena = process_arena()
    assert arena is not None
    return arena


@pytest.fixture(autouse=True)
def no_block_leaks() -> Iterator[None]:
    yield
    gc.collect()
    asyncio.run(wait_until(lambda: live_leases() == 0, "a lease is mapped for ever", 5))
    arena = the_arena()
    asyncio.run(wait_until(lambda: arena.trim(1e12) or arena.held_blocks == 0, "a block was not returned", 5))
    assert arena.held_blocks == 0


class TestLeases(ConformanceBase):
    scheme = "shm"

    def test_a_frame_is_lent_and_comes_back(self) -> None:
        async def test() -> None:
            arena = the_arena()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([b"x" * (LEND_BYTES - 1)])
                await there.wait_messages(1)
                assert (live_leases(), arena.held_blocks) == (0, 0), "small frames go through the socket"
                ours.send([b"y" * MIB])
                await there.wait_messages(2)
                assert (live_leases(), arena.held_blocks) == (1, 1)
                there.messages.clear()
                await wait_until(lambda: live_leases() == 0 and arena.held_blocks == 0, "the lease did not return")

        self.run(test())

    def test_a_large_frame_waits_for_a_block_that_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "_S_PER_BYTE", 10 / patience.FROM_BYTES)

        async def test() -> None:
            arena = the_arena()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([b"a" * patience.FROM_BYTES])
                await there.wait_messages(1)
                before = arena.resident_bytes
                ours.send([b"b" * patience.FROM_BYTES])
                ours.send([b"c"])
                assert (ours.queued_bytes > patience.FROM_BYTES, len(there.messages)) == (True, 1)
                there.messages.clear()
                await there.wait_messages(2, timeout_s=5)
                assert [bytes(message[0][:1]) for message in there.messages] == [b"b", b"c"]
                assert arena.resident_bytes == before, "it took new pages"
                there.messages.clear()

        self.run(test())

    def test_who_keeps_what_it_reads_is_not_waited_for_long(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for number in range(12):
                    ours.send([bytes([number]) * patience.FROM_BYTES])
                await there.wait_messages(12)
                assert [message[0][-1] for message in there.messages] == list(range(12))
                there.messages.clear()

        self.run(test())

    @pytest.mark.parametrize("end", ["close", "abort"])
    def test_a_link_ends_while_a_frame_waits(self, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "_S_PER_BYTE", 0.5 / patience.FROM_BYTES)

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([b"a" * patience.FROM_BYTES])
                await there.wait_messages(1)
                ours.send([b"b" * patience.FROM_BYTES])
                if end == "abort":
                    ours.abort()
                else:
                    await ours.close()  # what was sent arrives
                    assert len(there.messages) == 2
                there.messages.clear()

        self.run(test())

    def test_waits_in_vain_become_rare(self) -> None:
        patient = patience.Patience()
        waits = []
        for _ in range(100):
            waits.append(patient.wait_s(64 * MIB) > 0)
            if waits[-1]:
                patient.waited(in_vain=True)
        assert [number for number, waited in enumerate(waits) if waited] == [0, 2, 6, 14, 30, 62, 94]
        while not patient.wait_s(64 * MIB):
            pass
        patient.waited(in_vain=False)
        assert patient.wait_s(64 * MIB) == pytest.approx(0.002, rel=0.1)

    def test_what_a_reader_writes_is_its_own(self) -> None:
        """The same memory lent twice is two frames, and a block used again shows nothing of who wrote before."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                frame = memoryview(b"a" * MIB)
                ours.send_lasting([frame])
                ours.send_lasting([frame])
                await there.wait_messages(2)
                assert the_arena().held_blocks == 1, "the second reader costs no copy"
                one, other = (np.frombuffer(message[0], np.uint8) for message in there.messages)
                one[:] = 0
                assert (other == ord("a")).all()
                del one, other
                there.messages.clear()
                for number in range(20):
                    ours.send([bytes([number]) * MIB])
                    await there.wait_messages(1)
                    array = np.frombuffer(there.messages.pop()[0], np.uint8)
                    assert (array == number).all()
                    array[::4096] = 99
                    del array

        self.run(test())

    def test_allocated_memory_is_not_copied(self) -> None:
        async def test() -> None:
            arena = the_arena()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                memory = ours.allocate(4 * MIB)
                memory[:] = b"z" * memory.nbytes
                ours.send([memory, memory[64 * KIB : 3 * MIB].toreadonly()])
                await there.wait_messages(1)
                assert arena.held_blocks == 1
                assert [bytes(frame) for frame in there.messages[0]] == [b"z" * 4 * MIB, b"z" * (3 * MIB - 64 * KIB)]
                del memory
                assert arena.held_blocks == 1, "the readers hold it"
                there.messages.clear()
                await wait_until(lambda: arena.held_blocks == 0, "it did not come back")

        self.run(test())

    def test_leases_outlive_their_link(self) -> None:
        """An array from a link that is closed stays as it is, and its block in use."""

        async def test() -> None:
            arena = the_arena()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([b"k" * (3 * MIB)])
                await there.wait_messages(1)
                kept = np.frombuffer(there.messages.pop()[0], np.uint8)[10:-10:7]
                await ours.close()
                await there.wait_end()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for number in range(10):
                    ours.send([bytes([number]) * (3 * MIB)])
                await there.wait_messages(10)
                assert (kept == ord("k")).all()
                del kept
                there.messages.clear()
                await wait_until(lambda: arena.held_blocks == 0, "blocks were not returned")

        self.run(test())

    def test_a_full_arena_sends_through_the_socket(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arena = the_arena()
        arena.trim(1e12)
        monkeypatch.setattr(arena, "limit_bytes", arena.resident_bytes + 8 * MIB)

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for number in range(20):
                    ours.send([bytes([number]) * MIB])
                await there.wait_messages(20)
                assert 0 < live_leases() <= 8
                assert [message[0][5] for message in there.messages] == list(range(20))

        self.run(test())

    @pytest.mark.parametrize("role", ["stall", "echo"])
    def test_kill_returns_all_leases(self, role: str) -> None:
        """`kill -9` of a reader, whether it had been handed the leases or not."""

        async def test() -> None:
            arena = the_arena()
            async with self.peer_process(role) as (comm, peer):
                here = Recorder(comm)
                for _ in range(40):
                    comm.send([bytes(MIB)])
                if role == "echo":
                    await here.wait_messages(40)
                    here.messages.clear()
                await wait_until(lambda: arena.held_blocks > 0 or role == "echo", "nothing was lent")
                peer.send_signal(signal.SIGKILL)
                await here.wait_end()
                await wait_until(lambda: arena.held_blocks == 0, "blocks of the dead were not returned")

        self.run(test())

    def test_the_death_of_the_lender_leaves_arrays_whole(self) -> None:
        async def test() -> None:
            async with self.peer_process("echo") as (comm, peer):
                here = Recorder(comm)
                comm.send([b"w" * (2 * MIB)])
                await here.wait_messages(1)
                array = np.frombuffer(here.messages.pop()[0], np.uint8)
                peer.send_signal(signal.SIGKILL)
                await here.wait_end()
                assert (array == ord("w")).all()
                array[:] = 1
                assert array.sum() == array.nbytes

        self.run(test())

    def test_idle_memory_goes_back(self) -> None:
        async def test() -> None:
            arena = the_arena()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                ours.send([bytes(64 * MIB)])
                await there.wait_messages(1)
                there.messages.clear()
                await wait_until(lambda: arena.held_blocks == 0, "the lease did not return")
                assert arena.resident_bytes >= 64 * MIB
                arena.trim(1e12)
                assert (arena.resident_bytes, arena.free_bytes) == (0, 0)

        self.run(test())

    def test_soak(self) -> None:
        """Every view shows what was sent until it is gone: slices, views of views, threads, cycles, any order."""
        seed = random.randrange(1 << 32)
        print("seed", seed)
        rng = random.Random(seed)
        errors: list[str] = []
        settings = LinkSettings(limits=OPEN.limits, high_water_bytes=8 * MIB, low_water_bytes=MIB)
        patterns = [np.full(1 * MIB, number, np.uint8) for number in range(251)]
        held: list[tuple[Any, int]] = []
        lock = threading.Lock()
        over = threading.Event()

        def check(view: Any, number: int) -> None:
            if view.size and not (int(view.flat[0]) == int(view.flat[-1]) == int(view.max()) == number == view.min()):
                errors.append(f"a view of message {number} shows {view}")

        def keep(frame: memoryview, number: int) -> None:
            array = np.frombuffer(frame, np.uint8)
            match rng.randrange(6):
                case 0:
                    array = array[rng.randrange(1000) : -rng.randrange(1, 1000)]
                case 1:
                    array = np.frombuffer(memoryview(array)[64:][::1], np.uint8)[::3]
                case 2:
                    array = array[: array.size // 8 * 8].view(np.uint64).reshape(-1, 2).view(np.uint8).T
                case 3:
                    cycle: list[Any] = [array]
                    cycle.append(cycle)
                    array = array[5:50]
                case 4:
                    array[100:200] = number  # a page of its own
                case _:
                    pass
            with lock:
                held.append((array, number))

        def drop() -> None:
            """Another thread looks at what is held, and lets go of it."""
            mine = random.Random(seed + 1)
            while not over.is_set() or held:
                with lock:
                    view, number = held.pop(mine.randrange(len(held))) if held else (None, 0)
                if view is not None:
                    check(view, number)
                    del view
                else:
                    over.wait(0.001)

        async def test() -> None:
            async with self.link(settings) as (ours, theirs):
                numbers: list[int] = []

                def received(frames: list[memoryview]) -> None:
                    keep(frames[0], numbers.pop(0))
                    there.messages.clear()
                    done[0] += 1

                done = [0]
                there = Recorder(theirs, received)
                Recorder(ours)
                for number in range(LEASES):
                    size = rng.choice((LEND_BYTES, LEND_BYTES + 1, 600 * KIB, 700_001, MIB))
                    numbers.append(number % 251)
                    ours.send([patterns[number % 251][:size].data])
                    await ours.drain()
                    if number % 16 == 0:
                        await asyncio.sleep(0)
                        while len(held) > 300:
                            await asyncio.sleep(0.001)
                await wait_until(lambda: done[0] == LEASES, "messages are missing", 20)

        threads = [threading.Thread(target=drop) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            self.run(test())
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not errors, errors[:3]
