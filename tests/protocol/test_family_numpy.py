"""The numpy family: every layout and dtype comes back as it was, without copy, without pickle; bad metadata is refused."""

from __future__ import annotations

import pickle
import warnings

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.payload import Payload, make_header, pack_inline, unpack_inline
from zmqtasks.protocol.serialize import deserialize, deserialize_inline, serialize, serialize_inline

BASE = np.arange(24.0).reshape(2, 3, 4)

DTYPES = [
    "?", "i1", "<i8", ">i4", "u2", "e", "f4", ">f8", "g", "F", ">c16", "G", "S5", "<U3", ">U3", "V7",
    "M8[ns]", ">M8[D]", "m8[25s]", "M8", "m8",
    [("a", "<i4"), ("b", ">f8")],
    [("a", "i4"), ("b", [("c", "S3"), ("d", "M8[us]", (2, 3))]), ("e", "g")],
    [(("the title", "a"), "i4"), ("b", "f8")],
    {"names": ["b", "a"], "formats": ["i4", "u1"], "offsets": [4, 9], "itemsize": 20},
    {"names": ["whole", "low"], "formats": ["<u4", "<u2"], "offsets": [0, 0]},
    np.dtype([("a", "i1"), ("b", "f8"), ("c", [("d", "i2"), ("e", "g")])], align=True),
    np.dtype([("é", "i4"), ("", "i4")]),
    np.dtype([]),
]  # fmt: skip


def received(payload: Payload) -> Payload:
    """The payload as it comes from a transport: the same bytes in writable memory of the receiver."""
    return Payload(payload.header, tuple(bytearray(frame) for frame in payload.frames))


def round_trip(obj):
    payload = serialize(obj)
    assert payload.family == "numpy"
    return deserialize(received(payload))


def raw(array):
    """All bytes of an array, in the order of its indices."""
    return array.tobytes()


def assert_same(new, old):
    assert type(new) is np.ndarray
    assert new.dtype == old.dtype
    assert new.dtype.isalignedstruct == old.dtype.isalignedstruct
    assert new.dtype.fields == old.dtype.fields
    assert new.shape == old.shape
    assert raw(new) == raw(old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (2, 3)])
def test_dtypes_round_trip(dtype, shape):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(1)
    count = int(np.prod(shape)) * dtype.itemsize
    array = np.ndarray(shape, dtype, buffer=rng.bytes(count) if dtype.kind not in "?US" else bytes(count))
    new = round_trip(array)
    assert_same(new, array)
    assert new.flags.writeable
    assert new.flags.aligned


@pytest.mark.parametrize(
    "array",
    [
        BASE,
        BASE.T,
        BASE.transpose(1, 0, 2),
        BASE.transpose(2, 0, 1),
        np.asfortranarray(BASE),
        BASE[::-1],
        BASE[:, ::-1, ::-1],
        BASE[::-1].T,
        BASE[:, None, :, :],
        np.asfortranarray(BASE)[..., None],
        BASE[1:],
        np.ones((1, 5)).T,
    ],
    ids=lambda array: f"{array.shape}{array.strides}",
)
def test_contiguous_memory_in_any_order_is_not_copied(array):
    payload = serialize(array)
    (frame,) = payload.frames
    on_frame = np.frombuffer(frame, np.uint8)
    assert on_frame.nbytes == array.nbytes
    assert np.shares_memory(on_frame, array)
    new = deserialize(payload)
    assert np.shares_memory(new, array)
    assert_same(new, array)
    assert [s for s, n in zip(new.strides, new.shape, strict=True) if n > 1] == [
        s for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ]


def test_the_result_is_made_on_the_frame_and_writable():
    frame = bytearray(serialize(BASE).frames[0])
    new = deserialize(Payload(serialize(BASE).header, (frame,)))
    assert np.shares_memory(new, np.frombuffer(frame, np.uint8))
    new[0, 0, 0] = -1
    assert np.frombuffer(frame)[0] == -1


@pytest.mark.parametrize(
    "array",
    [BASE[:, ::2], BASE[..., 1], BASE.T[::2], BASE[::-1, :, ::-2], BASE[:, :2].T],
    ids=lambda array: f"{array.shape}{array.strides}",
)  # fmt: skip
def test_gaps_are_left_out_and_the_order_of_axes_is_kept(array):
    payload = serialize(array)
    assert len(payload.frames[0]) == array.nbytes
    new = round_trip(array)
    assert_same(new, array)
    assert new.flags.writeable
    assert (
        np.argsort(np.abs(new.strides), kind="stable").tolist()
        == np.argsort(np.abs(array.strides), kind="stable").tolist()
    )


