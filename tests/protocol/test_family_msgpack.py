"""The msgpack family: plain data comes back equal and of the same types; anything else, and any bytes, is refused."""

from __future__ import annotations

import datetime as dt
import enum
import math
import pickletools
import struct
from collections import OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol.families.msgpack import MAX_DEPTH, Code, dumps, loads
from zmqtasks.protocol.payload import Payload, make_header
from zmqtasks.protocol.serialize import deserialize, serialize

UTC = dt.timezone.utc  # noqa: UP017 - the class of the object is the point


def canonical(obj):
    """A text that differs where values or exact types differ: 1, 1.0 and True; 0.0 and -0.0; fold; order of items."""
    kind = type(obj)
    name = kind.__qualname__
    if kind in (list, tuple):
        return f"{name}({','.join(map(canonical, obj))})"
    if kind in (set, frozenset):
        return f"{name}({','.join(sorted(map(canonical, obj)))})"
    if kind is dict:
        return f"dict({','.join(f'{canonical(k)}:{canonical(v)}' for k, v in obj.items())})"
    if kind is float:
        return "float(nan)" if math.isnan(obj) else f"float({struct.pack('<d', obj).hex()})"
    if kind is complex:
        return f"complex({canonical(obj.real)},{canonical(obj.imag)})"
    if kind in (dt.datetime, dt.time):
        return f"{obj!r} fold {obj.fold} {obj.tzinfo!r}"
    return f"{name}({obj!r})"


ENCODABLE = st.characters()  # includes surrogates

hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(ENCODABLE, max_size=8),
    st.binary(max_size=8),
    st.dates(),
    st.datetimes(timezones=st.none() | st.timezones() | st.just(UTC)),
    st.times(timezones=st.none() | st.just(UTC)),
    st.timedeltas(),
    st.decimals().filter(lambda number: not number.is_snan()),  # a signaling NaN has no hash
    st.uuids(),
    st.fractions(),
    st.builds(range, st.integers(), st.integers(), st.integers(1)),
)
hashables = st.recursive(
    hashable_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
scalars = st.one_of(
    hashable_scalars,
    st.binary(max_size=8).map(bytearray),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
)
plain_data = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashables, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(plain_data)
def test_plain_data_round_trips(obj):
    assert canonical(loads(dumps(obj))) == canonical(obj)


@pytest.mark.parametrize(
    "obj",
    [
        {1: "int", "1": "str", b"1": "bytes", 1.5: "float", None: "none", (1,): "tuple"},
        [{True: 1}, {1: True}, {1.0: 1}],
        [True, 1, 1.0, 0, False, -0.0, 0.0],
        [2**63, 2**64, -(2**63), -(2**63) - 1, 10**400, -(10**400), 2**64 - 1],
        [math.nan, math.inf, -math.inf, complex(-0.0, math.nan)],
        "\ud800 surrogate",
        ([], (), set(), frozenset(), {}, "", b"", bytearray()),
        dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        [dt.timezone(dt.timedelta(hours=-3.5)), dt.timezone(dt.timedelta(hours=2), "X"), ZoneInfo("UTC"), UTC],
        [Decimal("1E+1000"), Decimal("-0"), Decimal("sNaN12"), Decimal("-Infinity")],
        [UUID(int=5), Fraction(10**30, 7), range(0, -10, -3), slice(None, (1, 2), [3])],
        [[1, [2, [3]]], ((1,), [2])],
    ],
)
def test_what_other_codecs_confuse(obj):
    assert canonical(loads(dumps(obj))) == canonical(obj)


def test_the_family_writes_plain_messagepack_without_pickle():
    payload = serialize({"a": [1, None, b"x"]}, family="msgpack")
    assert payload.family == "msgpack"
    assert msgpack.unpackb(payload.frames[0]) == {"a": [1, None, b"x"]}
    assert deserialize(payload) == {"a": [1, None, b"x"]}
    assert msgpack.unpackb(dumps((1, 2))) == [msgpack.ExtType(Code.TUPLE, b""), 1, 2]
    with pytest.raises(ValueError, match=r".+"):
        list(pickletools.genops(bytes(payload.frames[0])))


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Zone(dt.tzinfo):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "obj",
    [
        object(), Colour.RED, Text("a"), Point(1, 2), OrderedDict(a=1), memoryview(b"a"), print,
        msgpack.ExtType(2, b""), msgpack.Timestamp(1), dt.datetime(2026, 1, 1, tzinfo=Zone()),
    ],
    ids=lambda obj: type(obj).__name__,
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda obj: obj, lambda obj: [obj], lambda obj: ({"k": (obj,)},)])
def test_what_is_not_plain_is_refused_by_name(obj, wrap):
    name = "Zone" if isinstance(obj, dt.datetime) else type(obj).__qualname__
    with pytest.raises(SerializationError, match=name):
        serialize(wrap(obj), family="msgpack")


