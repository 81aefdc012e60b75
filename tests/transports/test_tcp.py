"""TCP: the conformance suite, and what is particular to it."""

from __future__ import annotations

import asyncio
import resource
import struct

from zmqtasks.errors import CommBrokenError, LimitExceededError, RemoteProtocolError
from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, memory_bytes
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase, end
from zmqtasks.testing.conformance_endings import EndingTests
from zmqtasks.testing.conformance_flow import FlowTests
from zmqtasks.transports import Comm, LinkSettings, connect
from zmqtasks.transports.address import parse_host_port
from zmqtasks.transports.stream import PREAMBLE


class TestTcp(TransportConformance):
    scheme = "tcp"
    frozen_heartbeat_s = 3.0  # a stopped process is not silent as long as its kernel answers


class TestTcpEncrypted(TransportConformance):
    scheme = "tcp"
    encryption = ENCRYPTED
    frozen_heartbeat_s = 3.0
    sends_huge_frames = False


class TestTcpOnPlainAsyncio(FlowTests, EndingTests):
    scheme = "tcp"
    loop_factory = staticmethod(asyncio.new_event_loop)


class TestWireOnPlainAsyncio(ConformanceBase):
    scheme = "tcp"
    loop_factory = staticmethod(asyncio.new_event_loop)

    def test_only_the_loop_sends(self) -> None:
        """Its transports change their buffers in steps between which another thread can look."""

        async def test() -> None:
            async with self.link() as (ours, _theirs):
                assert not ours.ready_for_direct

        self.run(test())


class TestTcpEncryptedOnPlainAsyncio(FlowTests, EndingTests):
    scheme = "tcp"
    encryption = ENCRYPTED
    loop_factory = staticmethod(asyncio.new_event_loop)


class TestWire(ConformanceBase):
    scheme = "tcp"

    def stranger_sends(self, data: bytes, settings: LinkSettings) -> Exception:
        """How a comm ends whose peer sends `data` and then waits."""
        ends: list[Exception] = []

        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait, settings) as listener:
                where = parse_host_port(listener.address)
                reader, writer = await asyncio.open_connection(where.host, where.port)
                writer.write(data)
                comm = await arrivals.get()
                ends.append(await Recorder(comm).wait_end(2.0))
                assert await reader.read(len(PREAMBLE)) == PREAMBLE
                writer.close()
                await comm.close()

        self.run(test())
        return ends[0]

    def test_announced_frame_takes_no_memory(self) -> None:
        before = memory_bytes()
        error = self.stranger_sends(PREAMBLE + struct.pack("<IIQ", 1, 1, 100 << 30), LinkSettings())
        assert isinstance(error, LimitExceededError)
        assert memory_bytes() - before < 16 * MIB

    def test_other_version_of_the_framing(self) -> None:
        error = self.stranger_sends(PREAMBLE[:-1] + b"\x09", LinkSettings())
        assert isinstance(error, RemoteProtocolError)
        assert "version 9" in str(error)

    def test_end_within_a_message_is_a_break(self) -> None:
        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait) as listener:
                where = parse_host_port(listener.address)
                _reader, writer = await asyncio.open_connection(where.host, where.port)
                writer.write(PREAMBLE + struct.pack("<IIQ", 1, 1, 100) + b"half")
                writer.close()
                there = Recorder(await arrivals.get())
                assert isinstance(await there.wait_end(), CommBrokenError)
                assert not there.messages
                await there.comm.close()

        self.run(test())

    def test_direct_send_with_no_descriptor_left(self) -> None:
        """It needs one, the first time: then it is up to the loop."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs)
                ours.send([b"1"])
                await there.wait_messages(1)
                limits = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
                try:
                    assert ours.ready_for_direct
                    ours.send_direct([b"2"])
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                ours.send([b"3"])
                await there.wait_messages(3)
                assert there.contents() == [[b"1"], [b"2"], [b"3"]]

        self.run(test())

    def test_localhost(self) -> None:
        async def test() -> None:
            async with self.link(host="localhost") as (ours, theirs):
                assert "127.0.0.1" in ours.peer_address
                assert "127.0.0.1" in theirs.peer_address

        self.run(test())

    def test_both_families_at_the_ipv6_wildcard(self) -> None:
        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait, host="[::]") as listener:
                port = parse_host_port(listener.address).port
                for host in ("127.0.0.1", "[::1]"):
                    ours = await connect(f"tcp://{host}:{port}", OPEN)
                    theirs = await arrivals.get()
                    assert theirs.peer_address == ours.local_address
                    await asyncio.gather(end(ours), end(theirs))

        self.run(test())
