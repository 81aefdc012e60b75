"""ZeroMQ: the conformance suite, and what is particular to it."""

from __future__ import annotations

import socket

from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase
from zmqtasks.transports.zeromq.connection import Connection


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


def test_who_hangs_up_knows_the_connection_from_the_next_one_by_its_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname())
        fd = first.fileno()
        connection = Connection.found(fd)
        assert connection is not None
        first.close()
        assert Connection.found(fd) is None
        with socket.create_connection(server.getsockname()) as second:
            assert second.fileno() == fd, "the kernel gives the lowest descriptor that is free"
            connection.hang_up()
            accepted = [server.accept()[0] for _ in range(2)]
            second.sendall(b"lives")
            assert accepted[1].recv(5) == b"lives"
            found = Connection.found(fd)
            assert found is not None
            found.hang_up()
            assert accepted[1].recv(5) == b""
            for each in accepted:
                each.close()
