"""ZeroMQ: the conformance suite, and what is particular to it."""

from __future__ import annotations

from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase


class TestZeroMq(TransportConformance):
    scheme = "zmq"


class TestZeroMqEncrypted(TransportConformance):
    scheme = "zmq"
    encryption = ENCRYPTED
    sends_huge_frames = False  # plain links do


class TestCredits(ConformanceBase):
    scheme = "zmq"

    def test_what_may_still_be_sent_is_told(self) -> None:
        """Nothing while the peer takes nothing, and something again when it does."""

        async def test() -> None:
            async with self.link(OPEN, OPEN) as (ours, theirs):
                there = Recorder(theirs)
                granted = ours.statistics().credit_bytes
                assert granted is not None
                assert 4 * MIB <= granted <= 64 * MIB
                theirs.pause_receiving()
                for _ in range(96):
                    ours.send([bytes(MIB)])
                assert ours.statistics().credit_bytes == 0
                assert ours.queued_bytes >= 96 * MIB - granted
                theirs.resume_receiving()
                await there.wait_messages(96)
                await wait_until(lambda: (ours.statistics().credit_bytes or 0) >= granted // 2, "no credit came back")
                await ours.close()
                assert ours.statistics().credit_bytes == 0

        self.run(test())