@pytest.mark.parametrize("dtype", ["S1000000000", "V1500000000", "S2147483647", "U536870911"])
def test_the_longest_texts_of_numpy_are_read(dtype):
    back = deserialize(serialize(np.empty((3, 0), dtype)))  # without a content, which would take a GB
    assert (back.dtype, back.shape) == (np.dtype(dtype), (3, 0))


def test_overlapping_windows_become_an_array_of_their_own():
    array = sliding_window_view(np.arange(10), 4)
    new = round_trip(array)
    assert_same(new, array)
    new[:] = 0


@pytest.mark.parametrize(
    ("array", "sent_bytes"),
    [
        (np.broadcast_to(np.float64(3), (1000, 1000)), 8),
        (np.broadcast_to(np.arange(5), (7, 5)), 40),
        (np.broadcast_to(np.arange(5)[:, None], (5, 7)), 40),
        (np.broadcast_to(BASE[:, ::-1], (9, 2, 3, 4)), 192),
        (as_strided(np.arange(4), (3, 4), (0, 8)), 32),
        (np.broadcast_to(np.arange(0), (3, 0)), 0),
    ],
)
def test_broadcast_arrays_are_sent_once(array, sent_bytes):
    payload = serialize(array)
    assert sum(map(len, payload.frames)) == sent_bytes
    new = round_trip(array)
    assert_same(new, array)
    if sent_bytes:
        assert new.strides == array.strides
        assert not new.flags.writeable


def test_a_huge_broadcast_takes_no_memory():
    array = np.broadcast_to(np.int8(1), (1 << 40,))
    assert round_trip(array).shape == (1 << 40,)


def test_read_only_and_mapped_arrays(tmp_path):
    array = np.arange(100)
    array.flags.writeable = False
    new = round_trip(array)
    assert_same(new, array)
    assert new.flags.writeable
    mapped = np.memmap(tmp_path / "map", dtype="i4", mode="w+", shape=(4, 5))
    mapped[:] = 7
    assert np.shares_memory(np.frombuffer(serialize(mapped).frames[0], "i4"), mapped)
    assert_same(round_trip(mapped), np.asarray(mapped))


@pytest.mark.parametrize(
    "scalar",
    [
        np.float64(-0.0), np.float32(1.5), np.longdouble(1) / 3, np.complex64(1j), np.int8(-3), np.uint64(2**64 - 1),
        np.bool_(True), np.datetime64("2020-01-02T03", "h"), np.datetime64("NaT"), np.timedelta64(3, "25s"), np.float16(2),
        np.str_("aé\ud800"), np.str_(""), np.bytes_(b"a\0b\0"), np.bytes_(b""), np.void(b"ab\0"),
        np.zeros(1, [("a", "i4"), ("b", "S3")])[0],
    ],
    ids=repr,
)  # fmt: skip
def test_scalars_stay_scalars(scalar):
    for new in (round_trip(scalar), deserialize_inline(serialize_inline(scalar))):
        assert type(new) is type(scalar)
        assert new.dtype == scalar.dtype
        assert new.tobytes() == scalar.tobytes()
        assert new == scalar or new != new


class Subclass(np.ndarray):
    pass


