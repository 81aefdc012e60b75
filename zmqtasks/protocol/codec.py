"""Ops to bytes and back: the only door between them.

Frame 0 of every message after the handshake is the MessagePack array `[seq, ack, [op, ...]]`; an op is an array that
begins with its tag. On data links seq and ack are 0, and the ops refer to the frames that follow. Decoding validates in
the same pass: any bytes become ops of the union that this side expects, or `RemoteProtocolError`, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from zmqtasks.errors import LimitExceededError, LocalProtocolError, RemoteProtocolError
from zmqtasks.protocol.frames import CONTROL_LIMITS, Buffer
from zmqtasks.protocol.ops import Op

__all__ = ["Batch", "Codec"]

Batch = tuple[int, int, list[Any]]
"""seq, ack, ops."""

_encode = msgspec.msgpack.Encoder().encode

_Sequence = Annotated[int, msgspec.Meta(ge=0)]

_ELEMENT = re.compile(r"^(?P<what>.*) - at `\$\[2\]\[(?P<op>\d+)\](?:\[(?P<field>\d+)\](?P<rest>.*))?`$", re.DOTALL)
_BAD_TAG = re.compile(r"^Invalid value (?P<tag>-?\d+)$")
_split_ops = msgspec.msgpack.Decoder(tuple[msgspec.Raw, msgspec.Raw, list[list[msgspec.Raw]]]).decode
_decode_tag = msgspec.msgpack.Decoder(int).decode


class Codec:
    """Writes any ops, and reads the ops of one union (a direction of a kind of link)."""

    __slots__ = ("_decode", "_names", "incoming", "limit_bytes")

    def __init__(self, incoming: Any, limit_bytes: int = CONTROL_LIMITS.frame_bytes) -> None:
        """`incoming`: a union of `Op` classes, or one class; `limit_bytes`: what is decoded at most."""
        self.incoming = incoming
        self.limit_bytes = limit_bytes
        self._decode = msgspec.msgpack.Decoder(tuple[_Sequence, _Sequence, list[incoming]]).decode
        self._names: dict[int, type[Op]] = {_tag_of(op): op for op in _members(incoming)}

    def encode(self, seq: int, ack: int, ops: Sequence[Op]) -> bytes:
        """A batch as bytes that nobody else holds; LocalProtocolError for what cannot be written.

        The length is not looked at: senders split batches far below the limit of the other side.
        """
        try:
            return _encode((seq, ack, ops))
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            kinds = ", ".join(sorted({type(op).__name__ for op in ops}))
            raise LocalProtocolError(f"a batch of {len(ops)} ops ({kinds}) cannot be encoded: {exc}") from exc

    def decode_untrusted(self, frame: Buffer) -> Batch:
        """The batch in a peer's bytes: (seq, ack, ops).

        Raises LimitExceededError for a batch that is too long, RemoteProtocolError for anything else that is no batch;
        the message names the op and the field at fault.
        """
        if len(frame) > self.limit_bytes:
            raise LimitExceededError(f"the peer sent a batch of {len(frame)} bytes, the limit is {self.limit_bytes}")
        try:
            return self._decode(frame)
        except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and msgspec's errors are ValueErrors
            raise RemoteProtocolError(self._explain(frame, exc)) from None

    def _explain(self, frame: Buffer, error: Exception) -> str:
        """What is wrong with bytes that did not decode, in the words of the protocol."""
        text = str(error)
        where = _ELEMENT.match(text)
        if where is None:
            return f"the peer sent {len(frame)} bytes that are not a batch of ops: {text}"
        position, what = int(where["op"]), where["what"]
        tag = _tag_at_untrusted(frame, position)
        field = where["field"]
        if (bad := _BAD_TAG.match(what)) and field == "0":
            return f"the peer sent an unknown op, tag {bad['tag']} (op {position} of its batch): none in this direction"
        kind = self._names.get(tag) if tag is not None else None
        if kind is None:
            return f"the peer sent an op that is none (op {position} of its batch): {what}"
        if field is None or not 0 < int(field) <= len(kind.__struct_fields__):
            return f"the peer sent a wrong {kind.__name__} (op {position} of its batch): {what}"
        name = kind.__struct_fields__[int(field) - 1] + where["rest"]
        return f"the peer sent a wrong {kind.__name__} (op {position} of its batch): field {name}: {what}"


def _members(union: Any) -> tuple[Any, ...]:
    return getattr(union, "__args__", None) or (union,)


def _tag_of(op: Any) -> int:
    tag = op.__struct_config__.tag
    if not isinstance(tag, int):
        raise LocalProtocolError(f"{op!r} is no op: it has no tag")
    return tag


def _tag_at_untrusted(frame: Buffer, position: int) -> int | None:
    try:
        return _decode_tag(_split_ops(frame)[2][position][0])
    except (ValueError, RecursionError, IndexError):
        return None
