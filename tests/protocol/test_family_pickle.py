"""The pickle family: buffers out of band, cloudpickle only where it is needed, errors that name the object."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap

import cloudpickle
import numpy as np
import pytest

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol.families import pickle as pickle_family
from zmqtasks.protocol.payload import PICKLE_HEADER, Payload
from zmqtasks.protocol.serialize import deserialize, deserialize_inline, dumps_function, serialize, serialize_inline

BIG = 100_000


class Point:
    def __init__(self, x: float) -> None:
        self.x = x

    def __eq__(self, other):
        return type(other) is Point and self.x == other.x

    __hash__ = None


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("holds a socket")


UNPICKLABLE = Unpicklable()


class FailsToLoad:
    def __reduce__(self):
        return int, ("not a number",)


def received(payload: Payload) -> Payload:
    return Payload(payload.header, tuple(bytearray(frame) for frame in payload.frames))


def run_python(code: str) -> str:
    """What a fresh interpreter prints that runs `code` as its `__main__`."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_arrays_inside_objects_go_out_of_band_without_a_copy():
    array = np.arange(BIG, dtype="u1")
    obj = {"a": array, "p": Point(2)}
    payload = serialize(obj)
    assert payload.header == PICKLE_HEADER
    assert len(payload.frames) == 2
    assert len(payload.frames[0]) < 1000
    assert np.shares_memory(np.frombuffer(payload.frames[1], "u1"), array)
    arrived = received(payload)
    new = deserialize(arrived)
    assert new["p"] == Point(2)
    assert np.shares_memory(new["a"], np.frombuffer(arrived.frames[1], "u1"))
    assert np.array_equal(new["a"], array)
    new["a"][0] = 5


def test_small_buffers_stay_in_band():
    payload = serialize([np.zeros(1023, "u1"), np.zeros(1024, "u1"), np.asfortranarray(np.ones((40, 40)))])
    assert [memoryview(frame).nbytes for frame in payload.frames[1:]] == [1024, 12800]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_are_not_copied_by_the_sender(kind):
    data = kind(BIG)
    payload = serialize(data)
    assert payload.frames[1].obj is data
    for source in (payload, received(payload)):
        new = deserialize(source)
        assert type(new) is kind
        assert new == data


def test_small_and_odd_objects_round_trip():
    for obj in (None, b"a", bytearray(b"b"), "é\ud800", Point(1), len, Point, [1, [2]], ..., NotImplemented):
        assert deserialize(received(serialize(obj))) == obj
        assert deserialize_inline(serialize_inline(obj)) == obj


def test_a_failed_attempt_leaves_no_buffers():
    array = np.zeros(BIG, "u1")
    payload = serialize([array, lambda: 1])
    assert len(payload.frames) == 2
    new = deserialize(received(payload))
    assert np.array_equal(new[0], array)
    assert new[1]() == 1


def test_plain_pickle_is_used_where_it_works():
    obj = (Point(1), {"a": 2})
    assert serialize_inline(obj) == pickle.dumps(obj, 5)
    assert bytes(serialize(obj).frames[0]) == pickle.dumps(obj, 5)
    assert dumps_function(Point) == pickle.dumps(Point, 5)


def test_cloudpickle_is_not_even_imported_where_plain_pickle_works():
    out = run_python("""
        import sys
        from fractions import Fraction
        from zmqtasks.protocol.serialize import deserialize, dumps_function, serialize, serialize_inline
        deserialize(serialize((Fraction(1, 2), print, "__main", b"x" * 10**6)))
        serialize_inline([Fraction(1, 2)]), dumps_function(Fraction.limit_denominator)
        print(sorted({"cloudpickle", "numpy", "msgpack"} & set(sys.modules)))
        serialize(lambda: 1)
        print("cloudpickle" in sys.modules)
    """)
    assert out.split("\n")[:2] == ["[]", "True"]


def test_what_main_defines_travels_by_value():
    out = run_python("""
        from zmqtasks.protocol.serialize import dumps_function, serialize, serialize_inline
        class Mine:
            def __init__(self, x): self.x = x
            def double(self): return 2 * self.x
        def triple(x): return 3 * helper(x)
        def helper(x): return x
        blobs = [serialize_inline(Mine(4)), serialize_inline((Mine(4),)), serialize(Mine(4)).frames[0],
                 dumps_function(triple)]
        print([bytes(blob).hex() for blob in blobs])
    """)
    one, (two,), three, triple = [deserialize_inline(bytes.fromhex(blob)) for blob in json.loads(out.replace("'", '"'))]
    assert [one.double(), two.double(), three.double(), triple(5)] == [8, 8, 8, 15]
    assert "Mine" not in globals()


def test_modules_registered_by_value_travel_by_value():
    by_reference = dumps_function(run_python), serialize_inline([run_python]), serialize(Point(1)).frames[0]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        by_value = dumps_function(run_python), serialize_inline([run_python]), serialize(Point(1)).frames[0]
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert all(len(value) > 2 * len(reference) for value, reference in zip(by_value, by_reference, strict=True))
    assert dumps_function(run_python) == by_reference[0]


def test_the_same_function_gives_the_same_bytes():
    offset = 3

    def closure(x):
        return x + offset

    for function in (closure, lambda x: x, len, Point):
        assert dumps_function(function) == dumps_function(function)


@pytest.mark.parametrize("write", [serialize, serialize_inline, dumps_function])
@pytest.mark.parametrize("obj", [Unpicklable(), [Unpicklable()], lambda bomb=UNPICKLABLE: bomb])
def test_an_object_that_cannot_be_pickled_is_named(write, obj):
    with pytest.raises(SerializationError, match=rf"{type(obj).__qualname__}.*RuntimeError: holds a socket") as info:
        write(obj)
    assert isinstance(info.value.__cause__, RuntimeError)


def test_errors_of_the_objects_own_code_become_the_cause():
    blob = serialize_inline((FailsToLoad(),))
    for read in (lambda: deserialize_inline(blob), lambda: deserialize(Payload(PICKLE_HEADER, (blob,)))):
        with pytest.raises(DeserializationError, match="ValueError: invalid literal") as info:
            read()
        assert isinstance(info.value.__cause__, ValueError)


def test_a_missing_module_is_named():
    data = b"\x80\x05cno_such_module\nThing\n."
    for read in (deserialize_inline, pickle_family.loads):
        with pytest.raises(DeserializationError, match=r"no_such_module.*install"):
            read(data)


def test_missing_and_surplus_frames_are_refused():
    payload = serialize([np.zeros(BIG)])
    with pytest.raises(DeserializationError, match="out-of-band"):
        deserialize(Payload(PICKLE_HEADER, payload.frames[:1]))
    with pytest.raises(DeserializationError, match="at least one"):
        deserialize(Payload(PICKLE_HEADER, ()))


def test_deep_objects_are_an_error_not_a_crash():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for write in (serialize, serialize_inline):
        with pytest.raises(SerializationError, match=r"list cannot be pickled.*recursion"):
            write(deep)
