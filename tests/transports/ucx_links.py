"""Conformance of ucx with the UCX_TLS of the environment; `test_ucx` runs this file in processes of its own."""

from __future__ import annotations

import asyncio
import os
import resource
import struct

import pytest

from zmqtasks.errors import CommBrokenError, CommClosedError, ConnectError, RemoteProtocolError
from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase, end
from zmqtasks.transports import Comm, LinkSettings, connect, get_transport
from zmqtasks.transports.address import parse_host_port
from zmqtasks.transports.buffer_pool import POOL
from zmqtasks.transports.stream import GOODBYE, PREAMBLE
from zmqtasks.transports.ucx import library
from zmqtasks.transports.ucx.wire import pack_large, pack_offer

SIZE_BYTES = 64 * MIB


def _make_what_lasts() -> None:
    """What UCX makes once per process and keeps exists before any test counts descriptors."""
    environment = dict(os.environ)
    get_transport("ucx")

    async def take() -> None:
        library.take_worker(asyncio.get_running_loop()).release()

    asyncio.run(take())
    assert dict(os.environ) == environment  # children shall inherit nothing


_make_what_lasts()


class TestUcx(TransportConformance):
    scheme = "ucx"
    frozen_heartbeat_s = 3.0
    sends_huge_frames = False
    # What a killed peer was sending may never end.
    test_kill_is_a_break = pytest.mark.ucx_keeps_its_worker(TransportConformance.test_kill_is_a_break)


