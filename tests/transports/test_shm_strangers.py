"""What a peer over shm may say wrongly: each lie is told as such, none is fatal, no descriptor stays open."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest

from zmqtasks.errors import CommBrokenError, RemoteProtocolError
from zmqtasks.protocol.frames import HELLO_LIMITS, MIB
from zmqtasks.testing.comms import DEADLINE_S, Recorder, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, end
from zmqtasks.transports import Comm, LinkSettings, connect
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.channel import GREETING, greet
from zmqtasks.transports.shm.wire import LENT
from zmqtasks.transports.stream import PREAMBLE

ARENA, TAKEN, RETURNED, END = 1, 2, 3, 4


class Liar:
    """A peer by hand: the stream and the channel."""

    def __init__(self, stream: socket.socket, channel: socket.socket) -> None:
        self.stream = stream
        self.channel = channel

    def tell(self, kind: int, value: int, *descriptors: int) -> None:
        packet = struct.pack("<QQ", kind, value)
        if descriptors:
            socket.send_fds(self.channel, [packet], list(descriptors))
        else:
            self.channel.send(packet)

    def offer(self, size: int = MIB) -> None:
        file = native.memory_file("liar", size)
        self.tell(ARENA, size, file)
        os.close(file)

    def lend(self, offset: int, size: int) -> None:
        self.stream.sendall(struct.pack("<IIQQ", 1, 1, LENT | size, offset))


def _unsealed(liar: Liar) -> None:
    file = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, MIB)
    liar.tell(ARENA, MIB, file)
    os.close(file)
    liar.lend(0, MIB)


def _half_sealed(liar: Liar) -> None:
    file = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, MIB)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    liar.tell(ARENA, MIB, file)
    os.close(file)
    liar.lend(0, MIB)


def _no_file(liar: Liar) -> None:
    one, other = os.pipe()
    liar.tell(ARENA, MIB, one)
    os.close(one)
    os.close(other)


def _wrong_size(liar: Liar) -> None:
    file = native.memory_file("liar", MIB)
    liar.tell(ARENA, 2 * MIB, file)
    os.close(file)


def _twice(liar: Liar) -> None:
    liar.offer()
    liar.offer()


def _flood(liar: Liar) -> None:
    file = native.memory_file("liar", MIB)
    liar.tell(ARENA, MIB, *[file] * 50)
    os.close(file)


def _lend(offset: int, size: int) -> Callable[[Liar], None]:
    def lie(liar: Liar) -> None:
        liar.offer()
        liar.lend(offset, size)

    return lie


LIES: dict[str, Callable[[Liar], None]] = {
    "lent without an arena": lambda liar: liar.lend(0, 4096),
    "unsealed": _unsealed,
    "half sealed": _half_sealed,
    "no file": _no_file,
    "wrong size": _wrong_size,
    "two arenas": _twice,
    "flood of descriptors": _flood,
    "descriptor with a return": lambda liar: liar.tell(RETURNED, 0, 0),
    "arena without descriptor": lambda liar: liar.tell(ARENA, MIB),
    "beyond the end": _lend(0, MIB + 1),
    "begins beyond the end": _lend(MIB, 64),
    "far away": _lend((1 << 64) - 64, 64),
    "not aligned": _lend(1, 64),
    "empty": _lend(0, 0),
    "returned what it never had": lambda liar: liar.tell(RETURNED, 7),
    "took what it never had": lambda liar: liar.tell(TAKEN, 1),
    "ended beyond all": lambda liar: liar.tell(END, 1),
    "unknown news": lambda liar: liar.tell(99, 1),
    "short news": lambda liar: liar.channel.send(b"x") and None,
    "long news": lambda liar: liar.channel.send(b"x" * 1000) and None,
}


class TestLies(ConformanceBase):
    scheme = "shm"

    @contextlib.asynccontextmanager
    async def liar(self, settings: LinkSettings = OPEN) -> AsyncIterator[tuple[Liar, Comm]]:
        arrivals: asyncio.Queue[Comm] = asyncio.Queue()
        async with self.listening(arrivals.put_nowait, settings) as listener:
            with socket.socket(socket.AF_UNIX) as stream:
                stream.connect(_kernel_name(listener.address))
                with greet(stream) as channel:
                    stream.sendall(PREAMBLE)
                    comm = await asyncio.wait_for(arrivals.get(), DEADLINE_S)
                    yield Liar(stream, channel), comm
                    await end(comm)

    @pytest.mark.parametrize("lie", LIES)
    def test_lies(self, lie: str) -> None:
        async def test() -> None:
            async with self.liar() as (liar, comm):
                recorder = Recorder(comm)
                LIES[lie](liar)
                error = await recorder.wait_end()
                assert isinstance(error, RemoteProtocolError), repr(error)
                assert not recorder.messages

        self.run(test())

    def test_nothing_is_mapped_before_authentication(self) -> None:
        async def test() -> None:
            async with self.liar(LinkSettings(limits=HELLO_LIMITS)) as (liar, comm):
                recorder = Recorder(comm)
                liar.offer()
                liar.lend(0, 64)
                assert isinstance(await recorder.wait_end(), RemoteProtocolError)

        self.run(test())

    def test_an_honest_stranger_is_understood(self) -> None:
        """The liar's tools tell the truth as well: what the tests above see is the lie."""

        async def test() -> None:
            async with self.liar() as (liar, comm):
                recorder = Recorder(comm)
                liar.offer()
                liar.lend(4096 + 64, 4096)
                await recorder.wait_messages(1)
                assert bytes(recorder.messages[0][0]) == bytes(4096)

        self.run(test())

    @pytest.mark.parametrize(
        "greeting", [b"GET / HTTP/1.1\r\n\r\n", PREAMBLE, GREETING[:-1] + b"\x02", GREETING, b"\xf5"]
    )
    def test_strangers_are_hung_up_on(self, greeting: bytes) -> None:
        """Without a channel there is no link; others are served meanwhile."""

        async def test() -> None:
            arrivals: list[Comm] = []
            async with self.listening(arrivals.append) as listener:
                with socket.socket(socket.AF_UNIX) as stranger, socket.socket(socket.AF_UNIX) as silent:
                    silent.connect(_kernel_name(listener.address))
                    stranger.connect(_kernel_name(listener.address))
                    stranger.sendall(greeting)
                    stranger.setblocking(False)
                    friend = await connect(listener.address, OPEN)
                    await wait_until(lambda: len(arrivals) == 1, "nobody is served")
                    with contextlib.suppress(ConnectionError):
                        said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stranger, 1), DEADLINE_S)
                        assert said == b""
                    await end(friend)
                    await end(arrivals[0])

        self.run(test())

    def test_a_descriptor_that_is_no_channel(self) -> None:
        async def test() -> None:
            arrivals: list[Comm] = []
            async with self.listening(arrivals.append) as listener:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    one, other = socket.socketpair(socket.AF_UNIX, kind)
                    with one, other, socket.socket(socket.AF_UNIX) as stranger:
                        stranger.connect(_kernel_name(listener.address))
                        socket.send_fds(stranger, [GREETING], [one.fileno()])
                        stranger.setblocking(False)
                        with contextlib.suppress(ConnectionError):
                            loop = asyncio.get_running_loop()
                            assert await asyncio.wait_for(loop.sock_recv(stranger, 1), DEADLINE_S) == b""
                assert not arrivals

        self.run(test())

    def test_a_channel_that_is_closed_early(self) -> None:
        """The stream tells of the end; what was lent is back."""

        async def test() -> None:
            async with self.liar() as (liar, comm):
                recorder = Recorder(comm)
                comm.send([b"x" * MIB])
                liar.channel.close()
                liar.stream.close()
                assert isinstance(await recorder.wait_end(), CommBrokenError)

        self.run(test())


def _kernel_name(address: str) -> bytes:
    return b"\0zmqtasks-shm/" + address.removeprefix("shm://").encode()
