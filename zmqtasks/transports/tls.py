"""TLS below a stream comm: who has the cluster's secret can open and read a link, nobody else.

- *Identity.* The secret gives one Ed25519 key and one certificate for it, the same on every node: each side presents it
  and accepts exactly it. There is no authority, no host name, no clock (it is valid for all time), no renewal. Who lacks
  the secret can't present it, though everybody who calls gets to see it: the handshake proves the private key.
- *Protocol.* TLS 1.3 only, without tickets: no session is resumed, so no hello can be replayed.
- *Where.* `TlsStream` stands between asyncio's transport of the socket and the comm, and is to each what the other would
  be. It encrypts by OpenSSL's memory BIOs rather than asyncio's own TLS, which cannot close one direction (the comm's
  goodbye needs that) and would encrypt all that is queued at once. Here plain frames wait, uncopied, and become
  ciphertext piece by piece as the socket takes it.
- *End.* The stream's own goodbye is inside the encryption, so a link cut short is told from one that was closed; TLS's
  close_notify would say nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
import ssl
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from zmqtasks.errors import ConnectError, PeerIdentityError
from zmqtasks.protocol.frames import KIB
from zmqtasks.transports.derive import derive_key
from zmqtasks.transports.stream import PREAMBLE, EncryptionFailedError

TLS_RECORD = b"\x16"
"""First byte of a TLS handshake; `PREAMBLE` begins otherwise."""

_KEY_LABEL = b"zmqtasks tls identity v1"
_NAME = "zmqtasks node"

_PIECE_BYTES = 64 * KIB
"""Read from the socket, or encrypted, in one go. OpenSSL's buffers of a link grow to this and stay; larger ones are no
faster, nor are smaller ones (`python -m bench.links --transports tcp-encrypted`)."""
_TURN_BYTES = 16 * _PIECE_BYTES
"""Encrypted in one turn of the loop: 0.4 ms."""
_AHEAD_BYTES = 4 * _PIECE_BYTES
"""Ciphertext that may wait for the socket."""

_DRAIN_BYTES = 1024 * KIB
"""What is read, and dropped, of a peer whose handshake failed, before it is hung up on: else it would not read why."""

_WRONG_KEY_ALERTS = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_REQUIRED", "DECRYPT_ERROR", "CERTIFICATE_UNKNOWN")


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What every node with the same secret presents, and accepts."""

    certificate: bytes
    """DER."""
    client: ssl.SSLContext = field(repr=False)
    server: ssl.SSLContext = field(repr=False)


@functools.lru_cache(maxsize=8)
def tls_identity(secret: bytes) -> TlsIdentity:
    """The identity that belongs to a cluster's encryption secret; made once per process."""
    private_key, certificate = _make_certificate(secret)
    contexts = []
    with _key_file(private_key, certificate) as (path, password):
        for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            context = ssl.SSLContext(protocol)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(path, password=password)
            context.load_verify_locations(cadata=certificate)
            contexts.append(context)
    client, server = contexts
    server.num_tickets = 0
    return TlsIdentity(certificate, client, server)


def certificate_of(secret: bytes) -> bytes:
    """The certificate (DER) of a cluster's encryption secret; it is no secret itself."""
    return _make_certificate(secret)[1]


def _make_certificate(secret: bytes) -> tuple[object, bytes]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding

    private_key = Ed25519PrivateKey.from_private_bytes(derive_key(secret, _KEY_LABEL))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(1)  # and Ed25519 signs without randomness: all nodes make the same bytes
        .not_valid_before(datetime.datetime(1950, 1, 1))  # the first and last dates that X.509 can say (RFC 5280)
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private_key, None)
    )
    return private_key, certificate.public_bytes(Encoding.DER)


@contextlib.contextmanager
def _key_file(private_key: object, certificate: bytes) -> Iterator[tuple[str, bytes]]:
    """A file from which `ssl`, which reads keys from files only, can load; encrypted, and in memory where possible."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    assert isinstance(private_key, Ed25519PrivateKey)
    password = secrets.token_hex(16).encode()
    pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    pem += ssl.DER_cert_to_PEM_cert(certificate).encode()
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("zmqtasks", os.MFD_CLOEXEC)
        path, temporary = f"/proc/self/fd/{descriptor}", False
    else:
        descriptor, path = tempfile.mkstemp(prefix="zmqtasks-")
        temporary = True
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pem)
        yield path, password
    finally:
        os.close(descriptor)
        if temporary:
            os.unlink(path)


class _ThreadScratch(threading.local):
    """Where one thread's links receive ciphertext: it is handed to OpenSSL at once."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_PIECE_BYTES))


