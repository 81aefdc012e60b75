"""How two nodes meet: hello, mutual proof of the cluster key, introduction, welcome. Pure: bytes in, bytes out.

Theory of operation
-------------------
::

    connector                                              acceptor
    HELLO      version, role, cluster id, nonce        ->
                                                       <-  CHALLENGE  version, role, cluster id, nonce, proof
    PROOF      proof, digest of the introduction       ->
                                                       <-  PROVEN
    INTRODUCTION  record                               ->
                                                       <-  WELCOME  record

At any point a side may send REFUSED (a code and a text for people) and close. Every message begins with magic, version
and kind; these and REFUSED stay the same in all versions, so that different versions can tell each other apart.

A proof is an HMAC-SHA256 under a key derived from the cluster key, over a label of the side that proves and the
transcript: both roles, versions, nonces and cluster ids, and on the connector's side the digest of its introduction.
The labels differ, so a proof sent back proves nothing; the nonces are fresh, so a recorded one neither. The acceptor
proves first, and reads nothing but fixed-size messages until the connector has proven itself; the introduction, which
may be long, is read after that only.

A side object takes each message of the peer in `receive` and gives what to send. When it raises, `farewell` has the
frames that tell the peer why, if there are any, to be sent before closing.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from enum import Enum, IntEnum

import msgspec

from zmqtasks.errors import (
    AuthenticationError,
    ConnectionRefusedByPeerError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SchedulerLostError,
    VersionMismatchError,
    ZmqTasksError,
)
from zmqtasks.ids import ID_BYTES
from zmqtasks.protocol.frames import Buffer
from zmqtasks.protocol.ops import (
    PROTOCOL_VERSION,
    ClientIntroduction,
    DataIntroduction,
    Introduction,
    NannyIntroduction,
    WorkerIntroduction,
)

__all__ = [
    "NONCE_BYTES",
    "AcceptorHandshake",
    "ConnectorHandshake",
    "LinkRequest",
    "RefusalCode",
    "Role",
    "Welcome",
    "error_for_refusal",
    "role_of",
]

MAGIC = b"zmqtasks"
NONCE_BYTES = 32
MAX_TEXT_BYTES = 1024


class Kind(IntEnum):
    """Of a message of the handshake."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    PROVEN = 4
    INTRODUCTION = 5
    WELCOME = 6
    REFUSED = 255


class Role(IntEnum):
    """What the connecting side is; an acceptor is `ACCEPTOR`."""

    ACCEPTOR = 0
    CLIENT = 1
    WORKER = 2
    NANNY = 3
    DATA = 4


_ROLES: dict[type, Role] = {
    ClientIntroduction: Role.CLIENT,
    WorkerIntroduction: Role.WORKER,
    NannyIntroduction: Role.NANNY,
    DataIntroduction: Role.DATA,
}


class RefusalCode(IntEnum):
    """Why a side was turned away; decides the error that the other side sees."""

    PROTOCOL = 1
    VERSION = 2
    AUTHENTICATION = 3
    SESSION_UNKNOWN = 4
    """The session to be resumed is not known any more (it expired), or belongs to somebody else."""
    OTHER_EPOCH = 5
    """The session to be resumed is of an earlier run of the scheduler."""
    NOT_ADMITTED = 6
    """The acceptor does not take this node; the text says why."""
    BUSY = 7


class LinkRequest(msgspec.Struct, frozen=True, array_like=True):
    """What a connector says of itself, once it has proven the key."""

    introduction: Introduction
    instance: bytes
    session: bytes
    """Chosen by the connector for a new control link; the old one when resuming; empty on data links."""
    resuming: bool = False
    epoch: int = 0
    """Of the acceptor, as of the last welcome; 0 when not resuming."""
    last_seq: int = 0
    """The last batch received from the acceptor in this session."""
    versions: dict[str, str] = {}


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """What an acceptor answers to a node that it takes."""

    cluster_id: bytes
    epoch: int
    session: bytes
    resumed: bool
    last_seq: int
    """The last batch received from the connector in this session."""
    number: int
    """Client number, worker number, ...: what the acceptor calls this node."""
    instance: bytes
    warnings: list[str] = []
    """One line each, for people: packages whose versions differ, say."""
    versions: dict[str, str] = {}
    codecs: list[str] = []
    """Of compression, that the acceptor can read on data links."""
    setups: int = 0
    """Of `SetUpPlugin` that come next: a worker is ready when it has done them."""


