"""TLS of tcp links: the identity, and strangers who speak TLS themselves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.links import run
from tests.recording_proxy import recording_proxy
from zmqtasks.errors import CommBrokenError, PeerIdentityError
from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, memory_bytes, open_descriptors, wait_until
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, end
from zmqtasks.transports import Comm, LinkSettings, connect, listen, stream_transport
from zmqtasks.transports import tls_identity as tls
from zmqtasks.transports.address import parse_host_port

SECRET = b"a secret that two nodes share..."
SETTINGS = dataclasses.replace(OPEN, encryption=ENCRYPTED)


def settings(**changes: Any) -> LinkSettings:
    return dataclasses.replace(SETTINGS, **changes)


def nobody(comm: Comm) -> None:
    raise AssertionError(f"a stranger became a comm: {comm.peer_address}")


async def hung_up_on(reader: asyncio.StreamReader, timeout_s: float = 5.0) -> bytes:
    """What the listener says until it hangs up."""
    async with asyncio.timeout(timeout_s):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def stranger_context(certificate: bytes | None = None, folder: Path | None = None) -> ssl.SSLContext:
    """Of a stranger who accepts anybody; with `certificate`, it presents one that says the same, with a key of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None and folder is not None:
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        seen = x509.load_der_x509_certificate(certificate)
        key = Ed25519PrivateKey.generate()
        made = x509.CertificateBuilder(seen.issuer, seen.subject, key.public_key(), seen.serial_number)
        made = made.not_valid_before(datetime.datetime(1950, 1, 1)).not_valid_after(datetime.datetime(9999, 12, 31))
        (folder / "pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + made.sign(key, None).public_bytes(Encoding.PEM)
        )
        context.load_cert_chain(folder / "pem")
    return context


def test_identity_follows_from_the_secret_alone() -> None:
    first, second = tls.tls_identity(SECRET), tls.tls_identity.__wrapped__(SECRET)
    assert first.certificate == second.certificate == tls.certificate_of(SECRET)
    assert tls.certificate_of(SECRET[::-1]) != first.certificate
    assert SECRET not in first.certificate
    for shown in (repr(first), repr(ENCRYPTED)):
        assert "context" not in shown.lower()
        assert repr(ENCRYPTED.secret)[2:-1] not in shown


