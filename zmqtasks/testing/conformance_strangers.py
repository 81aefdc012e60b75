"""Conformance: what strangers send, or fail to answer, costs nothing and blocks nobody."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import random
import socket
from collections.abc import AsyncIterator

import pytest

from zmqtasks.errors import (
    AddressError,
    CommBrokenError,
    CommError,
    ConnectError,
    ConnectTimeoutError,
    LimitExceededError,
    RemoteProtocolError,
)
from zmqtasks.protocol.frames import HELLO_LIMITS, MIB, Frames
from zmqtasks.testing.comms import DEADLINE_S, Recorder, memory_bytes, open_descriptors, reset_peak_memory, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, PeerProcess
from zmqtasks.transports import Comm, LinkSettings, connect, known_schemes
from zmqtasks.transports.address import HostPort, parse_host_port

_IMPATIENT = LinkSettings(connect_timeout_s=0.5)
_FLOOD_BYTES = 512 * MIB
_FLOOD_COST_BYTES = 64 * MIB

_STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": bytes.fromhex("16030101fd01") + bytes(507) + b"\xfc",
    "ssh": b"SSH-2.0-OpenSSH_9.7\r\n",
    "noise": random.Random(7).randbytes(5000),
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "newline": b"\n",
    "nothing": b"",
}


class DeclarationTests(ConformanceBase):
    """Declarations are true where a test can tell."""

    def test_declarations_agree(self) -> None:
        """What one capability implies for another."""
        declared = self.transport.capabilities
        assert self.transport.scheme == self.scheme
        assert self.scheme in known_schemes()
        assert declared.crosses_processes or not declared.crosses_hosts
        assert declared.crosses_hosts or not declared.uses_ip
        assert declared.untrusted_peers or not declared.uses_ip, "anybody can reach a port"

    def test_declared_reach(self) -> None:
        """Another process can connect if, and only if, the transport says that it crosses processes."""

        async def test() -> None:
            async with (
                self.listening(_serve) as listener,
                PeerProcess("close", listener.address, self.encrypting(OPEN)) as peer,
            ):
                words = await peer.last_words()
                refused = "ConnectionRefused" in words or "ConnectError" in words
                assert refused != self.transport.capabilities.crosses_processes, words

        self.run(test())

    def test_declared_addresses(self) -> None:
        """Addresses have host and port if, and only if, the transport says that it uses IP."""

        async def test() -> None:
            async with self.listening(_serve) as listener:
                if self.transport.capabilities.uses_ip:
                    assert parse_host_port(listener.address).port > 0
                else:
                    with pytest.raises(AddressError):
                        parse_host_port(listener.address)

        self.run(test())


class LimitTests(ConformanceBase):
    """Before authentication a comm takes a hello and nothing else."""

    @pytest.mark.parametrize(
        "frames",
        [
            [b"x" * (HELLO_LIMITS.frame_bytes + 1)],
            [b"x"] * (HELLO_LIMITS.frames + 1),
            [b"x" * HELLO_LIMITS.frame_bytes] * 3,
            [b""] * 100_000,
        ],
        ids=["frame", "frames", "message", "empty-frames"],
    )
    def test_limits_of_a_new_comm(self, frames: Frames) -> None:
        """A message within the limits passes; one beyond them ends the comm, and is not delivered."""
        within = [b"x" * HELLO_LIMITS.frame_bytes] * 2

        async def test() -> None:
            async with self.link(OPEN, LinkSettings(limits=HELLO_LIMITS)) as (ours, theirs):
                there, here = Recorder(theirs), Recorder(ours)
                ours.send(within)
                ours.send(frames)
                error = await there.wait_end()
                assert isinstance(error, LimitExceededError), repr(error)
                assert there.contents() == [within]
                assert isinstance(await here.wait_end(), CommError)

        self.run(test())

    def test_flood_before_authentication_takes_no_memory(self) -> None:
        """A peer that sends half a GiB in place of a hello is dropped; neither side's memory grows with it."""
        self.needs(untrusted_peers=True)
        # Pages of zeros that are never written take no memory in the sender either.
        flood = memoryview(mmap.mmap(-1, _FLOOD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)).toreadonly()

        async def test() -> None:
            async with self.link(OPEN, LinkSettings(limits=HELLO_LIMITS)) as (ours, theirs):
                there = Recorder(theirs)
                reset_peak_memory()
                before = memory_bytes(field="VmHWM")
                ours.send([flood])
                assert isinstance(await there.wait_end(), LimitExceededError)
                grown = memory_bytes(field="VmHWM") - before
                assert grown < _FLOOD_COST_BYTES, f"a stranger's message took {grown >> 20} MiB"

        self.run(test())