def leave_to_pickle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = np.matrix([[1, 2], [3, 4]])
    yield np.array([1, "a", None], dtype=object)
    yield np.zeros(2, [("a", object), ("b", "i4")])
    yield np.ma.masked_array([1, 2], mask=[True, False])
    yield matrix
    yield np.arange(4).view(Subclass)
    yield np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    yield np.zeros(2, np.dtype("i4", metadata={"unit": "m"}))
    if hasattr(np.dtypes, "StringDType"):
        yield np.array(["a", "long" * 100], dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("obj", list(leave_to_pickle()), ids=lambda obj: type(obj).__name__)
def test_what_numpy_alone_cannot_describe_is_left_to_pickle(obj):
    payload = serialize(obj)
    assert payload.family == "pickle"
    new = deserialize(received(payload))
    assert type(new) is type(obj)
    assert new.dtype == obj.dtype
    assert np.array_equal(np.asarray(new), np.asarray(obj))


def test_no_pickle_in_an_array_payload():
    payload = serialize(np.arange(3).view("M8[s]"))
    name, metadata = msgpack.unpackb(payload.header)
    assert name == "numpy"
    assert msgpack.unpackb(metadata)[1:3] == ["<M8[s]", [3]]
    assert bytes(payload.frames[0]) == np.arange(3, dtype="i8").tobytes()
    assert b"\x80\x05" not in payload.header
    assert b"numpy.core" not in payload.header


@pytest.mark.parametrize("dtype", ["f8", "g", "c16", "i2", "M8[s]"])
def test_arrays_out_of_inline_blobs_are_aligned_and_writable(dtype):
    array = np.zeros(3, dtype)
    for shift in range(1, 9):
        blob = b"x" * shift + serialize_inline(array)
        new = deserialize_inline(memoryview(blob)[shift:])
        assert_same(new, array)
        assert new.flags.aligned
        assert new.flags.writeable


def test_an_odd_address_is_copied_away():
    odd = memoryview(bytearray(81))[1:]
    new = deserialize(Payload(serialize(np.zeros(10)).header, (odd,)))
    assert new.flags.aligned
    assert new.flags.writeable


simple_dtypes = st.one_of(
    hnp.scalar_dtypes(), hnp.unicode_string_dtypes(), hnp.byte_string_dtypes(), hnp.datetime64_dtypes()
)
dtypes = st.one_of(simple_dtypes, hnp.array_dtypes(simple_dtypes, max_size=3), hnp.nested_dtypes(simple_dtypes))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_array_and_any_view_round_trips(data):
    dtype = data.draw(dtypes)
    if dtype.subdtype:
        dtype = dtype.base
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    if array.ndim:
        array = array.transpose(data.draw(st.permutations(range(array.ndim))))
        array = array[data.draw(hnp.basic_indices(array.shape, allow_ellipsis=True, allow_newaxis=True))]
    payload = serialize(np.asarray(array))
    assert payload.family == "numpy"
    assert_same(deserialize(received(unpack_inline(pack_inline(payload)))), np.asarray(array))


GOOD = (0, "<f8", [2, 3], [2, 3], [], [])


def crafted(*layout, frames=(bytes(48),)):
    return Payload(make_header("numpy", msgpack.packb(layout)), frames)


@pytest.mark.parametrize(
    "payload",
    [
        crafted(),
        crafted(*GOOD[:-1]),
        crafted(9, *GOOD[1:]),
        crafted(0, "|O8", *GOOD[2:]),
        crafted(0, "O", *GOOD[2:]),
        crafted(0, "f8,f8", *GOOD[2:]),
        crafted(0, "<f7", *GOOD[2:]),
        crafted(0, None, *GOOD[2:]),
        crafted(0, [["a"], ["|O8"], [0], [None], 8, False], *GOOD[2:]),
        crafted(0, [["a"], ["<f8"], [4], [None], 8, False], *GOOD[2:]),
        crafted(0, [["a"], ["<f8"], [-8], [None], 8, False], *GOOD[2:]),
        crafted(0, [["a", "a"], ["<f4", "<f4"], [0, 4], [None, None], 8, False], *GOOD[2:]),
        crafted(0, ["<f8", [1 << 40]], *GOOD[2:]),
        crafted(0, "<f16:7", [3], [3], [], []),
        crafted(0, "<f8", [2, 3], [2, 4], [], []),
        crafted(0, "<f8", [2, -3], [2, -3], [], []),
        crafted(0, "<f8", [2, 3], [1 << 62, 1 << 62], [], []),
        crafted(0, "<f8", [2, 3], [1 << 62] * 1000, [], []),
        crafted(0, "<f8", [2, 3], [0, 1 << 62, 1 << 62], [], [], frames=()),
        crafted(0, "<f8", [1 << 62] * 3, [2, 3], [], []),
        crafted(0, "<f8", [5, 7], [2, 3], [], []),
        crafted(0, "<f8", [2, 3], [2, 3], [0, 0], []),
        crafted(0, "<f8", [2, 3], [2, 3], [1], []),
        crafted(0, "<f8", [2, 3], [2, 3], [], [1 << 60]),
        crafted(0, "<f8", [2, 3], [2, 3], [], [-1]),
        crafted(1, *GOOD[1:]),
        crafted(*GOOD, frames=(bytes(47),)),
        crafted(*GOOD, frames=()),
        crafted(*GOOD, frames=(bytes(24), bytes(24))),
        crafted(2, frames=(b"\xff",)),
        crafted(2, frames=()),
        Payload(make_header("numpy", b"\xc1"), ()),
        Payload(make_header("numpy", pickle.dumps(1)), (bytes(8),)),
    ],
)
def test_wrong_metadata_is_refused(payload):
    with pytest.raises(DeserializationError):
        deserialize(payload)


plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([1 << 31, 1 << 62, "<f8", "|O8", "|V3", "S0", ""]),
        st.text(max_size=5),
    ),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.lists(plain, max_size=7), st.tuples(st.just(0), plain, plain, plain, plain, plain)))
def test_any_metadata_gives_an_array_or_the_named_error(layout):
    try:
        deserialize(crafted(*layout))
    except DeserializationError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=20))
def test_any_bytes_as_metadata_give_an_array_or_the_named_error(metadata, frame):
    try:
        deserialize(Payload(make_header("numpy", metadata), (frame,)))
    except DeserializationError:
        pass
