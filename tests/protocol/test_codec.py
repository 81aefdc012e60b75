"""The codec: every op there and back, plain MessagePack on the wire, and any bytes at all."""

from __future__ import annotations

import os
import random
import time
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from zmqtasks.errors import LimitExceededError, LocalProtocolError, ProtocolError, RemoteProtocolError
from zmqtasks.protocol import ops
from zmqtasks.protocol.codec import Codec

UNIONS: dict[str, Any] = {
    name: getattr(ops, name)
    for name in (
        "ClientToScheduler",
        "SchedulerToClient",
        "SchedulerToWorker",
        "WorkerToScheduler",
        "NannyToScheduler",
        "SchedulerToNanny",
        "DataRequest",
        "DataReply",
        "Introduction",
    )
}
ALL_OPS: list[Any] = sorted({op for union in UNIONS.values() for op in get_args(union)}, key=lambda op: op.__name__)


def make(kind: Any, rng: random.Random) -> Any:
    """A value of a type as the op structs use them."""
    info = kind if isinstance(kind, msgspec.inspect.Type) else msgspec.inspect.type_info(kind)
    match info:
        case msgspec.inspect.BoolType():
            return rng.random() < 0.5
        case msgspec.inspect.IntType():
            return rng.choice([0, 1, 127, 128, 1 << 20, (1 << 63) - 1, -1, -(1 << 40)])
        case msgspec.inspect.FloatType():
            return rng.choice([0.0, -1.5, 1e300, 3.0])
        case msgspec.inspect.StrType():
            return rng.choice(["", "inc-1", "ключ", "x" * 300])
        case msgspec.inspect.BytesType():
            return rng.randbytes(rng.choice([0, 1, 16, 300]))
        case msgspec.inspect.ListType(item_type=item):
            return [make(item, rng) for _ in range(rng.choice([0, 1, 3, 20]))]
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return {make(key, rng): make(value, rng) for _ in range(rng.choice([0, 1, 3]))}
        case msgspec.inspect.UnionType(types=types):
            return make(rng.choice(types), rng)
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return cls(*(make(field.type, rng) for field in fields))
        case msgspec.inspect.TupleType(item_types=types):
            return tuple(make(item, rng) for item in types)
        case _:
            raise NotImplementedError(f"an op has a field of type {info!r}: teach this test to make one")