_scratch = _ThreadScratch()


class TlsStream(asyncio.BufferedProtocol, asyncio.Transport):
    """One TLS link: the protocol of a socket's transport, and the transport of a `BufferedProtocol`.

    `ready` is done when the handshake is: with None, and `protocol.connection_made` has been called; or with the
    `ConnectError` that says why not, and the protocol is never called.
    """

    def __init__(self, sock: socket.socket, secret: bytes, protocol: asyncio.BufferedProtocol, *, server: bool) -> None:
        super().__init__()
        identity = tls_identity(secret)
        context = identity.server if server else identity.client
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._certificate = identity.certificate
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[ConnectError | None] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._waiting_protocol = protocol
        self._protocol: asyncio.BufferedProtocol | None = None  # until the handshake is done
        self._lower: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._heard = False  # the peer's first bytes have come
        self._reading = True
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._lower_full = False
        self._pumping = False  # more is encrypted in the next turn
        self._high_bytes = self._low_bytes = 0
        self._write_paused = False
        self._eof = False
        self._drained_bytes = 0
        self._over = False  # aborted, or broken: nothing is handed on any more

    # -- the handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._lower = cast(asyncio.Transport, transport)
        self._lower.set_write_buffer_limits(_AHEAD_BYTES, _AHEAD_BYTES // 2)
        self._shake_hands()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._write_outgoing()
            return
        except ssl.SSLError as exc:
            self._fail_handshake(_explained(exc))
            return
        if self._tls.getpeercert(binary_form=True) != self._certificate:
            self._fail_handshake(_wrong_key("its certificate is another one"))
            return
        self._write_outgoing()
        self._protocol = self._waiting_protocol
        self.ready.set_result(None)
        self._protocol.connection_made(self)

    def _fail_handshake(self, error: ConnectError) -> None:
        """Tells the peer, as far as TLS has words for it; whoever waits for `ready` ends the link."""
        self._error = error
        self._write_outgoing()
        if not self.ready.done():
            self.ready.set_result(error)

    async def end(self, timeout_s: float) -> None:
        """After a failed handshake: ends the link, but not before the peer had time to read why."""
        if self._lower is None or self.lost.done():
            return
        try:
            self._lower.write_eof()
            await asyncio.wait_for(asyncio.shield(self.lost), timeout_s)
        except (TimeoutError, OSError):
            pass
        finally:
            self.abort()

    # -- reading

    def get_buffer(self, sizehint: int) -> memoryview:
        return _scratch.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        if self._error is not None:  # it may still read why
            self._drained_bytes += nbytes
            if self._drained_bytes > _DRAIN_BYTES:
                self.abort()
            return
        if not self._heard:
            self._heard = True
            if _scratch.buffer[:1] == PREAMBLE[:1]:
                self._fail_handshake(
                    EncryptionFailedError(
                        "it does not encrypt this link, and this side does: --encryption must be the same"
                    )
                )
                return
        self._incoming.write(_scratch.buffer[:nbytes])
        if self._protocol is None:
            self._shake_hands()
        self._decrypt()

    def _decrypt(self) -> None:
        """Hands on what has come, for as long as it is wanted."""
        tls, incoming, protocol = self._tls, self._incoming, self._protocol
        if protocol is None:
            return
        while self._reading and not self._over and (incoming.pending or tls.pending()):
            buffer = cast(memoryview, protocol.get_buffer(-1))
            filled, room = 0, len(buffer)
            error: ssl.SSLError | None = None
            closed = False
            try:
                while filled < room and (incoming.pending or tls.pending()):
                    count = cast(int, tls.read(room - filled, buffer[filled:]))
                    if not count:
                        closed = True
                        break
                    filled += count
            except ssl.SSLWantReadError:
                error = None
            except ssl.SSLError as exc:
                error = exc
            if filled:
                protocol.buffer_updated(filled)
            elif error is None and not closed:
                break  # part of a record
            if error is not None:
                self._break(error)
            elif closed:
                self.eof_received()
                break
        if self._outgoing.pending and not self._over:  # an alert, or the answer to a change of keys
            self._write_outgoing()

    def _break(self, error: ssl.SSLError) -> None:
        """What came was changed on the way, or an alert: the link cannot be trusted any more."""
        self._error = _explained(error)
        if not self.get_write_buffer_size():
            with contextlib.suppress(OSError):
                self._sock.send(self._outgoing.read())
        self.abort()

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            if self._lower is not None:
                self._lower.pause_reading()

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._decrypt()
        if self._reading and not self._over and self._lower is not None and not self._lower.is_closing():
            self._lower.resume_reading()

    def eof_received(self) -> bool:
        if self._protocol is not None:
            self._protocol.eof_received()
        elif self._error is None:
            self._fail_handshake(EncryptionFailedError("it hung up during the TLS handshake"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._queue.clear()
        self._queued_bytes = 0
        self.lost.set_result(None)
        if self._protocol is not None:
            self._protocol.connection_lost(self._error or exc)
        elif not self.ready.done():
            self.ready.set_result(
                EncryptionFailedError(f"the link broke during the TLS handshake: {exc or 'it was closed'}")
            )

    # -- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._over or not data:
            return
        view = memoryview(data)
        self._queue.append(view)
        self._queued_bytes += view.nbytes
        if not self._pumping:
            self._pump()
        elif not self._write_paused:
            self._check_marks()

    def write_now(self, data: bytes) -> None:
        """Like `write`, past the loop, for a small message when nothing waits."""
        self._tls.write(data)
        ciphertext = self._outgoing.read()
        try:
            sent = self._sock.send(ciphertext)
        except OSError:  # a full buffer, or an end that the transport shall find
            sent = 0
        if sent < len(ciphertext):
            assert self._lower is not None
            self._lower.write(memoryview(ciphertext)[sent:])

    def _pump(self) -> None:
        """Encrypts what waits, as far as the socket takes it; leaves the loop to others now and then."""
        self._pumping = False
        queue, left = self._queue, _TURN_BYTES
        while queue and not self._lower_full and not self._over:
            if left <= 0:
                self._pumping = True
                self._loop.call_soon(self._pump)
                break
            piece = queue.popleft()
            if piece.nbytes > _PIECE_BYTES:
                queue.appendleft(piece[_PIECE_BYTES:])
                piece = piece[:_PIECE_BYTES]
            left -= piece.nbytes
            self._queued_bytes -= piece.nbytes
            self._tls.write(piece)
            self._write_outgoing()
        if not queue:
            self._all_encrypted()
        self._check_marks()

    def _all_encrypted(self) -> None:
        assert self._lower is not None
        if not self._high_bytes and not self._lower.is_closing():
            self._lower.set_write_buffer_limits(0)  # resume_writing shall mean: all is with the kernel
        if self._eof:
            self._lower.write_eof()

    def _write_outgoing(self) -> None:
        assert self._lower is not None
        if self._outgoing.pending and not self._lower.is_closing():
            self._lower.write(self._outgoing.read())

    def _check_marks(self) -> None:
        protocol = self._protocol
        if protocol is None:
            return
        size = self.get_write_buffer_size()
        if not self._write_paused and size > self._high_bytes:
            self._write_paused = True
            protocol.pause_writing()
        elif self._write_paused and size <= self._low_bytes:
            self._write_paused = False
            protocol.resume_writing()

    def pause_writing(self) -> None:
        self._lower_full = True

    def resume_writing(self) -> None:
        self._lower_full = False
        if self._queue and not self._pumping:
            self._pump()
        else:
            self._check_marks()

    def get_write_buffer_size(self) -> int:
        below = self._lower.get_write_buffer_size() if self._lower is not None and not self.lost.done() else 0
        return self._queued_bytes + below

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = high or 0
        self._low_bytes = low if low is not None else self._high_bytes // 4
        if not self._queue:
            self._all_encrypted()
        self._check_marks()

    def write_eof(self) -> None:
        self._eof = True
        if not self._queue:
            self._all_encrypted()

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._lower is None or self._lower.is_closing()

    def abort(self) -> None:
        self._over = True
        self._queue.clear()
        self._queued_bytes = 0
        if self._lower is not None:
            self._lower.abort()

    def close(self) -> None:
        self.abort()


def _explained(error: ssl.SSLError) -> ConnectError:
    """What a failure of OpenSSL means between nodes."""
    reason = getattr(error, "reason", None) or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        made: ConnectError = _wrong_key("its certificate is another one")
    elif reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        made = _wrong_key("it has no certificate")
    elif reason.endswith(_WRONG_KEY_ALERTS) and "ALERT" in reason:
        made = _wrong_key("it does not accept the certificate of this side")
    else:
        made = EncryptionFailedError(f"TLS failed: {reason.replace('_', ' ').lower()}")
    made.__cause__ = error
    return made


def _wrong_key(how: str) -> PeerIdentityError:
    return PeerIdentityError(f"it does not have this side's cluster key ({how}): both must use the same")