async def introduced(ours: Comm, theirs: Comm) -> Recorder:
    """Both sides know the other's UCX address now; gives what records `theirs`."""
    here, there = Recorder(ours), Recorder(theirs)
    ours.send([b"1"])
    theirs.send([b"1"])
    await there.wait_messages(1)
    await here.wait_messages(1)
    return there


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class TestLarge(ConformanceBase):
    scheme = "ucx"

    def test_ucx_carries_large_frames(self) -> None:
        """What UCX says of it (UCX_PROTO_INFO) is read by `test_ucx`."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = await introduced(ours, theirs)
                large = os.urandom(MIB) * (SIZE_BYTES // MIB)
                ours.send([b"a", large, b"b", large[:-1]])
                ours.send([b"after"])
                await there.wait_messages(3)
                assert [bytes(frame) for frame in there.messages[1]] == [b"a", large, b"b", large[:-1]]
                assert there.messages[2] == [b"after"]

        assert library.active_transports() == set(os.environ["EXPECTED_TRANSPORTS"].split(","))
        self.run(test())

    def test_pauses_between_what_is_read_ahead(self) -> None:
        """It is handed on in order, one message when one is wanted."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                await introduced(ours, theirs)
                there = Recorder(theirs, lambda frames: theirs.pause_receiving())
                sent = [os.urandom(MIB) * 5, b"between", b"as well", os.urandom(MIB) * 2, os.urandom(MIB) * 3]
                for frame in sent:
                    ours.send([frame])
                closing = asyncio.create_task(ours.close())
                for count in range(1, len(sent) + 1):
                    await there.wait_messages(count)
                    ahead = theirs._incoming  # type: ignore[attr-defined]
                    await wait_until(lambda ahead=ahead: not ahead or not ahead[0].missing, "UCX does not go on")
                    assert [message[0] for message in there.messages] == sent[:count]
                    assert not there.ends
                    theirs.resume_receiving()
                assert isinstance(await there.wait_end(), CommClosedError)
                await closing

        self.run(test())

    @pytest.mark.parametrize(("size", "messages_in_memory"), [(16 * MIB, 2), (96 * MIB, 1)])
    def test_large_messages_do_not_take_memory_twice(self, size: int, messages_in_memory: int) -> None:
        """What is behind one is read ahead if that is of some use."""

        async def test() -> None:
            lent: list[int] = []
            async with self.link() as (ours, theirs):
                await introduced(ours, theirs)

                def came(frames: list[memoryview]) -> None:
                    lent.append(POOL.statistics().lent_bytes)
                    frames.clear()

                there = Recorder(theirs, came)
                before = POOL.statistics().lent_bytes
                sent = bytes(size)
                for _ in range(4):
                    ours.send([sent])
                await there.wait_messages(4)
                assert (max(lent) - before) // size == messages_in_memory

        self.run(test())

    def test_an_end_that_is_read_ahead(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = await introduced(ours, theirs)
                large = os.urandom(MIB) * (SIZE_BYTES // MIB)
                ours.send([large])
                ours._transport.write(GOODBYE)  # type: ignore[attr-defined]
                assert isinstance(await there.wait_end(), CommClosedError)
                assert there.messages[1:] == [[large]]

        self.run(test())

    def test_large_frames_go_by_tcp_when_descriptors_are_short(self) -> None:
        async def test() -> None:
            usual = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 40, usual[1]))
            try:
                async with self.link() as (ours, theirs):
                    there = await introduced(ours, theirs)
                    large = os.urandom(2 * MIB)
                    ours.send([large])
                    await there.wait_messages(2)
                    assert there.messages[1] == [large]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, usual)

        self.run(test())

    def lie(self, *lies: bytes) -> Exception:
        """How a comm ends that expects a node's words and hears `lies`."""
        ends: list[Exception] = []

        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait) as listener:
                where = parse_host_port(listener.address)
                _reader, writer = await asyncio.open_connection(where.host, where.port)
                writer.write(PREAMBLE + b"".join(lies))
                comm = await arrivals.get()
                recorder = Recorder(comm)
                writer.close()
                ends.append(await recorder.wait_end(10.0))
                await end(comm)

        self.run(test())
        return ends[0]

    def test_lies_about_large_frames(self) -> None:
        announced = pack_large([bytes(MIB)])
        assert isinstance(self.lie(announced[:8], struct.pack("<IIQ", 1, 1, 5)), RemoteProtocolError)
        assert isinstance(self.lie(announced[:8], announced[:8]), RemoteProtocolError)
        assert isinstance(self.lie(pack_offer(1, b"x"), pack_offer(1, b"x")), RemoteProtocolError)
        assert isinstance(self.lie(pack_offer(1, b"")), RemoteProtocolError)
        assert isinstance(self.lie(pack_offer(1, b"address")[:-1] + b"x"), RemoteProtocolError)
        assert isinstance(self.lie(announced), CommBrokenError)  # and never sends

    @pytest.mark.ucx_keeps_its_worker
    def test_a_chunk_of_another_size(self) -> None:
        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = await introduced(ours, theirs)
                ours._large.append(memoryview(bytes(2 * MIB)))  # type: ignore[attr-defined]
                ours.send([bytes(3 * MIB)])
                assert isinstance(await there.wait_end(), RemoteProtocolError)

        self.run(test())

    @pytest.mark.ucx_keeps_its_worker
    def test_links_cut_while_they_send_leave_one_worker(self) -> None:
        """ucxx keeps the worker of such a link; the next one takes the same."""

        async def cut() -> None:
            async with self.link() as (ours, theirs):
                await introduced(ours, theirs)
                theirs.pause_receiving()
                ours.send([bytes(3 * MIB)])
                ours.abort("not needed any more")

        async def test() -> None:
            for _ in range(50):  # until one was cut while it sent, and not before or after
                await cut()
                if asyncio.get_running_loop() in library._workers:
                    break
            assert len(library._workers) == 1
            before = descriptors()
            for _ in range(5):
                await cut()
            # Connections, too, which the peer has ended after the last comm gave the worker back.
            await wait_until(lambda: descriptors() <= before, "more than the worker is left")
            assert len(library._workers) == 1

        self.run(test())

    def test_refuses_links_that_shall_be_encrypted(self) -> None:
        async def test() -> None:
            async with self.listening(lambda comm: None) as listener:
                with pytest.raises(ConnectError, match="--encryption off"):
                    await connect(listener.address, LinkSettings(limits=OPEN.limits, encryption=ENCRYPTED))

        self.run(test())
