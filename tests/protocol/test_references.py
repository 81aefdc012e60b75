"""Collected references, KeyRef and substitution."""

from __future__ import annotations

import pickle
import threading

import pytest

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol.references import KeyRef, collect_references, note_reference, resolve_scope, substitute
from zmqtasks.protocol.serialize import deserialize, dumps_function, serialize, serialize_inline


class Promise:
    """Pickles as a future does: notes itself."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __reduce__(self):
        note_reference(self.key)
        return Promise, (self.key,)


class Holder:
    def __init__(self, promise: Promise) -> None:
        self.promise = promise


class Stuck:
    def __reduce__(self):
        raise ValueError("stuck")


class NestedUnpickling:
    """Unpickles another payload, with inputs of its own, while it is itself being unpickled."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self):
        return _unpickle_nested, (self.data,)


def _unpickle_nested(data):
    with resolve_scope(["inner"]):
        return pickle.loads(data)


def replace_promises(obj):
    """`obj` with its promises replaced, and their keys in the order of the references."""
    keys = []

    def register(promise):
        keys.append(promise.key)
        return KeyRef(len(keys) - 1)

    return substitute(obj, Promise, register), keys


def test_references_are_noted_wherever_they_are():
    with collect_references() as notes:
        serialize((1, {"a": Holder(Promise("x"))}))
        serialize_inline([Promise("y")])
    assert notes == ["x", "y"]


def test_nothing_is_noted_outside_a_collector():
    assert note_reference("x") is False
    with collect_references() as notes:
        assert note_reference("x") is True
    serialize(Promise("y"))
    assert notes == ["x"]


def test_an_attempt_that_fails_takes_its_notes_back():
    with collect_references() as notes:
        serialize(Promise("before"))
        dumps_function(lambda: 1)
        # Plain pickle notes the promise, then meets the lambda; cloudpickle notes it again.
        serialize([Promise("x"), lambda: 1])
        serialize_inline([Promise("y"), lambda: 1])
    assert notes == ["before", "x", "y"]


def test_a_failed_serialization_leaves_no_notes():
    with collect_references() as notes:
        note_reference("kept")
        for write in (serialize, serialize_inline, dumps_function):
            with pytest.raises(SerializationError, match="stuck"):
                write([Promise("x"), Stuck()])
    assert notes == ["kept"]


def test_closures_hold_references_too():
    promise = Promise("captured")
    with collect_references() as notes:
        dumps_function(lambda: promise)
    assert notes == ["captured"]


def test_inner_collectors_take_what_is_theirs():
    with collect_references() as outer:
        note_reference(1)
        with collect_references() as inner:
            note_reference(2)
        note_reference(3)
    assert (outer, inner) == ([1, 3], [2])


def test_threads_collect_apart():
    with collect_references() as notes:
        noted = []
        thread = threading.Thread(target=lambda: noted.append(note_reference("theirs")))
        thread.start()
        thread.join()
    assert noted == [False]
    assert notes == []


def test_a_key_ref_becomes_the_input():
    value = object()
    payload = serialize(((KeyRef(1), {"a": [KeyRef(0)]}), {KeyRef(2)}))
    with resolve_scope([value, "b", "c"]):
        result = deserialize(payload)
    assert result == (("b", {"a": [value]}), {"c"})
    assert result[0][1]["a"][0] is value


def test_a_key_ref_outside_a_task_is_an_error():
    data = pickle.dumps(KeyRef(0))
    with pytest.raises(DeserializationError, match="outside"):
        pickle.loads(data)
    with resolve_scope([]), pytest.raises(DeserializationError, match="input 0, but the task has 0"):
        pickle.loads(data)
    with pytest.raises(DeserializationError, match="outside"):
        deserialize(serialize(KeyRef(0)))


def test_scopes_nest_and_end():
    payload = serialize((KeyRef(0), NestedUnpickling(pickle.dumps([KeyRef(0)])), KeyRef(0)))
    with resolve_scope(["outer"]):
        assert deserialize(payload) == ("outer", ["inner"], "outer")
        with pytest.raises(RuntimeError), resolve_scope(["inner"]):
            raise RuntimeError
        assert pickle.loads(pickle.dumps(KeyRef(0))) == "outer"


def test_substitute_replaces_in_exact_containers():
    class List(list):
        pass

    mine = List([Promise("no")])
    a, b, c = Promise("a"), Promise("b"), Promise("c")
    new, keys = replace_promises((1, [a, (b, {"k": {c}})], mine, frozenset([4])))
    assert new == (1, [KeyRef(0), (KeyRef(1), {"k": {KeyRef(2)}})], mine, frozenset([4]))
    assert new[2] is mine
    assert keys == ["a", "b", "c"]
    assert replace_promises(a) == (KeyRef(0), ["a"])


def test_substitute_takes_a_predicate_and_leaves_keys_alone():
    promise = Promise("k")
    obj = {promise: 1, "v": "here"}
    assert substitute(obj, lambda item: item == "here", lambda item: KeyRef(7)) is obj  # plain types are never futures
    assert substitute([promise], lambda item: item is promise, lambda item: KeyRef(7)) == [KeyRef(7)]
    assert replace_promises({promise: promise})[0] == {promise: KeyRef(0)}


def test_substitute_copies_only_the_way_to_a_future():
    untouched = [1, [2, (3,)]]
    original = [untouched, [Promise("a")]]
    new, _ = replace_promises(original)
    assert new is not original
    assert new[0] is untouched
    assert isinstance(original[1][0], Promise)
    assert replace_promises(untouched)[0] is untouched


def test_substitute_keeps_shared_containers_shared():
    shared = [Promise("a")]
    new, keys = replace_promises([shared, shared])
    assert new[0] is new[1]
    assert keys == ["a"]
    # A chain of doubled containers has 2 ** 60 paths and 60 objects.
    for _ in range(60):
        shared = [shared, shared]
    replace_promises(shared)


def test_substitute_leaves_deep_and_cyclic_objects_without_futures_as_they_are():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep, 1]
    cyclic: list[object] = [1]
    cyclic.append(cyclic)
    for obj in (deep, cyclic):
        assert replace_promises(obj)[0] is obj
        new, _ = replace_promises([obj, Promise("a")])
        assert new[0] is obj
        assert new[1] == KeyRef(0)


def test_substitute_refuses_a_future_that_it_cannot_reach():
    cyclic: list[object] = [Promise("a")]
    cyclic.append(cyclic)
    with pytest.raises(SerializationError, match="contains itself"):
        replace_promises(cyclic)
    deep: list[object] = [Promise("a")]
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(SerializationError, match="more than 200"):
        replace_promises(deep)
