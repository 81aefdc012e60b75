"""Shared memory: the conformance suite, and what is particular to it."""

from __future__ import annotations

import asyncio
import threading
import time

from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ConformanceBase
from zmqtasks.transports.shm import housekeeping


class TestShm(TransportConformance):
    scheme = "shm"
    frozen_heartbeat_s = 3.0  # a stopped process is not silent as long as its kernel answers


class TestWithoutThreads(ConformanceBase):
    scheme = "shm"

    def test_messages_are_lent_although_no_thread_can_look_after_the_memory(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                deadline = time.monotonic() + 10
                while housekeeping._thread is not None and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)  # of links before
                usual = threading.stack_size(1 << 46)  # no system has room for that
                try:
                    for number in range(4):
                        ours.send([bytes([number]) * MIB])
                finally:
                    threading.stack_size(usual)
                await there.wait_messages(4)
                assert [set(bytes(frames[0])) for frames in there.messages] == [{0}, {1}, {2}, {3}]
                ours.send([bytes(MIB)])
                assert ours.ended is None

        self.run(test())