def nested(depth):
    obj = ()
    for level in range(depth):
        obj = [obj] if level % 3 == 0 else (obj,) if level % 3 == 1 else {"k": obj}
    return obj


def test_deep_nesting_is_a_clear_error():
    assert canonical(loads(dumps(nested(MAX_DEPTH)))) == canonical(nested(MAX_DEPTH))
    cyclic: list[object] = []
    cyclic.append(cyclic)
    for obj in (nested(MAX_DEPTH + 1), nested(100_000), cyclic):
        with pytest.raises(SerializationError, match=f"more than {MAX_DEPTH} deep"):
            dumps(obj)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff\x01",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x91\xc7\x00\x02" * 3000,
        b"\x81\x90\x01",
        msgpack.packb(msgpack.ExtType(Code.TUPLE, b"")),
        msgpack.packb([1, msgpack.ExtType(Code.TUPLE, b"")]),
        msgpack.packb({"a": msgpack.ExtType(Code.SET, b"")}),
        msgpack.packb([msgpack.ExtType(Code.SET, b""), []]),
        msgpack.packb([msgpack.ExtType(Code.TUPLE, b"data")]),
        msgpack.packb([msgpack.ExtType(99, b"")]),
        msgpack.packb([msgpack.ExtType(Code.DICT, b""), 1]),
        msgpack.packb([msgpack.ExtType(Code.DATE, b""), 2026, 13, 1]),
        msgpack.packb([msgpack.ExtType(Code.DATE, b""), b"\x07\xea\x0b\x15"]),
        msgpack.packb([msgpack.ExtType(Code.FRACTION, b""), 1, 0]),
        msgpack.packb([msgpack.ExtType(Code.DECIMAL, b""), "one"]),
        msgpack.packb([msgpack.ExtType(Code.UUID, b"")]),
        msgpack.packb([msgpack.ExtType(Code.BYTEARRAY, b""), 1 << 40]),
        msgpack.packb([msgpack.ExtType(Code.RANGE, b""), 0, 1, 0]),
        msgpack.packb([msgpack.ExtType(Code.ZONEINFO, b""), "Nowhere/City"]),
        msgpack.packb([msgpack.ExtType(Code.ZONEINFO, b""), "../../etc/passwd"]),
        msgpack.packb([msgpack.ExtType(Code.TIMEZONE, b"")]),
        msgpack.packb([msgpack.ExtType(Code.DATETIME, b""), 1, 2]),
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(DeserializationError):
        loads(data)


def test_other_frames_are_refused():
    for header, frames in ((make_header("msgpack"), ()), (make_header("msgpack", b"x"), (dumps(1),))):
        with pytest.raises(DeserializationError, match="not none and one"):
            deserialize(Payload(header, frames))


pieces = st.sampled_from(
    [
        bytes([byte])
        for byte in (0x80, 0x81, 0x90, 0x91, 0x92, 0x95, 0x9A, 0xC0, 0xC2, 0xCB, 0xD9, 0xDC, 0x00, 0x05, 0xFF)
    ]
    + [b"\xc7\x00" + bytes([code]) for code in range(20)]
)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.lists(pieces | st.binary(max_size=3), max_size=30).map(b"".join)))
def test_any_bytes_give_plain_data_or_the_named_error(data):
    try:
        obj = loads(data)
    except DeserializationError:
        return
    dumps(obj)  # what was read is plain data


@settings(max_examples=300, deadline=None)
@given(plain_data, st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_byte_gives_plain_data_or_the_named_error(obj, position, value):
    data = bytearray(dumps(obj))
    data[position % len(data)] = value
    try:
        loads(data)
    except DeserializationError:
        pass