_head = struct.Struct(">8sHB")
_hello = struct.Struct(f">8sHBB{ID_BYTES}s{NONCE_BYTES}s")
_DIGEST_BYTES = hashlib.sha256().digest_size
_CHALLENGE_BYTES = _hello.size + _DIGEST_BYTES
_PROOF_BYTES = _head.size + 2 * _DIGEST_BYTES
_CONNECTOR_LABEL = b"zmqtasks proof of the connecting side"
_ACCEPTOR_LABEL = b"zmqtasks proof of the accepting side"

_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(LinkRequest).decode
_decode_welcome = msgspec.msgpack.Decoder(Welcome).decode


class _State(Enum):
    START = "start"
    GREETED = "greeted"
    PROVING = "proving"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


class _Side:
    """What both sides share: the state, the farewell, and reading the head of a message."""

    _connects: bool

    def __init__(self, *, cluster_id: bytes, link_key: bytes, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise LocalProtocolError(f"a nonce has {NONCE_BYTES} bytes, got {len(nonce)}")
        self._cluster_id = cluster_id
        self._link_key = link_key
        self._nonce = nonce
        self._state = _State.START
        self._transcript = b""
        self.farewell: list[bytes] | None = None
        """Frames that tell the peer why it is turned away; set when `receive` has raised and the peer should know."""

    @property
    def done(self) -> bool:
        """The handshake is complete: whatever comes next is a batch of ops."""
        return self._state is _State.DONE

    def _open(self, frames: Sequence[Buffer], expected: Kind, size: int | None) -> Buffer:
        """The first frame of a message that must be of one kind; raises a named error for anything else."""
        frame = frames[0] if frames else b""
        if len(frame) < _head.size:
            raise self._fault(f"sent {len(frame)} bytes that are no zmqtasks handshake")
        magic, version, kind = _head.unpack_from(frame)
        if magic != MAGIC:
            raise self._fault(f"does not speak the zmqtasks protocol (it began with {bytes(frame[:8])!r})")
        if kind == Kind.REFUSED:
            self._state = _State.FAILED
            raise _read_refusal_untrusted(frame, version)
        if version != PROTOCOL_VERSION:
            connecting, accepting = (PROTOCOL_VERSION, version) if self._connects else (version, PROTOCOL_VERSION)
            raise self._fail(
                VersionMismatchError(
                    f"the versions of the protocol differ: the connecting side speaks version {connecting}, "
                    f"the accepting side version {accepting}: install the same zmqtasks on both"
                ),
                RefusalCode.VERSION,
            )
        if kind != expected:
            raise self._fault(f"sent handshake message {kind} where {expected.name} ({expected.value}) was due")
        if size is not None and (len(frame) != size or len(frames) != 1):
            raise self._fault(f"sent a {expected.name} of {len(frames)} frames and {len(frame)} bytes, due are {size}")
        return frame

    def _fault(self, what: str) -> RemoteProtocolError:
        error = RemoteProtocolError(f"the peer {what}")
        self._fail(error, RefusalCode.PROTOCOL)
        return error

    def _fail(self, error: ZmqTasksError, code: RefusalCode) -> ZmqTasksError:
        self._state = _State.FAILED
        self.farewell = refused(code, str(error))
        return error

    def _proof(self, label: bytes, extra: bytes = b"") -> bytes:
        return hmac.digest(self._link_key, label + hashlib.sha256(self._transcript).digest() + extra, "sha256")


class ConnectorHandshake(_Side):
    """The side that dials: `start()`, then `receive` each message until `done`; `welcome` has the answer."""

    _connects = True

    def __init__(self, request: LinkRequest, *, cluster_id: bytes, link_key: bytes, nonce: bytes) -> None:
        super().__init__(cluster_id=cluster_id, link_key=link_key, nonce=nonce)
        self._role = role_of(request.introduction)
        self._request = _encode(request)
        self.welcome: Welcome | None = None

    def start(self) -> list[bytes]:
        """The frames of the first message."""
        hello = _hello.pack(MAGIC, PROTOCOL_VERSION, Kind.HELLO, self._role, self._cluster_id, self._nonce)
        self._transcript = hello
        self._state = _State.GREETED
        return [hello]

    def receive(self, frames: Sequence[Buffer]) -> list[bytes] | None:
        """Takes a message; gives the one to send, or None when the handshake is done.

        Raises VersionMismatchError, AuthenticationError, RemoteProtocolError, or what the peer's refusal stands for.
        """
        match self._state:
            case _State.GREETED:
                return self._on_challenge(frames)
            case _State.PROVING:
                self._open(frames, Kind.PROVEN, _head.size)
                self._state = _State.WAITING
                return [_head.pack(MAGIC, PROTOCOL_VERSION, Kind.INTRODUCTION), self._request]
            case _State.WAITING:
                self._open(frames, Kind.WELCOME, None)
                self.welcome = self._decode_untrusted(frames)
                self._state = _State.DONE
                return None
            case _:
                raise LocalProtocolError(f"no message of a handshake is due (state {self._state.value})")

    def _on_challenge(self, frames: Sequence[Buffer]) -> list[bytes]:
        frame = self._open(frames, Kind.CHALLENGE, _CHALLENGE_BYTES)
        _, _, _, role, cluster_id, _ = _hello.unpack_from(frame)
        if role != Role.ACCEPTOR:
            raise self._fault(f"answered in role {role}, due is an accepting side")
        self._transcript += bytes(frame[: _hello.size])
        right = hmac.compare_digest(self._proof(_ACCEPTOR_LABEL), bytes(frame[_hello.size :]))
        if not right or cluster_id != self._cluster_id:
            raise self._fail(
                AuthenticationError(
                    f"the accepting side (cluster {cluster_id.hex()}) does not hold the key of the connecting side "
                    f"(cluster {self._cluster_id.hex()}): both need the same key file"
                ),
                RefusalCode.AUTHENTICATION,
            )
        digest = hashlib.sha256(self._request).digest()
        self._state = _State.PROVING
        head = _head.pack(MAGIC, PROTOCOL_VERSION, Kind.PROOF)
        return [head + digest + self._proof(_CONNECTOR_LABEL, digest)]

    def _decode_untrusted(self, frames: Sequence[Buffer]) -> Welcome:
        if len(frames) != 2:
            raise self._fault(f"sent a WELCOME of {len(frames)} frames, due are 2")
        try:
            return _decode_welcome(frames[1])
        except (ValueError, RecursionError) as exc:
            raise self._fault(f"sent a WELCOME that cannot be read: {exc}") from None


class AcceptorHandshake(_Side):
    """The side that listens: `receive` each message; when `request` is there, answer by `accept` or `refuse`."""

    _connects = False

    def __init__(self, *, cluster_id: bytes, link_key: bytes, nonce: bytes) -> None:
        super().__init__(cluster_id=cluster_id, link_key=link_key, nonce=nonce)
        self._role = Role.ACCEPTOR
        self._digest = b""
        self.proven = False
        """The peer holds the cluster key: its introduction, which may be long, can be read."""
        self.request: LinkRequest | None = None

    def receive(self, frames: Sequence[Buffer]) -> list[bytes] | None:
        """Takes a message; gives the one to send, or None when `request` waits for `accept` or `refuse`.

        Raises VersionMismatchError, AuthenticationError, RemoteProtocolError, or what the peer's refusal stands for.
        """
        match self._state:
            case _State.START:
                return self._on_hello(frames)
            case _State.PROVING:
                return self._on_proof(frames)
            case _State.GREETED:
                self._on_introduction(frames)
                return None
            case _State.WAITING:
                raise self._fault("sent more before it was welcomed")
            case _:
                raise LocalProtocolError(f"no message of a handshake is due (state {self._state.value})")

    def accept(self, welcome: Welcome) -> list[bytes]:
        """The frames that welcome the connector; the handshake is done."""
        self._state = _State.DONE
        return [_head.pack(MAGIC, PROTOCOL_VERSION, Kind.WELCOME), _encode(welcome)]

    def refuse(self, code: RefusalCode, text: str) -> list[bytes]:
        """The frames that turn the connector away."""
        self._state = _State.FAILED
        return refused(code, text)

    def _on_hello(self, frames: Sequence[Buffer]) -> list[bytes]:
        frame = self._open(frames, Kind.HELLO, _hello.size)
        _, _, _, role, cluster_id, _ = _hello.unpack_from(frame)
        if role not in _ROLES.values():
            known = ", ".join(f"{known.value} ({known.name.lower()})" for known in _ROLES.values())
            raise self._fault(f"came in the unknown role {role}: known are {known}")
        if cluster_id != self._cluster_id:
            raise self._fail(
                AuthenticationError(
                    f"the connecting side belongs to cluster {cluster_id.hex()}, the accepting side to cluster "
                    f"{self._cluster_id.hex()}: both need the same key file"
                ),
                RefusalCode.AUTHENTICATION,
            )
        self._role = Role(role)
        own = _hello.pack(MAGIC, PROTOCOL_VERSION, Kind.CHALLENGE, Role.ACCEPTOR, self._cluster_id, self._nonce)
        self._transcript = bytes(frame) + own
        self._state = _State.PROVING
        return [own + self._proof(_ACCEPTOR_LABEL)]

    def _on_proof(self, frames: Sequence[Buffer]) -> list[bytes]:
        frame = bytes(self._open(frames, Kind.PROOF, _PROOF_BYTES))
        digest, proof = frame[_head.size : -_DIGEST_BYTES], frame[-_DIGEST_BYTES:]
        if not hmac.compare_digest(self._proof(_CONNECTOR_LABEL, digest), proof):
            raise self._fail(
                AuthenticationError(
                    "the connecting side does not hold the key of the accepting side: both need the same key file"
                ),
                RefusalCode.AUTHENTICATION,
            )
        self._digest = digest
        self.proven = True
        self._state = _State.GREETED
        return [_head.pack(MAGIC, PROTOCOL_VERSION, Kind.PROVEN)]

    def _on_introduction(self, frames: Sequence[Buffer]) -> None:
        self._open(frames, Kind.INTRODUCTION, None)
        if len(frames) != 2:
            raise self._fault(f"sent an INTRODUCTION of {len(frames)} frames, due are 2")
        if not hmac.compare_digest(hashlib.sha256(frames[1]).digest(), self._digest):
            raise self._fail(
                AuthenticationError("the introduction is not the one that the connecting side has vouched for"),
                RefusalCode.AUTHENTICATION,
            )
        try:
            request = _decode_request(frames[1])
        except (ValueError, RecursionError) as exc:
            raise self._fault(f"sent an INTRODUCTION that cannot be read: {exc}") from None
        if role_of(request.introduction) is not self._role:
            raise self._fault(
                f"came in role {self._role.name.lower()} and introduces itself by {type(request.introduction).__name__}"
            )
        if len(request.instance) != ID_BYTES or len(request.session) != (0 if self._role is Role.DATA else ID_BYTES):
            raise self._fault(
                f"sent ids of {len(request.instance)} (instance) and {len(request.session)} (session) bytes"
            )
        self.request = request
        self._state = _State.WAITING


def role_of(introduction: Introduction) -> Role:
    """The role in which a node with this introduction connects."""
    return _ROLES[type(introduction)]


def refused(code: RefusalCode, text: str) -> list[bytes]:
    """The frames of a refusal."""
    return [_head.pack(MAGIC, PROTOCOL_VERSION, Kind.REFUSED) + bytes([code]) + text.encode()[:MAX_TEXT_BYTES]]


def error_for_refusal(code: int, text: str) -> ZmqTasksError:
    """The error that a refusal stands for, on the side that was turned away."""
    match code:
        case RefusalCode.VERSION:
            return VersionMismatchError(text)
        case RefusalCode.AUTHENTICATION:
            return AuthenticationError(text)
        case RefusalCode.SESSION_UNKNOWN | RefusalCode.OTHER_EPOCH:
            return SchedulerLostError(text)
        case RefusalCode.PROTOCOL:
            return ProtocolError(f"the peer found this side's handshake wrong: {text}")
        case _:
            return ConnectionRefusedByPeerError(text)


def _read_refusal_untrusted(frame: Buffer, version: int) -> ZmqTasksError:
    code = frame[_head.size] if len(frame) > _head.size else 0
    raw = bytes(frame[_head.size + 1 : _head.size + 1 + MAX_TEXT_BYTES]).decode("utf-8", "replace")
    text = "".join(char if char.isprintable() else " " for char in raw)  # it goes to logs and terminals
    if version != PROTOCOL_VERSION and str(version) not in text:
        text = f"{text} (the peer speaks version {version}, this side version {PROTOCOL_VERSION})"
    return error_for_refusal(code, text or "turned away without a reason")
