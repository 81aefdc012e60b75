"""What raw ZeroMQ and raw TCP callers can do to a zmq listener, and other ZeroMQ programs to a zmq caller."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import socket
import struct
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import pytest
import uvloop
import zmq

from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    LimitExceededError,
    ProtocolError,
    RemoteProtocolError,
)
from zmqtasks.protocol.frames import DATA_LIMITS, HELLO_LIMITS, MIB
from zmqtasks.testing.comms import Recorder, memory_bytes, reset_peak_memory, wait_until
from zmqtasks.testing.conformance_base import end
from zmqtasks.transports import Comm, LinkSettings, Listener, connect, listen
from zmqtasks.transports.address import parse_host_port
from zmqtasks.transports.zeromq.control import (
    PART_BYTES,
    Abort,
    Accept,
    Control,
    Credit,
    Fin,
    FinAck,
    Hello,
    Refuse,
    decode_control_untrusted,
    encode_control,
)
from zmqtasks.transports.zeromq.router import RouterComm

OPEN = LinkSettings(limits=DATA_LIMITS)
NARROW = LinkSettings(limits=HELLO_LIMITS)
SESSION = bytes(16)
FLOOD_BYTES = 256 * MIB
FLOOD_COST_BYTES = 64 * MIB

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY_BODY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MORE, LONG = 1, 2


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


class Strangers:
    """Raw ZeroMQ sockets in a context of their own."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A raw socket that never connects again.

        It lingers: without, libzmq 4.3.5 aborts its process when a connection breaks between two parts of a message.
        """
        made = self._context.socket(kind)
        self._sockets.append(made)
        made.set(zmq.LINGER, 1000)
        made.set(zmq.SNDHWM, 0)
        made.set(zmq.RECONNECT_IVL, -1)
        return made

    def close(self) -> None:
        """Closes all of them."""
        for sock in self._sockets:
            sock.close()
        self._context.term()


@pytest.fixture
def strangers() -> Iterator[Strangers]:
    made = Strangers()
    yield made
    made.close()


class Node:
    """A listener that echoes, and whose comms are kept."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self.listener: Listener

    @property
    def url(self) -> str:
        return self.listener.address.replace("zmq://", "tcp://")

    @property
    def where(self) -> tuple[str, int]:
        parsed = parse_host_port(self.listener.address)
        return parsed.host, parsed.port

    def take(self, comm: Comm) -> None:
        self.recorders.append(Recorder(comm, comm.send))

    async def assert_serves(self) -> None:
        friend = await connect(self.listener.address, OPEN)
        here = Recorder(friend)
        friend.send([b"friend"])
        await here.wait_messages(1)
        await friend.close()


@contextlib.asynccontextmanager
async def node(settings: LinkSettings = NARROW) -> AsyncIterator[Node]:
    """A node that listens, and ends all its comms in the end."""
    made = Node()
    made.listener = await listen("zmq://127.0.0.1:0", made.take, settings)
    try:
        yield made
    finally:
        for recorder in made.recorders:
            await end(recorder.comm)
        await made.listener.close()


async def receive(sock: zmq.Socket[bytes]) -> list[bytes]:
    """The next message of a raw socket, without blocking the loop."""
    await wait_until(lambda: bool(sock.poll(0)), "the raw socket got nothing")
    return sock.recv_multipart()


async def receive_control(sock: zmq.Socket[bytes]) -> Control:
    empty, data = await receive(sock)
    assert empty == b""
    return decode_control_untrusted(data)


async def greet(strangers: Strangers, url: str) -> tuple[zmq.Socket[bytes], Accept]:
    """A raw DEALER with an open session, and what the listener answered."""
    dealer = strangers.socket(zmq.DEALER)
    dealer.connect(url)
    dealer.send_multipart([b"", encode_control(Hello(SESSION, 64))])
    answer = await receive_control(dealer)
    assert isinstance(answer, Accept)
    assert answer.session == SESSION
    return dealer, answer