def test_no_descriptor_and_no_file_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no /proc: the key passes through a file that is gone, and was of no use without a password."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for where in ("/proc/self/fd", "/nowhere"):
        monkeypatch.setattr("os.path.isdir", lambda path, where=where: path == where)
        before = open_descriptors()
        tls.tls_identity.__wrapped__(SECRET)
        assert open_descriptors() == before
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["no certificate", "a certificate of its own", "TLS 1.2"])
def test_a_stranger_that_speaks_tls(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It gets the listener's certificate, as everybody does, and nothing else."""
    presented = tls.certificate_of(ENCRYPTED.secret) if kind.startswith("a cert") else None
    context = stranger_context(presented, tmp_path)
    if kind == "TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    async def test() -> None:
        listener = await listen("tcp://127.0.0.1:0", nobody, SETTINGS)
        where = parse_host_port(listener.address)
        if kind == "TLS 1.2":
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection(where.host, where.port, ssl=context)
        else:
            reader, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
            seen = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            assert seen == tls.certificate_of(ENCRYPTED.secret)
            with contextlib.suppress(OSError):
                writer.write(b"\xf5ztasks\x01 let me in")
                assert not await hung_up_on(reader)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await wait_until(lambda: "turned a connection away" in caplog.text, "the listener says nothing of it")
        await listener.close()

    run(test())
    assert kind == "TLS 1.2" or "cluster key" in caplog.text


def test_no_session_is_resumed() -> None:
    async def test() -> None:
        comms: list[Comm] = []
        listener = await listen("tcp://127.0.0.1:0", comms.append, SETTINGS)
        ours = await connect(listener.address, SETTINGS)
        await wait_until(lambda: bool(comms), "the listener's side")
        stream = ours._transport  # type: ignore[attr-defined]
        assert stream._tls.version() == "TLSv1.3"
        assert not stream._tls.session_reused
        assert not stream._tls.session.has_ticket
        for comm in (ours, *comms):
            await end(comm)
        await listener.close()

    run(test())


@pytest.mark.parametrize("size", [10, MIB])
def test_an_answer_to_the_last_message_before_a_changed_record(size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Both come in one piece: the handler answers over a link that is broken already."""
    junk = b"\x17\x03\x03\x00\x40" + bytes(64)

    async def test() -> None:
        there: list[Recorder] = []

        def accept(comm: Comm) -> None:
            there.append(Recorder(comm, lambda message: comm.send([bytes(size)])))

        listener = await listen("tcp://127.0.0.1:0", accept, SETTINGS)
        where = parse_host_port(listener.address)
        async with recording_proxy(where.host, where.port) as proxy:
            ours = await connect(f"tcp://127.0.0.1:{proxy.port}", SETTINGS)
            here = Recorder(ours)
            ours.send([b"untouched"])
            await here.wait_messages(1)
            proxy.change = lambda data: data + junk
            ours.send([b"the last"])
            error = await there[0].wait_end()
            assert there[0].contents() == [[b"untouched"], [b"the last"]]
            assert isinstance(error, CommBrokenError)
            assert "bad record mac" in str(error)
            assert isinstance(await here.wait_end(), CommBrokenError)
            await end(ours)
        await listener.close()

    run(test())
    assert "failed" not in caplog.text


@pytest.mark.parametrize("size", [10, MIB])
def test_a_link_that_cannot_encrypt_any_more_is_broken(size: int) -> None:
    """Not an error of OpenSSL out of `send`."""

    async def test() -> None:
        comms: list[Comm] = []
        listener = await listen("tcp://127.0.0.1:0", comms.append, SETTINGS)
        ours = await connect(listener.address, SETTINGS)
        await wait_until(lambda: bool(comms), "the listener's side")
        here, there = Recorder(ours), Recorder(comms[0])
        with contextlib.suppress(ssl.SSLWantReadError):
            ours._transport._tls.unwrap()  # type: ignore[attr-defined]
        ours.send([bytes(size)])
        error = await here.wait_end()
        assert isinstance(error, CommBrokenError)
        assert "protocol is shutdown" in str(error)
        await there.wait_end()
        for comm in (ours, *comms):
            await end(comm)
        await listener.close()

    run(test())


def test_the_switch_interval_is_short_while_much_passes_and_only_then() -> None:
    usual_s = sys.getswitchinterval()
    assert usual_s == pytest.approx(0.005), "an earlier test's links have left theirs"

    async def test() -> None:
        seen: list[float] = []
        comms: list[Comm] = []
        listener = await listen("tcp://127.0.0.1:0", comms.append, SETTINGS)
        ours = await connect(listener.address, SETTINGS)
        await wait_until(lambda: bool(comms), "the listener's side")
        there = Recorder(comms[0], lambda message: seen.append(sys.getswitchinterval()))
        for size in (100, 10 * MIB):
            ours.send([bytes(size)])
            await there.wait_messages(len(seen) + 1)
        assert seen[0] == pytest.approx(usual_s)
        assert seen[1] < usual_s / 10
        await wait_until(lambda: sys.getswitchinterval() == pytest.approx(usual_s), "the interval stays short")
        for comm in (ours, *comms):
            await end(comm)
        await listener.close()

    run(test())


def test_both_sides_hear_of_another_key(caplog: pytest.LogCaptureFixture) -> None:
    other = settings(encryption=dataclasses.replace(ENCRYPTED, secret=SECRET))

    async def test() -> None:
        listener = await listen("tcp://127.0.0.1:0", nobody, SETTINGS)
        with pytest.raises(PeerIdentityError, match="cluster key"):
            await connect(listener.address, other)
        await wait_until(lambda: "cluster key" in caplog.text, "the listener says nothing of it")
        await listener.close()

    run(test())


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a byte", "half a hello"])
def test_silent_strangers_are_hung_up_on_in_time(said: bytes) -> None:
    async def test() -> None:
        listener = await listen("tcp://127.0.0.1:0", nobody, settings(connect_timeout_s=0.3))
        where = parse_host_port(listener.address)
        reader, writer = await asyncio.open_connection(where.host, where.port)
        writer.write(said)
        await hung_up_on(reader)
        writer.close()
        await listener.close()

    run(test())


def test_closing_does_not_wait_for_strangers() -> None:
    async def test() -> None:
        listener = await listen("tcp://127.0.0.1:0", nobody, SETTINGS)
        where = parse_host_port(listener.address)
        opened = [await asyncio.open_connection(where.host, where.port) for _ in range(20)]
        for index, (_reader, writer) in enumerate(opened):
            writer.write(b"\x16" if index % 2 else b"")
        await connect_and_end(listener.address)  # all of them have been accepted by now
        async with asyncio.timeout(2):
            await listener.close()
        for reader, writer in opened:
            await hung_up_on(reader)
            writer.close()

    async def connect_and_end(address: str) -> None:
        with contextlib.suppress(OSError):
            await end(await connect(address, SETTINGS))

    run(test())


def test_the_oldest_stranger_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_transport, "_STRANGERS", 10)

    async def test() -> None:
        comms: list[Comm] = []
        listener = await listen("tcp://127.0.0.1:0", comms.append, SETTINGS)
        where = parse_host_port(listener.address)
        opened = [await asyncio.open_connection(where.host, where.port) for _ in range(12)]
        for reader, writer in opened[:2]:
            await hung_up_on(reader)
            writer.close()
        ours = await connect(listener.address, SETTINGS)
        await wait_until(lambda: bool(comms), "a node among strangers")
        for comm in (ours, *comms):
            await end(comm)
        await listener.close()
        for _reader, writer in opened[2:]:
            writer.close()

    run(test())


def test_endless_handshake_takes_no_memory() -> None:
    """A stranger whose hello never ends is hung up on long before it has cost anything."""
    record = b"\x16\x03\x01\x40\x00" + bytes(1) + b"\xff\xff\xff" + b"x" * 16380

    async def test() -> None:
        listener = await listen("tcp://127.0.0.1:0", nobody, SETTINGS)
        where = parse_host_port(listener.address)
        before = memory_bytes()
        with socket.create_connection((where.host, where.port)) as sock:
            sock.settimeout(5)
            await asyncio.to_thread(flood, sock)
        assert memory_bytes() - before < 32 * MIB
        await listener.close()

    def flood(sock: socket.socket) -> None:
        with pytest.raises(ConnectionError):
            for _ in range(20_000):
                sock.sendall(record)

    run(test())
