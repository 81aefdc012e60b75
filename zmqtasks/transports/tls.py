"""TLS below a stream comm: who has the cluster's secret can open and read a link, nobody else.

- *Identity.* The secret gives one Ed25519 key and one certificate for it, the same on every node: each side presents it
  and accepts exactly it. There is no authority, no host name, no clock (it is valid for all time), no renewal. Who lacks
  the secret can't present it, though everybody who calls gets to see it: the handshake proves the private key.
- *Protocol.* TLS 1.3 only, without tickets: no session is resumed, so no hello can be replayed.
- *Where.* `TlsStream` stands between asyncio's transport of the socket and the comm, and is to each what the other would
  be. It encrypts by OpenSSL's memory BIOs rather than asyncio's own TLS, which cannot close one direction (the comm's
  goodbye needs that) and would encrypt all that is queued at once. Here plain frames wait, uncopied, and become
  ciphertext piece by piece as the socket takes it.
- *The interpreter's lock* is given up for each record of 16 KiB, and a thread that computes gives it back after the
  switch interval of 5 ms: 3 MB/s. So the interval is shorter while much passes (`_QuickTurns`).
- *End.* The stream's own goodbye is inside the encryption, so a link cut short is told from one that was closed; TLS's
  close_notify would say nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import threading
import time
from collections import deque
from typing import cast

from zmqtasks.errors import ConnectError, PeerIdentityError
from zmqtasks.protocol.frames import KIB
from zmqtasks.transports.stream import PREAMBLE, EncryptionFailedError
from zmqtasks.transports.tls_identity import tls_identity

_PIECE_BYTES = 64 * KIB
"""Read from the socket, or encrypted, in one go. OpenSSL's buffers of a link grow to this and stay; larger ones are no
faster, nor are smaller ones (`python -m bench.links --transports tcp-encrypted`)."""
_TURN_BYTES = 16 * _PIECE_BYTES
"""Encrypted in one turn of the loop: 0.4 ms."""
_AHEAD_BYTES = 4 * _PIECE_BYTES
"""Ciphertext that may wait for the socket."""

_DRAIN_BYTES = 1024 * KIB
"""What is read, and dropped, of a peer whose handshake failed, before it is hung up on: else it would not read why."""

_BULK_BYTES = 32 * KIB
_BULK_SWITCH_INTERVAL_S = 1e-4
"""With a thread that computes in pure Python beside the receiver, messages of 4 MiB pass at 3 to 60 MB/s with Python's 5 ms, at
30 to 420 with this, at 350 to 520 with a tenth of it; but computing threads then take turns as often."""
_BULK_LINGER_S = 0.05

_WRONG_KEY_ALERTS = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_REQUIRED", "DECRYPT_ERROR", "CERTIFICATE_UNKNOWN")


class _ThreadScratch(threading.local):
    """Where one thread's links receive ciphertext: it is handed to OpenSSL at once."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_PIECE_BYTES))


_scratch = _ThreadScratch()


class _QuickTurns:
    """Shortens the interpreter's switch interval while much is encrypted or decrypted, and for a moment after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links = 0
        self._until = 0.0
        self._checked_at = 0.0
        self._usual_s: float | None = None  # the interval to go back to

    def link_made(self) -> None:
        """There is one link more in this process."""
        with self._lock:
            self._links += 1

    def link_lost(self) -> None:
        """There is one less; its loop may end at once, so after the last one no timer is waited for."""
        with self._lock:
            self._links -= 1
            if not self._links:
                self._restore()

    def extend(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tells that much passes now."""
        now = time.monotonic()
        self._until = now + _BULK_LINGER_S
        if self._usual_s is None or now - self._checked_at > 1.0:  # or the loop that was to check is at an end
            with self._lock:
                if self._usual_s is None and (usual_s := sys.getswitchinterval()) > _BULK_SWITCH_INTERVAL_S:
                    self._usual_s = usual_s
                    sys.setswitchinterval(_BULK_SWITCH_INTERVAL_S)
            self._checked_at = now
            loop.call_later(_BULK_LINGER_S, self._check, loop)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._checked_at = time.monotonic()
        if self._checked_at < self._until:
            loop.call_later(_BULK_LINGER_S, self._check, loop)
            return
        with self._lock:
            self._restore()

    def _restore(self) -> None:
        usual_s, self._usual_s = self._usual_s, None
        if usual_s is not None:
            sys.setswitchinterval(usual_s)


_quick_turns = _QuickTurns()


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
        _quick_turns.link_made()
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
        if nbytes > _BULK_BYTES:
            _quick_turns.extend(self._loop)
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
            if error is not None:
                self._break(error)  # first: the handler of what came before it may answer, over a link that is no more
            elif not filled and not closed:
                break  # part of a record
            if filled:
                protocol.buffer_updated(filled)
            if closed:
                self.eof_received()
                break
        if self._outgoing.pending and not self._over:  # an alert, or the answer to a change of keys
            self._write_outgoing()

    def _break(self, error: ssl.SSLError) -> None:
        """What came was changed on the way, or an alert, or OpenSSL failed: the link cannot be trusted any more."""
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
        _quick_turns.link_lost()
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
        if self._over or not self._encrypt(data):
            return
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
        if self._queued_bytes > _BULK_BYTES:
            _quick_turns.extend(self._loop)
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
            if not self._encrypt(piece):
                return
            self._write_outgoing()
        if not queue:
            self._all_encrypted()
        self._check_marks()

    def _encrypt(self, data: bytes | memoryview) -> bool:
        """False: OpenSSL gave up, and the link is broken."""
        try:
            self._tls.write(data)
        except ssl.SSLError as exc:
            self._break(exc)
            return False
        return True

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