class StrangerTests(ConformanceBase):
    """Ports that answer wrongly, and callers that speak something else."""

    @pytest.mark.parametrize("greeting", _STRANGERS)
    def test_stranger_at_the_listener(self, greeting: str) -> None:
        """The stranger is hung up on, the node is not bothered with messages, and others are served meanwhile."""
        self.needs(uses_ip=True)

        async def test() -> None:
            recorders: list[Recorder] = []
            async with self.listening(lambda comm: recorders.append(Recorder(comm, comm.send))) as listener:
                where = parse_host_port(listener.address)
                reader, writer = await asyncio.open_connection(where.host, where.port)
                writer.write(_STRANGERS[greeting])
                friend = await connect(listener.address, self.encrypting(OPEN))
                here = Recorder(friend)
                friend.send([b"served all the same"])
                await here.wait_messages(1)
                await friend.close()
                if _STRANGERS[greeting] in (b"", b"\n"):
                    writer.close()  # silence is not a fault: the stranger leaves by itself
                with contextlib.suppress(ConnectionError):
                    async with asyncio.timeout(self.stranger_timeout_s):
                        await reader.read()
                writer.close()
                await wait_until(
                    lambda: all(recorder.ends for recorder in recorders), "a comm with a stranger lives on"
                )
                for recorder in recorders:
                    stranger = isinstance(recorder.ends[0], RemoteProtocolError | CommBrokenError)
                    assert stranger or recorder.contents() == [[b"served all the same"]]
                    if isinstance(recorder.ends[0], RemoteProtocolError):
                        assert repr(_STRANGERS[greeting][:4])[2:-1] in str(recorder.ends[0])
                    await recorder.comm.close()

        self.run(test())

    def test_wrong_protocol_at_the_port(self) -> None:
        """Connecting to a web server fails in time, and the error names the address."""
        self.needs(uses_ip=True)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        async def test() -> None:
            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            async with server:
                address = str(HostPort(self.scheme, "127.0.0.1", server.sockets[0].getsockname()[1]))
                async with asyncio.timeout(DEADLINE_S):
                    with pytest.raises(ConnectError) as caught:
                        await connect(address, self.encrypting(LinkSettings(connect_timeout_s=3)))
                assert address in str(caught.value)

        self.run(test())

    def test_connect_timeout(self) -> None:
        """A port that never answers: an error that names address and time, after that time."""
        self.needs(uses_ip=True)

        async def test() -> None:
            async with self.silent_address() as address:
                loop = asyncio.get_running_loop()
                begin = loop.time()
                with pytest.raises(ConnectTimeoutError) as caught:
                    await connect(address, self.encrypting(_IMPATIENT))
                assert 0.4 < loop.time() - begin < 5
                assert address in str(caught.value)

        self.run(test())

    def test_cancelled_connect_leaves_nothing(self) -> None:
        """A connect that is cancelled half-way has closed what it had opened."""
        self.needs(uses_ip=True)

        async def test() -> None:
            async with self.silent_address() as address:
                before: list[int] = []
                for delay_s in (1.0, 0.0, 0.0, 0.01, 0.02):
                    connecting = asyncio.create_task(connect(address, self.encrypting(OPEN)))
                    await asyncio.sleep(delay_s)
                    connecting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await connecting
                    if not before:  # what a library sets up once is set up now
                        await asyncio.sleep(0.1)
                        before.append(len(open_descriptors()))
                await wait_until(
                    lambda: len(open_descriptors()) <= before[0], "a cancelled connect left a descriptor open", 5
                )

        self.run(test())

    @pytest.mark.parametrize("rest", ["127.0.0.1", "127.0.0.1:port", "127.0.0.1:99999", "::1:80", "[::1:80", "a b:1"])
    def test_bad_addresses(self, rest: str) -> None:
        """What is no address is told as such, with the text."""
        self.needs(uses_ip=True)
        address = f"{self.scheme}://{rest}"

        async def test() -> None:
            with pytest.raises(AddressError, match=r"127|::1|a b"):
                await connect(address, self.encrypting(_IMPATIENT))

        self.run(test())

    def test_foreign_address(self) -> None:
        """Listening at an address of another machine fails with an error that names it."""
        self.needs(uses_ip=True)

        async def test() -> None:
            with pytest.raises(ConnectError, match=r"192\.0\.2\.77"):
                async with self.listening(_serve, host="192.0.2.77"):
                    pass

        self.run(test())

    @contextlib.asynccontextmanager
    async def silent_address(self) -> AsyncIterator[str]:
        """An address at which connections are made, by the kernel, and nobody ever says a word."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(64)
            yield str(HostPort(self.scheme, "127.0.0.1", sock.getsockname()[1]))


def _serve(comm: Comm) -> None:
    Recorder(comm, comm.send)
