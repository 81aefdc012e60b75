"""CURVE over zmq: who knows a listener's public key and has a key of his own gets nowhere; keys follow from the secret."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import zmq

from zmqtasks.errors import ConnectError
from zmqtasks.testing.comms import Recorder, memory_bytes
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase, PeerProcess, end
from zmqtasks.transports import PLAIN, Comm, Encryption, connect, listen
from zmqtasks.transports.address import parse_host_port
from zmqtasks.transports.zeromq.control import Hello, encode_control
from zmqtasks.transports.zeromq.curve import curve_keys

SECRET = ENCRYPTED.secret
assert SECRET is not None
OTHER_KEY = Encryption(bytes(31) + b"\1", same_host=True)
MIB = 1 << 20


def knows_the_listener(sock: zmq.Socket[bytes]) -> None:
    """He has the listener's public key, and keys of his own."""
    public, secret = zmq.curve_keypair()
    sock.set(zmq.CURVE_SERVERKEY, curve_keys(SECRET).listener_public)
    sock.set(zmq.CURVE_PUBLICKEY, public)
    sock.set(zmq.CURVE_SECRETKEY, secret)


def pretends_to_be_a_caller(sock: zmq.Socket[bytes]) -> None:
    """He knows both public keys, but not the secret one of callers."""
    knows_the_listener(sock)
    sock.set(zmq.CURVE_PUBLICKEY, curve_keys(SECRET).caller_public)


def speaks_in_plain(sock: zmq.Socket[bytes]) -> None:
    """He does not encrypt at all."""


class Links(ConformanceBase):
    scheme = "zmq"
    encryption = ENCRYPTED


@pytest.mark.parametrize("stranger", [knows_the_listener, pretends_to_be_a_caller, speaks_in_plain])
def test_strangers_are_kept_out_before_a_word(stranger: Callable[[zmq.Socket[bytes]], None]) -> None:
    links = Links()

    async def test() -> None:
        arrivals: asyncio.Queue[Comm] = asyncio.Queue()
        async with links.listening(arrivals.put_nowait) as listener:
            before = memory_bytes()
            address = listener.address.replace("zmq://", "tcp://")
            # in a process of his own: what he has ready takes memory too
            call = await asyncio.create_subprocess_exec(
                sys.executable, __file__, address, stranger.__name__, stdout=subprocess.PIPE
            )
            told, _ = await call.communicate()
            assert (call.returncode, told) == (0, b"%d\n" % zmq.EVENT_DISCONNECTED)
            assert arrivals.empty()
            assert memory_bytes() - before < 16 * MIB
            friend = await connect(listener.address, links.encrypting(OPEN))
            theirs = await arrivals.get()
            assert friend.encrypted
            assert theirs.encrypted
            friend.send([b"still here"])
            await Recorder(theirs).wait_messages(1)
            await end(friend)
            await end(theirs)

    links.run(test())


def _call(address: str, stranger: Callable[[zmq.Socket[bytes]], None]) -> int:
    """How the handshake of a stranger ended, who has a hello and a flood of data ready."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.set(zmq.LINGER, 0)
        sock.set(zmq.RECONNECT_IVL, -1)
        stranger(sock)
        with sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED) as monitor:
            sock.connect(address)
            with contextlib.suppress(zmq.Again):  # he may have been hung up on by now
                sock.send_multipart([b"", encode_control(Hello(bytes(16), 64))], zmq.DONTWAIT)
                for _ in range(64):
                    sock.send(bytes(MIB), zmq.DONTWAIT)
            assert monitor.poll(10_000), "the handshake has no end"
            event: int = struct.unpack("=Hi", monitor.recv_multipart()[0])[0]
            sock.disable_monitor()
    return event


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (PLAIN, ENCRYPTED, "takes encrypted links only, and this side does not encrypt: --encryption must be the same"),
        (ENCRYPTED, PLAIN, "does not encrypt this link, and this side does: --encryption must be the same"),
        (OTHER_KEY, ENCRYPTED, "does not have this side's cluster key"),
    ],
)
@pytest.mark.parametrize("where", ["here", "other process"])
def test_a_handshake_that_fails_is_explained_however_soon_it_fails(
    ours: Encryption, theirs: Encryption, told: str, where: str
) -> None:
    """Libzmq's threads may have given the connection up before the hello is handed to them, once in a hundred times."""
    links = Links()
    settings = dataclasses.replace(OPEN, encryption=ours)
    theirs_settings = dataclasses.replace(OPEN, encryption=theirs)

    async def refused(address: str) -> None:
        for _ in range(100):
            with pytest.raises(ConnectError, match=told):
                await connect(address, settings)

    async def test() -> None:
        if where == "here":
            listener = await listen("zmq://127.0.0.1", _nobody, theirs_settings)
            await refused(listener.address)
            await listener.close()
        else:
            async with PeerProcess("listen-echo", "zmq://127.0.0.1", theirs_settings) as peer:
                await refused(await peer.first_line())

    links.run(test())


