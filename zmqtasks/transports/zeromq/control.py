"""Control parts: what the two ends of a ZeroMQ link tell each other besides data. No I/O in here.

A ZeroMQ message of one part is data: a piece of the stream of `zmqtasks.transports.stream` (without its preamble), of
at most `PART_BYTES`. A message of two parts, the first of them empty, is control: the second has a kind in its first
byte, all integers little-endian.

    HELLO   kind magic version:u8 session:16 window:u32     connecting side, first of all
    ACCEPT  the same with the session of the HELLO          listening side
    REFUSE  kind text                                       listening side, instead of ACCEPT
    CREDIT  kind consumed:u64 window:u32                    how much data has been consumed up to now
    FIN     kind                                            no data follows; answered at once by
    FIN_ACK kind                                            all data and the FIN have come
    ABORT   kind text                                       the link is broken on purpose

Credits count units of `UNIT_BYTES`, of which a part takes at least one: what bounds them bounds bytes as well as parts, in the
receiver and in both ZeroMQ queues.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol.frames import KIB

VERSION = 1
MAGIC = b"ztasks-zmq"
SESSION_BYTES = 16

UNIT_BYTES = 64 * KIB
"""What credits count."""

PART_BYTES = 16 * UNIT_BYTES
"""Most data in one part. Larger parts are no faster (`python -m bench.network.baselines_zmq`)."""

CONTROL_BYTES = 512
"""Most bytes of a control part."""

_HELLO, _ACCEPT, _REFUSE, _CREDIT, _FIN, _FIN_ACK, _ABORT = range(1, 8)
_GREETING = struct.Struct(f"<B{len(MAGIC)}sB{SESSION_BYTES}sI")
_CREDIT_STRUCT = struct.Struct("<BQI")
_VERSION_AT = 1 + len(MAGIC)
_TEXT_BYTES = CONTROL_BYTES - 1


@dataclass(frozen=True, slots=True)
class Hello:
    """Asks for a link; `window` is how many unconsumed units the sender takes."""

    session: bytes
    window: int
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Accept:
    """Grants the link asked for by the HELLO with the same session."""

    session: bytes
    window: int
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Refuse:
    """Grants no link."""

    reason: str


@dataclass(frozen=True, slots=True)
class Credit:
    """The sender has consumed so many units since the beginning, and takes `window` beyond them."""

    consumed: int
    window: int


@dataclass(frozen=True, slots=True)
class Fin:
    """No data follows."""


@dataclass(frozen=True, slots=True)
class FinAck:
    """All data and the FIN have come."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The sender has broken the link."""

    reason: str


Control: TypeAlias = Hello | Accept | Refuse | Credit | Fin | FinAck | Abort


def units(part_bytes: int) -> int:
    """What a part of that size takes of a window."""
    return max(1, -(-part_bytes // UNIT_BYTES))


def largest_part(window: int) -> int:
    """How many bytes a part may have: two of them fit into the window, if it is more than one unit."""
    return max(UNIT_BYTES, min(PART_BYTES, window // 2 * UNIT_BYTES))


def encode_control(control: Control) -> bytes:
    """The bytes of a control part."""
    match control:
        case Hello(session, window, version):
            return _GREETING.pack(_HELLO, MAGIC, version, session, window)
        case Accept(session, window, version):
            return _GREETING.pack(_ACCEPT, MAGIC, version, session, window)
        case Refuse(reason):
            return bytes([_REFUSE]) + reason.encode()[:_TEXT_BYTES]
        case Credit(consumed, window):
            return _CREDIT_STRUCT.pack(_CREDIT, consumed, window)
        case Fin():
            return bytes([_FIN])
        case FinAck():
            return bytes([_FIN_ACK])
        case Abort(reason):
            return bytes([_ABORT]) + reason.encode()[:_TEXT_BYTES]


def decode_control_untrusted(data: bytes) -> Control:
    """What a control part says; raises `RemoteProtocolError` for anything that is none.

    A HELLO or ACCEPT of another version is returned with its version, session and window empty: their layout is that
    version's own affair.
    """
    if 0 < len(data) <= CONTROL_BYTES:
        kind = data[0]
        if kind in (_HELLO, _ACCEPT) and data[1:_VERSION_AT] == MAGIC and len(data) > _VERSION_AT:
            return _decode_greeting(data)
        if kind == _CREDIT and len(data) == _CREDIT_STRUCT.size:
            _, consumed, window = _CREDIT_STRUCT.unpack(data)
            return Credit(consumed, window)
        if kind in (_FIN, _FIN_ACK) and len(data) == 1:
            return Fin() if kind == _FIN else FinAck()
        if kind in (_REFUSE, _ABORT):
            text = data[1:].decode(errors="replace")
            return Refuse(text) if kind == _REFUSE else Abort(text)
    raise RemoteProtocolError(f"the peer sent {data[:32]!r}, which is no control part of the zmq transport")


def _decode_greeting(data: bytes) -> Hello | Accept:
    made = Hello if data[0] == _HELLO else Accept
    version = data[_VERSION_AT]
    if version != VERSION:
        return made(b"", 0, version)
    if len(data) != _GREETING.size:
        raise RemoteProtocolError(f"the peer sent a greeting of {len(data)} bytes, it must have {_GREETING.size}")
    _, _, _, session, window = _GREETING.unpack(data)
    return made(session, window)
