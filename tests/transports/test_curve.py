"""CURVE over zmq: who knows a listener's public key and has a key of his own gets nowhere; keys follow from the secret."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
import zmq

from zmqtasks.errors import ConnectError
from zmqtasks.testing.comms import Recorder, memory_bytes
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase, end
from zmqtasks.transports import PLAIN, Comm, Encryption, connect
from zmqtasks.transports.zeromq.control import Hello, encode_control
from zmqtasks.transports.zeromq.curve import curve_keys

SECRET = ENCRYPTED.secret
assert SECRET is not None
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
    ("encryption", "told"), [(PLAIN, "--encryption"), (Encryption(bytes(31) + b"\1", True), "cluster key")]
)
def test_a_handshake_that_fails_is_explained_however_soon_it_fails(encryption: Encryption, told: str) -> None:
    """Libzmq's threads may have given the connection up before the hello is handed to them, once in a hundred times."""
    links = Links()
    settings = dataclasses.replace(OPEN, encryption=encryption)

    async def test() -> None:
        async with links.listening(_nobody) as listener:
            for _ in range(200):
                with pytest.raises(ConnectError, match=told):
                    await connect(listener.address, settings)

    links.run(test())


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