def as_plain(value: Any) -> Any:
    """What an independent MessagePack reader should see."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = [as_plain(getattr(value, name)) for name in value.__struct_fields__]
        return [tag, *fields] if tag is not None else fields
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return value


def batch_of(union: Any, rng: random.Random, size: int = 8) -> list[Any]:
    return [make(rng.choice(get_args(union)), rng) for _ in range(size)]


@pytest.mark.parametrize("name", UNIONS)
def test_every_op_there_and_back(name: str) -> None:
    codec, rng = Codec(UNIONS[name]), random.Random(1)
    for op in get_args(UNIONS[name]):
        for _ in range(20):
            batch = [make(op, rng), make(op, rng)]
            data = codec.encode(7, 1 << 40, batch)
            assert isinstance(data, bytes)
            for buffer in (data, memoryview(bytearray(data))):
                assert codec.decode_untrusted(buffer) == (7, 1 << 40, batch)


def test_tags_are_unique() -> None:
    tags = [op.__struct_config__.tag for op in ALL_OPS]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("name", UNIONS)
def test_independent_reader_sees_the_same(name: str) -> None:
    rng = random.Random(2)
    for _ in range(20):
        batch = batch_of(UNIONS[name], rng)
        data = Codec(UNIONS[name]).encode(3, 2, batch)
        seen = msgpack.unpackb(data, strict_map_key=False)
        assert seen == [3, 2, as_plain(batch)]
        assert Codec(UNIONS[name]).decode_untrusted(msgpack.packb(seen)) == (3, 2, batch)


def test_fields_appended_by_a_later_version_are_ignored() -> None:
    data = msgpack.packb([1, 0, [[11, "reason", "new field", {"x": [1]}]]])
    assert Codec(ops.DataRequest).decode_untrusted(data) == (1, 0, [ops.Goodbye("reason")])


BAD = [
    ("nothing", b"", "0 bytes that are not a batch"),
    ("not an array", msgpack.packb({"a": 1}), "not a batch"),
    ("never used byte", b"\xc1", "not a batch"),
    ("cut", msgpack.packb([1, 0, [[23, [1, 2, 3]]]])[:-1], "not a batch.*truncated"),
    ("rest", msgpack.packb([1, 0, []]) + b"\x00", "not a batch.*trailing"),
    ("negative seq", msgpack.packb([-1, 0, []]), r"not a batch.*>= 0"),
    ("text for seq", msgpack.packb(["1", 0, []]), "not a batch"),
    ("unknown tag", msgpack.packb([1, 0, [[23, [1]], [250]]]), r"unknown op, tag 250 \(op 1 of its batch\)"),
    ("op of another direction", msgpack.packb([1, 0, [[120, 1, [2]]]]), "unknown op, tag 120"),
    ("text as tag", msgpack.packb([1, 0, [["WantKeys", []]]]), "op that is none"),
    ("no tag", msgpack.packb([1, 0, [[]]]), "op that is none"),
    ("no op", msgpack.packb([1, 0, [5]]), "op that is none"),
    ("wrong field", msgpack.packb([1, 0, [[22, [1], 5]]]), r"wrong PlacementFailed.*field address: Expected `str`"),
    ("wrong element", msgpack.packb([1, 0, [[23, [1, None]]]]), r"wrong WantKeys.*field keys\[1\]"),
    ("missing field", msgpack.packb([1, 0, [[22, [1]]]]), "wrong PlacementFailed.*at least length 3"),
    ("broken utf-8", b"\x93\x01\x00\x91\x92\x17\x91\xa2\xff\xff", "not a batch.*utf-8"),
    ("deep nesting", b"\x93\x01\x00\x91\x93\x17\x90" + b"\x91" * 100_000, "not a batch.*recursion"),
    ("huge array", b"\x93\x01\x00\xdd\xff\xff\xff\xff", "not a batch.*truncated"),
    ("huge array inside", b"\x93\x01\x00\x91\x92\x17\xdd\xff\xff\xff\xff" + b"\x01" * 1000, "truncated"),
    ("huge bytes", b"\x93\x01\x00\x91\x92\x0b\xdb\xff\xff\xff\xff", "truncated"),
    ("a pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "not a batch"),
]


@pytest.mark.parametrize(("data", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_bytes_are_named(data: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"(?s)the peer sent.*{says}"):
        Codec(ops.ClientToScheduler).decode_untrusted(data)


def test_limit_is_checked_before_reading() -> None:
    codec = Codec(ops.ClientToScheduler, limit_bytes=100)
    with pytest.raises(LimitExceededError, match="101 bytes, the limit is 100"):
        codec.decode_untrusted(b"\xc1" * 101)


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(LocalProtocolError, match=r"1 ops \(WantKeys\) cannot be encoded"):
        Codec(ops.ClientToScheduler).encode(1, 0, [ops.WantKeys([object()])])  # type: ignore[list-item]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bytes, cuts, repetitions, inserted type bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        size = len(changed)
        position = int(rng.random() * size) if size else 0
        kind = rng.random()
        if kind < 0.5 and size:
            changed[position] = int(rng.random() * 256)
        elif kind < 0.6:
            del changed[position:]
        elif kind < 0.75:
            changed[position:position] = rng.choice(SPLICES)
        elif kind < 0.9:
            del changed[position : position + int(rng.random() * 8)]
        else:
            changed += changed[position : position + 32]
    return bytes(changed)


SPLICES = [
    b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc0",
    b"\xca\x7f\xc0\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd3" + b"\x80" * 8, b"\x90", b"\x80", b"\xc7\x00\x01", b"\x91" * 40,
]  # fmt: skip


def test_any_bytes_become_ops_or_the_named_error() -> None:
    """Mutated batches and random bytes; `ZMQTASKS_FUZZ_INPUTS` sets how many."""
    inputs = int(os.environ.get("ZMQTASKS_FUZZ_INPUTS", "1000000"))
    seed = int(os.environ.get("ZMQTASKS_FUZZ_SEED", "0")) or time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    codecs = [Codec(union) for union in UNIONS.values()]
    seeds = [codec.encode(5, 4, batch_of(codec.incoming, rng, 3)) for codec in codecs for _ in range(20)]
    seeds = [data for data in seeds if len(data) < 2000] + [codec.encode(1, 0, []) for codec in codecs]
    good = bad = 0
    for number in range(inputs):
        codec = codecs[number % len(codecs)]
        data = mutate(rng.choice(seeds), rng) if number % 4 else rng.randbytes(int(rng.random() * 64))
        try:
            seq, ack, batch = codec.decode_untrusted(data)
        except RemoteProtocolError:
            bad += 1
        else:
            good += 1
            assert seq >= 0
            assert ack >= 0
            assert all(isinstance(op, ops.Op) for op in batch)
            if number % 16 == 1:
                codec.encode(seq, ack, batch)
    assert good > inputs // 1000, "the mutations leave nothing valid: they test only the first byte"
    assert bad > inputs // 2
    assert issubclass(RemoteProtocolError, ProtocolError)
