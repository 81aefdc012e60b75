"""The msgpack family: plain data without pickle, faithfully: a tuple stays a tuple, True stays True, 1.0 a float.

MessagePack has None, bool, int (64 bits), float, str, bytes, list and dict. Everything else is written as a list
whose first item is a *marker*, an empty extension type whose code says what the list stands for: `[marker(TUPLE), 1,
2]`. No user object is a marker, so no user list looks like one; and the reader is one pass of the C unpacker, however
deeply such lists are nested.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any
from uuid import UUID

import msgpack

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol.frames import Buffer

__all__ = ["deserialize", "dumps", "loads", "serialize"]

MAX_DEPTH = 100
"""Containers in containers: far below where the packer (511) and Python's stack (1,000) end."""


class Code(IntEnum):
    """Extension codes: BIG_INT carries its bytes, the others are markers. Part of the wire: never renumber."""

    BIG_INT = 1
    TUPLE = 2
    SET = 3
    FROZENSET = 4
    DICT = 5
    BYTEARRAY = 6
    COMPLEX = 7
    DATETIME = 8
    DATE = 9
    TIME = 10
    TIMEDELTA = 11
    TIMEZONE = 12
    ZONEINFO = 13
    DECIMAL = 14
    UUID = 15
    FRACTION = 16
    RANGE = 17
    SLICE = 18


_MARKERS = {code: msgpack.ExtType(int(code), b"") for code in Code}

_NATIVE = frozenset((type(None), bool, int, float, str, bytes))

# Surrogates are legal in a str (os.fsdecode makes them) but not in UTF-8.
_UNICODE_ERRORS = "surrogatepass"


def serialize(obj: Any) -> tuple[bytes, Sequence[Buffer]]:
    """No metadata, one frame."""
    return b"", (dumps(obj),)


def deserialize(metadata: bytes, frames: Sequence[Buffer]) -> object:
    """The object in the one frame."""
    if metadata or len(frames) != 1:
        raise DeserializationError(
            f"a msgpack payload has {len(metadata)} bytes of metadata and {len(frames)} frames, not none and one"
        )
    return loads(frames[0])


def dumps(obj: object) -> bytes:
    """Plain data as bytes; raises SerializationError that names the type that is not plain, or the nesting."""
    try:
        packed = msgpack.packb(
            _encode(obj, 0), strict_types=True, default=_encode_big_int, unicode_errors=_UNICODE_ERRORS
        )
    except (ValueError, OverflowError, RecursionError) as exc:
        raise SerializationError(f"this {type(obj).__qualname__} cannot be written as plain data: {exc}") from exc
    return bytes(packed)


def _encode(obj: Any, depth: int) -> Any:
    """`obj` in native types and markers; itself where all its items are native."""
    kind: type = type(obj)
    if kind in _NATIVE:
        return obj
    if depth > MAX_DEPTH:
        raise SerializationError(f"plain data is nested more than {MAX_DEPTH} deep, or contains itself: flatten it")
    if kind is list:
        return obj if _NATIVE.issuperset(map(type, obj)) else _encode_all(obj, depth)
    if kind is dict:
        return _encode_dict(obj, depth)
    code = _COLLECTIONS.get(kind)
    if code is not None:
        return [_MARKERS[code], *_encode_all(obj, depth)]
    encode = _ENCODERS.get(kind)
    if encode is not None:
        return encode(obj)
    if kind is slice:
        return [_MARKERS[Code.SLICE], *_encode_all((obj.start, obj.stop, obj.step), depth)]
    if isinstance(obj, dt.tzinfo):
        return _encode_zone(obj)
    raise _not_plain(obj)


def _not_plain(obj: object) -> SerializationError:
    kind = type(obj)
    return SerializationError(
        f"an object of type {kind.__module__}.{kind.__qualname__} is not plain data: use the family 'pickle'"
    )


_COLLECTIONS: dict[type, Code] = {tuple: Code.TUPLE, set: Code.SET, frozenset: Code.FROZENSET}


def _encode_all(items: Any, depth: int) -> list[Any]:
    return [item if type(item) in _NATIVE else _encode(item, depth + 1) for item in items]


def _encode_dict(obj: dict[Any, Any], depth: int) -> Any:
    if _NATIVE.issuperset(map(type, obj)):
        if _NATIVE.issuperset(map(type, obj.values())):
            return obj
        return dict(zip(obj, _encode_all(obj.values(), depth), strict=True))
    flat: list[Any] = [_MARKERS[Code.DICT]]
    for key, value in obj.items():
        flat += _encode_all((key, value), depth)
    return flat


def _encode_big_int(obj: Any) -> Any:
    # The packer asks for what it cannot write: of the native types, integers over 64 bits.
    if type(obj) is not int:
        raise _not_plain(obj)
    return msgpack.ExtType(int(Code.BIG_INT), obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))


def _encode_datetime(obj: dt.datetime) -> list[Any]:
    fields = (obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond, obj.fold)
    return [_MARKERS[Code.DATETIME], *fields, _encode_zone(obj.tzinfo)]


def _encode_time(obj: dt.time) -> list[Any]:
    return [
        _MARKERS[Code.TIME],
        obj.hour,
        obj.minute,
        obj.second,
        obj.microsecond,
        obj.fold,
        _encode_zone(obj.tzinfo),
    ]


def _encode_timedelta(obj: dt.timedelta) -> list[Any]:
    return [_MARKERS[Code.TIMEDELTA], obj.days, obj.seconds, obj.microseconds]


