"""Unix domain sockets: the conformance suite, and what is particular to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zmqtasks.errors import (
    AddressError,
    CommBrokenError,
    ConnectError,
    ConnectTimeoutError,
    RemoteProtocolError,
)
from zmqtasks.testing.comms import DEADLINE_S, Recorder, open_descriptors, wait_until
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, end
from zmqtasks.testing.conformance_endings import EndingTests
from zmqtasks.testing.conformance_flow import FlowTests
from zmqtasks.transports import Comm, LinkSettings, connect, listen, registry
from zmqtasks.transports.stream import PREAMBLE

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


class TestUnix(TransportConformance):
    scheme = "unix"
    frozen_heartbeat_s = 3.0  # a stopped process is not silent as long as its kernel answers


class TestUnixOnPlainAsyncio(FlowTests, EndingTests):
    scheme = "unix"
    loop_factory = staticmethod(asyncio.new_event_loop)


class TestNames(ConformanceBase):
    scheme = "unix"

    def test_a_name_of_ones_own(self) -> None:
        async def test() -> None:
            address = f"unix://Test_{os.getpid()}.a-b"
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            listener = await listen(address, arrivals.put_nowait, OPEN)
            assert listener.address == address
            ours = await connect(address, OPEN)
            theirs = await arrivals.get()
            assert (ours.peer_address, theirs.local_address) == (address, address)
            assert ours.local_address == theirs.peer_address == f"{address}#{os.getpid()}"
            await asyncio.gather(end(ours), end(theirs), listener.close())

        self.run(test())

    def test_random_names_differ(self) -> None:
        async def test() -> None:
            async with self.listening(_drop) as one, self.listening(_drop) as other:
                assert one.address != other.address
                assert len(one.address) >= len("unix://") + 16  # 64 random bits

        self.run(test())

    def test_longest_name(self) -> None:
        async def test() -> None:
            name = f"{os.getpid()}-".ljust(98, "x")
            listener = await listen(f"unix://{name}", _drop, OPEN)
            await end(await connect(listener.address, OPEN))
            await listener.close()
            with pytest.raises(AddressError, match="99 characters, at most 98"):
                await listen(f"unix://{name}x", _drop, OPEN)

        self.run(test())

    @pytest.mark.parametrize("name", ["a b", "a/b", "/tmp/socket", ":0", "a#1", "\u00e4", "a\n", "a\0b"])
    def test_bad_names(self, name: str) -> None:
        async def test() -> None:
            for use in (connect(f"unix://{name}x", OPEN), listen(f"unix://{name}x", _drop, OPEN)):
                with pytest.raises(AddressError, match="no name for a socket"):
                    await use
            with pytest.raises(AddressError, match="names no listener"):
                await connect("unix://", OPEN)

        self.run(test())

    def test_other_platforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "_transports", {})
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(AddressError, match=r"unix:// needs .*Linux.*darwin.*tcp://"):
            registry.get_transport("unix")


class TestSilenceAndNoise(ConformanceBase):
    scheme = "unix"

    @pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", random.Random(7).randbytes(5000), bytes(5000), b""])
    def test_stranger_at_the_listener(self, noise: bytes) -> None:
        """It is hung up on, or leaves by itself; others are served meanwhile."""

        async def test() -> None:
            recorders: list[Recorder] = []
            async with self.listening(lambda comm: recorders.append(Recorder(comm, comm.send))) as listener:
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.bind(b"\0\xff\xfe%d" % os.getpid())  # whatever it calls itself
                    stranger.connect(_kernel_name(listener.address))
                    stranger.sendall(noise)
                    stranger.setblocking(False)
                    friend = await connect(listener.address, OPEN)
                    here = Recorder(friend)
                    friend.send([b"served all the same"])
                    await here.wait_messages(1)
                    await friend.close()
                    loop = asyncio.get_running_loop()
                    assert await loop.sock_recv(stranger, len(PREAMBLE)) == PREAMBLE
                    if noise:
                        with contextlib.suppress(ConnectionError):
                            async with asyncio.timeout(DEADLINE_S):
                                assert await loop.sock_recv(stranger, 1) == b""
                await wait_until(lambda: all(recorder.ends for recorder in recorders), "a comm lives on")
                expected = RemoteProtocolError if noise else CommBrokenError
                assert [type(recorder.ends[0]) for recorder in recorders].count(expected) == 1
                await asyncio.gather(*(recorder.comm.close() for recorder in recorders))

        self.run(test())

    def test_silence(self) -> None:
        """A listener that never answers: an error that names the address, in time; nothing is left, also when
        cancelled."""

        async def test() -> None:
            address = f"unix://silent-{os.getpid()}"
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(_kernel_name(address))
                sock.listen(8)
                with pytest.raises(ConnectTimeoutError, match=address):
                    await connect(address, LinkSettings(connect_timeout_s=0.2))
                before = len(open_descriptors())
                for turns in range(5):
                    connecting = asyncio.create_task(connect(address, OPEN))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    connecting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await connecting
                await wait_until(lambda: len(open_descriptors()) <= before, "a descriptor was left open", 5)

        self.run(test())

    def test_wrong_protocol(self) -> None:
        """Whoever else listens there is told for what it is."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        async def test() -> None:
            address = f"unix://other-{os.getpid()}"
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(_kernel_name(address))
            async with await asyncio.start_unix_server(answer, sock=sock):
                with pytest.raises(ConnectError, match=f"{address} is not a zmqtasks node over unix"):
                    await connect(address, OPEN)

        self.run(test())

    def test_full_backlog_is_waited_for(self) -> None:
        """A listener that is too busy to accept is no reason to fail before the time is over."""

        async def test() -> None:
            address = f"unix://busy-{os.getpid()}"
            with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
                sock.bind(_kernel_name(address))
                sock.listen(0)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        caller = stack.enter_context(socket.socket(socket.AF_UNIX))
                        caller.setblocking(False)
                        caller.connect(_kernel_name(address))
                with pytest.raises(ConnectTimeoutError, match=address):
                    await connect(address, LinkSettings(connect_timeout_s=0.1))
                connecting = asyncio.create_task(connect(address, OPEN))
                await asyncio.sleep(0.02)
                assert not connecting.done()
                sock.setblocking(False)
                while not connecting.done():
                    with contextlib.suppress(BlockingIOError):
                        peer = stack.enter_context(sock.accept()[0])
                        with contextlib.suppress(OSError):
                            peer.sendall(PREAMBLE)
                    await asyncio.sleep(0.001)
                await end(connecting.result())

        self.run(test())