def test_a_loopback_listener_of_another_process_that_encrypts() -> None:
    """Who has the key encrypts as well, though it would not have to."""
    links = Links()
    settings = dataclasses.replace(OPEN, encryption=Encryption(SECRET, same_host=False))

    async def test() -> None:
        for _ in range(5):
            async with PeerProcess("listen-echo", "zmq://127.0.0.1", links.encrypting(OPEN)) as peer:
                comm = await connect(await peer.first_line(), settings)
                assert comm.encrypted
                await end(comm)

    links.run(test())


@pytest.mark.parametrize(
    ("ours", "theirs", "cuts", "told"),
    [
        (
            PLAIN,
            ENCRYPTED,
            1,
            "takes encrypted links only, and this side does not encrypt: --encryption must be the same",
        ),
        (PLAIN, ENCRYPTED, 9, "hung up: is a zmqtasks node over zmq there"),
        (ENCRYPTED, PLAIN, 1, "does not encrypt this link, and this side does: --encryption must be the same"),
        (ENCRYPTED, PLAIN, 9, "hung up: is a zmqtasks node over zmq there"),
        (OTHER_KEY, ENCRYPTED, 1, "does not have this side's cluster key"),
        (Encryption(SECRET, same_host=False), ENCRYPTED, 1, ""),
    ],
)
def test_a_handshake_cut_before_the_reason_is_heard(ours: Encryption, theirs: Encryption, cuts: int, told: str) -> None:
    """Libzmq's listeners close at times before the half of the greeting is out that has the mechanism."""
    links = Links()

    async def test() -> None:
        arrivals: asyncio.Queue[Comm] = asyncio.Queue()
        theirs_settings = dataclasses.replace(OPEN, encryption=theirs)
        listener = await listen("zmq://127.0.0.1", arrivals.put_nowait, theirs_settings)
        try:
            async with _cutting(cuts, listener.address) as address:
                settings = dataclasses.replace(OPEN, encryption=ours)
                if told:
                    with pytest.raises(ConnectError, match=told):
                        await connect(address, settings)
                    assert arrivals.empty()
                else:
                    comm = await connect(address, settings)
                    assert comm.encrypted
                    await end(comm)
                    await end(await arrivals.get())
        finally:
            await listener.close()

    links.run(test())


@contextlib.asynccontextmanager
async def _cutting(cuts: int, address: str) -> AsyncIterator[str]:
    """The address of a relay to `address` that cuts its first connections off in the midst of ZMTP's greeting."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    target = ("127.0.0.1", parse_host_port(address).port)

    async def relay(caller: socket.socket) -> None:
        with caller, socket.create_connection(target) as callee:
            callee.setblocking(False)
            await asyncio.gather(_pump(caller, callee), _pump(callee, caller))

    async def serve() -> None:
        async with asyncio.TaskGroup() as relays:
            for number in itertools.count():
                caller, _ = await loop.sock_accept(listener)
                if number >= cuts:
                    relays.create_task(relay(caller))
                    continue
                with caller:
                    await loop.sock_sendall(caller, b"\xff" + bytes(8) + b"\x7f\x03")
                    await loop.sock_recv(caller, 64)

    serving = asyncio.create_task(serve())
    with listener:
        yield f"zmq://127.0.0.1:{listener.getsockname()[1]}"
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Moves all that comes, and the end: not by streams, which drop what came before a reset."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(source, MIB):
            await loop.sock_sendall(target, data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _nobody(comm: Comm) -> None:
    raise AssertionError(f"a stranger became a comm: {comm.peer_address}")


def test_keys_follow_from_the_secret_and_serve_one_purpose() -> None:
    keys, again, others = curve_keys(SECRET), curve_keys(bytes(SECRET)), curve_keys(bytes(31) + b"\1")
    assert keys == again
    every = {getattr(k, n) for k in (keys, others) for n in ("listener_public", "caller_public")}
    every |= {getattr(k, n) for k in (keys, others) for n in ("listener_secret", "caller_secret")}
    assert len(every) == 8
    assert keys.listener_secret.decode() not in repr(keys)
    assert keys.caller_secret.decode() not in repr(keys)


if __name__ == "__main__":
    print(_call(sys.argv[1], globals()[sys.argv[2]]))