async def shake_hands(
    where: tuple[str, int], identity: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw TCP connection after the ZMTP handshake."""
    body = READY_BODY + b"\x08Identity" + struct.pack(">I", len(identity)) + identity
    reader, writer = await asyncio.open_connection(*where)
    writer.write(GREETING)
    assert len(await reader.readexactly(64)) == 64
    writer.write(b"\x04" + bytes([len(body)]) + body)
    _flags, size = await reader.readexactly(2)
    assert b"READY" in await reader.readexactly(size)
    return reader, writer


def random_message(rng: random.Random) -> list[bytes]:
    """Anything that ZeroMQ can carry, often close to what the protocol allows."""
    controls: list[Control] = [
        Hello(SESSION, 1),
        Accept(SESSION, 1),
        Refuse("no"),
        Credit(1 << 40, 0),
        Fin(),
        FinAck(),
        Abort("so"),
    ]
    parts: list[bytes] = []
    for _ in range(rng.choice([1, 1, 2, 2, 3, 9])):
        kind = rng.randrange(4)
        if kind == 0:
            parts.append(b"")
        elif kind == 1:
            parts.append(rng.randbytes(rng.choice([1, 8, 20, 700, 70_000])))
        else:
            parts.append(encode_control(rng.choice(controls)))
        if kind == 3:
            parts[-1] = parts[-1][: rng.randrange(40)]
    return parts


def test_random_messages_from_raw_dealers(strangers: Strangers) -> None:
    """Without a session they make no comm, with one they end it; the node serves on."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)

    async def test() -> None:
        async with node() as made:
            for number in range(200):
                dealer = strangers.socket(zmq.DEALER)
                dealer.connect(made.url)
                if number % 2:
                    dealer.send_multipart([b"", encode_control(Hello(SESSION, rng.choice([0, 1, 1 << 31])))])
                    await receive_control(dealer)
                for _ in range(rng.randrange(20)):
                    dealer.send_multipart(random_message(rng))
                if number % 20 == 0:
                    await made.assert_serves()
                dealer.close()
            await made.assert_serves()
            await wait_until(lambda: all(recorder.ends for recorder in made.recorders), "a stranger's comm lives on")
            for recorder in made.recorders:
                assert isinstance(recorder.ends[0], CommError | ProtocolError)
                assert not recorder.violations

    run(test())


def test_random_bytes_over_tcp() -> None:
    """Bytes after the ZMTP handshake, and in place of it."""
    rng = random.Random(11)

    async def test() -> None:
        async with node() as made:
            for number in range(200):
                if number % 2:
                    _reader, writer = await shake_hands(made.where)
                else:
                    _reader, writer = await asyncio.open_connection(*made.where)
                writer.write(rng.randbytes(rng.choice([1, 12, 64, 200, 3000])))
                writer.close()
            await made.assert_serves()
            await wait_until(lambda: all(recorder.ends for recorder in made.recorders), "a stranger's comm lives on")

    run(test())


@pytest.mark.parametrize("greeted", [False, True], ids=["stranger", "unauthenticated"])
def test_message_without_end(greeted: bool) -> None:
    """ZeroMQ shows a message of many parts when it is complete: one that never is must not fill the memory."""
    hello = encode_control(Hello(SESSION, 64))
    part = bytes([MORE | LONG]) + struct.pack(">Q", PART_BYTES) + bytes(PART_BYTES)

    async def test() -> None:
        async with node() as made:
            reader, writer = await shake_hands(made.where)
            if greeted:
                writer.write(bytes([MORE, 0]) + bytes([0, len(hello)]) + hello)
                await wait_until(lambda: bool(made.recorders), "no comm came of the hello")
            reset_peak_memory()
            before = memory_bytes(field="VmHWM")
            with contextlib.suppress(ConnectionError):
                for _ in range(FLOOD_BYTES // PART_BYTES):
                    writer.write(part)
                    await writer.drain()
                await reader.read()
            grown = memory_bytes(field="VmHWM") - before
            assert grown < FLOOD_COST_BYTES, f"a message without end took {grown >> 20} MiB"
            writer.close()
            await made.assert_serves()

    run(test())


def test_routing_ids_cannot_be_foretold() -> None:
    """A routing id that was claimed by a caller, and that ZeroMQ then makes itself, would abort the process."""
    libc = ctypes.CDLL(None)

    async def test() -> None:
        found = set()
        for _ in range(3):
            libc.srand(1)  # as every process begins
            async with node() as made:
                await made.assert_serves()
                comm = made.recorders[0].comm
                assert isinstance(comm, RouterComm)
                found.add(comm.routing_id)
        assert len(found) == 3

    run(test())


def test_claimed_routing_id() -> None:
    """A caller that names itself is nobody special; the second of that name is ignored."""
    hello = encode_control(Hello(SESSION, 64))

    async def test() -> None:
        async with node(LinkSettings(connect_timeout_s=1.0)) as made:
            for number in range(2):
                reader, writer = await shake_hands(made.where, b"me")
                writer.write(bytes([MORE, 0]) + bytes([0, len(hello)]) + hello)
                if number == 0:
                    await wait_until(lambda: len(made.recorders) == 1, "no comm came of the hello")
                    first = writer
                else:
                    with contextlib.suppress(ConnectionError):
                        await reader.read()  # until hung up on
                    writer.close()
            await made.assert_serves()
            assert [recorder.comm.ended is None for recorder in made.recorders] == [True, False]
            first.close()
            assert isinstance(await made.recorders[0].wait_end(), CommBrokenError)

    run(test())


def test_huge_frame_is_not_allocated() -> None:
    """A length over what a part may have ends the connection before memory is taken."""

    async def test() -> None:
        async with node() as made:
            for size in (PART_BYTES + 4096, 1 << 40, (1 << 63) - 1):
                reader, writer = await shake_hands(made.where)
                writer.write(bytes([LONG]) + struct.pack(">Q", size) + bytes(1000))
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() is not None
                writer.close()
            await made.assert_serves()

    run(test())


def test_callers_without_hello_are_hung_up_on() -> None:
    """300 callers that say nothing after the handshake are gone some seconds later; others are served meanwhile."""

    async def test() -> None:
        async with node(LinkSettings(limits=HELLO_LIMITS, connect_timeout_s=1.0)) as made:
            callers = [await shake_hands(made.where) for _ in range(300)]
            await made.assert_serves()
            for reader, writer in callers:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                writer.close()
            assert len(made.recorders) == 1

    run(test())


def test_more_than_the_window(strangers: Strangers) -> None:
    """A caller that sends without credit is cut off, also when the comm is paused."""

    async def test() -> None:
        async with node() as made:
            dealer, answer = await greet(strangers, made.url)
            made.recorders[0].comm.pause_receiving()
            for _ in range(answer.window + 1):
                dealer.send(b"x")
            error = await made.recorders[0].wait_end()
            assert isinstance(error, LimitExceededError)
            assert "credit" in str(error)
            abort = await receive_control(dealer)
            assert isinstance(abort, Abort)
            assert "credit" in abort.reason

    run(test())


@pytest.mark.parametrize(
    "message",
    [
        [b"", encode_control(Credit(5, 64))],
        [b"", encode_control(FinAck())],
        [b"", encode_control(Hello(SESSION, 64))],
        [b"", b"nonsense"],
        [b"", b""],
        [b"not empty", encode_control(Fin())],
        [b"", encode_control(Fin()), b""],
        [b"no message at all"],
    ],
)
def test_wrong_messages_end_the_comm(message: list[bytes], strangers: Strangers) -> None:
    async def test() -> None:
        async with node() as made:
            dealer, _answer = await greet(strangers, made.url)
            dealer.send_multipart(message)
            assert isinstance(await made.recorders[0].wait_end(), RemoteProtocolError)
            assert isinstance(await receive_control(dealer), Abort)

    run(test())


def test_other_version(strangers: Strangers) -> None:
    """Both sides name both versions."""

    async def test() -> None:
        async with node() as made:
            dealer = strangers.socket(zmq.DEALER)
            dealer.connect(made.url)
            dealer.send_multipart([b"", encode_control(Hello(SESSION, 64, 99))])
            answer = await receive_control(dealer)
            assert isinstance(answer, Refuse)
            assert "version 99" in answer.reason
            assert "version 1" in answer.reason
            assert not made.recorders
        router = strangers.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        connecting = asyncio.ensure_future(connect(f"zmq://127.0.0.1:{port}", OPEN))
        routing_id, _empty, hello = await receive(router)
        asked = decode_control_untrusted(hello)
        assert isinstance(asked, Hello)
        router.send_multipart([routing_id, b"", encode_control(Accept(asked.session, 64, 99))])
        with pytest.raises(ConnectError, match="version 99"):
            await connecting

    run(test())


def test_answer_for_another_session(strangers: Strangers) -> None:
    async def test() -> None:
        router = strangers.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        connecting = asyncio.ensure_future(connect(f"zmq://127.0.0.1:{port}", OPEN))
        routing_id, *_rest = await receive(router)
        router.send_multipart([routing_id, b"", encode_control(Accept(SESSION, 64))])
        with pytest.raises(ConnectError, match="another session"):
            await connecting

    run(test())


@pytest.mark.parametrize(
    ("kind", "expected"), [(zmq.ROUTER, ConnectTimeoutError), (zmq.REP, ConnectTimeoutError), (zmq.PUB, ConnectError)]
)
def test_other_zeromq_programs(kind: int, expected: type, strangers: Strangers) -> None:
    """A port of another ZeroMQ program is told in time."""

    async def test() -> None:
        port = strangers.socket(kind).bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(expected, match=str(port)):
            await connect(f"zmq://127.0.0.1:{port}", LinkSettings(connect_timeout_s=0.5))

    run(test())


def test_closed_listener_with_living_comms() -> None:
    """Newcomers are refused, the comm lives on, and the same address can be listened at again."""

    async def test() -> None:
        async with node(OPEN) as first:
            address = first.listener.address
            ours = await connect(address, OPEN)
            here = Recorder(ours)
            await first.listener.close()
            with pytest.raises(ConnectionRefusedByPeerError, match="closed"):
                await connect(address, OPEN)
            ours.send([b"still here"])
            await here.wait_messages(1)
            second = Node()
            second.listener = await listen(address, second.take, OPEN)
            assert second.listener.address == address
            await second.assert_serves()
            await second.listener.close()
            with pytest.raises(ConnectionRefusedByPeerError):
                await connect(address, OPEN)
            await ours.close()
            await first.recorders[0].wait_end()
            host, port = first.where

            def free() -> bool:
                with socket.socket() as sock:
                    return sock.connect_ex((host, port)) != 0

            await wait_until(free, "the address was not freed with the last comm")

    run(test())


def test_stalled_peer_delays_nobody() -> None:
    """64 MiB for a comm that is paused at the other side do not hold up its neighbours at the same listener."""

    async def test() -> None:
        async with node(OPEN) as made:
            stalled = await connect(made.listener.address, OPEN)
            Recorder(stalled).comm.pause_receiving()
            quick = await connect(made.listener.address, OPEN)
            here = Recorder(quick)
            await wait_until(lambda: len(made.recorders) == 2, "the comms did not arrive")
            for _ in range(64):
                made.recorders[0].comm.send([bytes(MIB)])
            assert made.recorders[0].comm.queued_bytes >= 40 * MIB
            for number in range(100):
                quick.send([b"%d" % number])
                await here.wait_messages(number + 1, 2.0)
            stalled.abort()
            assert isinstance(await made.recorders[0].wait_end(), CommBrokenError)
            await quick.close()
            error = await made.recorders[1].wait_end()
            assert isinstance(error, CommClosedError)

    run(test())
