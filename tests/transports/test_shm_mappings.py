"""Mappings that are kept for the next lease of their block: they show what the lender writes, and nothing of its readers."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np

from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance_base import ConformanceBase
from zmqtasks.transports.base import Comm
from zmqtasks.transports.shm.arena import FILE_NAME
from zmqtasks.transports.shm.leases import live_leases
from zmqtasks.transports.shm.mappings import KEPT_FROM_BYTES, KEPT_MAPPINGS
from zmqtasks.transports.shm.own_arena import process_arena


def private_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for line in maps if FILE_NAME in line and line.split()[1] == "rw-p")


class TestMappings(ConformanceBase):
    scheme = "shm"

    async def sent(self, ours: Comm, there: Recorder, content: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """What arrives, and keeps the lease."""
        ours.send([content.data])
        await there.wait_messages(1)
        return np.frombuffer(there.messages.pop()[0], np.uint8)

    async def nothing_lent(self) -> None:
        arena = process_arena()
        assert arena is not None
        await wait_until(lambda: live_leases() == 0 and arena.held_blocks == 0, "a lease did not return")

    def test_a_block_lent_again_is_mapped_already(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                addresses = []
                for number in range(10):
                    array = await self.sent(ours, there, np.full(2 * MIB, number, np.uint8))
                    assert array.min() == array.max() == number
                    addresses.append(array.ctypes.data)
                    del array
                    await self.nothing_lent()
                assert len(set(addresses)) == 1

        self.run(test())

    def test_what_was_written_to_is_not_used_again(self) -> None:
        """Whatever page it was, and whichever way it is read again."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                for number in range(60):
                    array = await self.sent(ours, there, np.full(MIB, number, np.uint8))
                    assert array.min() == array.max() == number
                    array[number * 17_477 % MIB] = 255
                    del array
                    await self.nothing_lent()

        self.run(test())

    def test_memory_that_was_given_back_shows_what_came_after(self) -> None:
        arena = process_arena()
        assert arena is not None
        arena.trim(1e12)  # what other tests left would be taken first

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                addresses = set()
                for number in range(10):
                    array = await self.sent(ours, there, np.full(2 * MIB, number, np.uint8))
                    assert array.min() == array.max() == number
                    addresses.add(array.ctypes.data)
                    del array
                    await self.nothing_lent()
                    arena.trim(1e12)
                    assert arena.resident_bytes == 0
                assert len(addresses) == 1

        self.run(test())

    def test_they_are_bounded_and_end_with_their_link(self) -> None:
        async def test() -> None:
            before = private_mappings()
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                frames = [bytes(KEPT_FROM_BYTES)] * (KEPT_MAPPINGS + 10) + [bytes(520 * KIB)] * 10
                ours.send(frames)
                await there.wait_messages(1)
                assert live_leases() == len(frames)
                there.messages.clear()
                await self.nothing_lent()
                assert 0 < private_mappings() - before <= KEPT_MAPPINGS
                last = await self.sent(ours, there, np.full(MIB, 3, np.uint8))
                await ours.close()
                await there.wait_end()
            gc.collect()
            await wait_until(lambda: private_mappings() - before == 1, "mappings are left over")
            assert last.sum() == 3 * MIB
            del last
            await wait_until(lambda: private_mappings() == before, "the last mapping is left over")

        self.run(test())


_FORKING = """
import os, sys, threading, time
from zmqtasks.transports.shm import housekeeping
from zmqtasks.transports.shm.own_arena import process_arena

def use(arena):
    block = arena.take(2 << 20)
    arena.fill(block, 0, memoryview(b"x" * (2 << 20)))
    arena.filled(block)
    arena.release(block)
    housekeeping.look_after(arena)
    deadline = time.monotonic() + 20
    while arena.unmapped and time.monotonic() < deadline:  # the thread has it to do
        time.sleep(0.01)
    keepers = [t for t in threading.enumerate() if t.name == "zmqtasks-arena"]
    return len(keepers) == 1 and not arena.unmapped

parent = process_arena()
assert use(parent)
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process_arena() is parent and use(parent)
    print("both")
else:
    assert not [t for t in threading.enumerate() if t.name == "zmqtasks-arena"]
    own = process_arena()
    os._exit(0 if own is not None and own is not parent and use(own) else 1)
"""


def test_a_forked_child_keeps_house_for_itself() -> None:
    """It has an arena and a thread of its own; those of the parent go on."""
    done = subprocess.run([sys.executable, "-c", _FORKING], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("both\n", "", 0)