class TestUsers(ConformanceBase):
    scheme = "unix"

    @needs_root
    def test_listener_turns_other_users_away(self, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            arrivals: list[Comm] = []
            async with self.listening(arrivals.append) as listener:
                with _as_nobody(
                    "for number in range(3):\n"
                    "    sock = socket.socket(socket.AF_UNIX); sock.settimeout(20)\n"
                    f"    sock.connect({_kernel_name(listener.address)!r})\n"
                    "    print(sock.recv(10))\n"
                ) as stranger:
                    said = (await asyncio.to_thread(stranger.communicate, timeout=DEADLINE_S))[0]
                assert said.split() == ["b''"] * 3
                assert arrivals == []

        self.run(test())
        told = [record.getMessage() for record in caplog.records if "turned a connection away" in record.getMessage()]
        assert len(told) == 1, "once, however often they come"
        assert f"by user {NOBODY}" in told[0]

    @needs_root
    def test_connector_refuses_a_listener_of_another_user(self) -> None:
        async def test() -> None:
            address = f"unix://squatter-{os.getpid()}"
            with _as_nobody(
                "sock = socket.socket(socket.AF_UNIX)\n"
                f"sock.bind({_kernel_name(address)!r}); sock.listen(); print('listens', flush=True)\n"
                "peer, _ = sock.accept(); peer.settimeout(20); print(peer.recv(100))\n"
            ) as squatter:
                assert squatter.stdout is not None
                assert await asyncio.to_thread(squatter.stdout.readline) == "listens\n"
                with pytest.raises(ConnectError, match=f"{address} is listened at by user {NOBODY}"):
                    await connect(address, OPEN)
                assert await asyncio.to_thread(squatter.stdout.read) == "b''\n", "not a byte is said"

        self.run(test())


@contextlib.contextmanager
def _as_nobody(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process of another user that runs `code`; killed in the end."""
    program = f"import os, socket\nos.setgid({NOBODY}); os.setuid({NOBODY})\n{code}"
    with subprocess.Popen([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _kernel_name(address: str) -> bytes:
    return b"\0zmqtasks/" + address.removeprefix("unix://").encode()


def _drop(comm: Comm) -> None:
    comm.abort("nobody wants it")