def _encode_zone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is dt.timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [_MARKERS[Code.TIMEZONE], _encode_timedelta(offset), *name]
    kind = type(zone)
    key = getattr(zone, "key", None)
    if kind.__module__.partition(".")[0] == "zoneinfo" and kind.__name__ == "ZoneInfo" and isinstance(key, str):
        return [_MARKERS[Code.ZONEINFO], key]
    raise SerializationError(
        f"a time zone of type {kind.__module__}.{kind.__qualname__} ({zone}) is not plain data: use datetime.timezone "
        "or zoneinfo.ZoneInfo with a key"
    )


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    bytearray: lambda obj: [_MARKERS[Code.BYTEARRAY], bytes(obj)],
    complex: lambda obj: [_MARKERS[Code.COMPLEX], obj.real, obj.imag],
    dt.datetime: _encode_datetime,
    dt.date: lambda obj: [_MARKERS[Code.DATE], obj.year, obj.month, obj.day],
    dt.time: _encode_time,
    dt.timedelta: _encode_timedelta,
    Decimal: lambda obj: [_MARKERS[Code.DECIMAL], str(obj)],
    UUID: lambda obj: [_MARKERS[Code.UUID], obj.bytes],
    Fraction: lambda obj: [_MARKERS[Code.FRACTION], obj.numerator, obj.denominator],
    range: lambda obj: [_MARKERS[Code.RANGE], obj.start, obj.stop, obj.step],
}


class _Marker:
    """A marker as read; it must vanish into the list that it opens."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class _Reader:
    """The hooks of one read: counts markers, so that a stray one cannot get into a result."""

    def __init__(self) -> None:
        self.open_markers = 0

    def extension(self, code: int, data: bytes) -> object:
        if code == Code.BIG_INT:
            return int.from_bytes(data, "little", signed=True)
        if data or code not in _DECODERS:
            raise DeserializationError(f"extension type {code} with {len(data)} bytes is not plain data")
        self.open_markers += 1
        return _Marker(code)

    def items(self, items: list[Any]) -> Any:
        if items and type(items[0]) is _Marker:
            self.open_markers -= 1
            return _DECODERS[items[0].code](items[1:])
        return items


def loads(data: Buffer) -> Any:
    """The object that `dumps` wrote; raises DeserializationError, and nothing else, for other bytes."""
    reader = _Reader()
    try:
        obj = msgpack.unpackb(
            data,
            ext_hook=reader.extension,
            list_hook=reader.items,
            strict_map_key=False,
            timestamp=3,
            unicode_errors=_UNICODE_ERRORS,
        )
    except DeserializationError:
        raise
    except Exception as exc:  # msgpack's errors, and those of constructors for fields out of range
        raise DeserializationError(f"{len(data)} bytes are not plain data: {type(exc).__name__}: {exc}") from exc
    if reader.open_markers:
        raise DeserializationError(f"{len(data)} bytes are not plain data: a marker outside the head of a list")
    return obj


def _decode_dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _typed(items: list[Any], *types: type | tuple[type, ...]) -> list[Any]:
    """`items`, if they have these types: constructors take more than the writer writes."""
    if len(items) != len(types) or not all(map(isinstance, items, types)):
        raise DeserializationError(f"{[type(item).__name__ for item in items]} are not the types of these fields")
    return items


def _decode_time(cls: Any, count: int, items: list[Any]) -> Any:
    *fields, fold, zone = _typed(items, *(int,) * (count + 1), (dt.tzinfo, type(None)))
    return cls(*fields, tzinfo=zone, fold=fold)


def _decode_timezone(items: list[Any]) -> dt.timezone:
    _typed(items, dt.timedelta, *(str,) * (len(items) - 1))
    return dt.UTC if items == [dt.timedelta(0)] else dt.timezone(*items)


def _decode_zoneinfo(items: list[Any]) -> dt.tzinfo:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    (key,) = _typed(items, str)
    try:
        return ZoneInfo(key)
    except ZoneInfoNotFoundError as exc:
        raise DeserializationError(
            f"time zone {key!r} is unknown here: install the package tzdata on this node"
        ) from exc


_DECODERS: dict[int, Callable[[list[Any]], Any]] = {
    Code.TUPLE: tuple,
    Code.SET: set,
    Code.FROZENSET: frozenset,
    Code.DICT: _decode_dict,
    Code.BYTEARRAY: lambda items: bytearray(*_typed(items, bytes)),
    Code.COMPLEX: lambda items: complex(*_typed(items, float, float)),
    Code.DATETIME: lambda items: _decode_time(dt.datetime, 7, items),
    Code.DATE: lambda items: dt.date(*_typed(items, int, int, int)),
    Code.TIME: lambda items: _decode_time(dt.time, 4, items),
    Code.TIMEDELTA: lambda items: dt.timedelta(*_typed(items, int, int, int)),
    Code.TIMEZONE: _decode_timezone,
    Code.ZONEINFO: _decode_zoneinfo,
    Code.DECIMAL: lambda items: Decimal(*_typed(items, str)),
    Code.UUID: lambda items: UUID(bytes=_typed(items, bytes)[0]),
    Code.FRACTION: lambda items: Fraction(*_typed(items, int, int)),
    Code.RANGE: lambda items: range(*_typed(items, int, int, int)),
    Code.SLICE: lambda items: slice(*_typed(items, object, object, object)),
}
