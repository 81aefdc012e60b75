"""Values that a worker holds: opened once, read for peers, counted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from zmqtasks.errors import DeserializationError
from zmqtasks.nodes.worker.store import Store
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, serialize, serialize_inline


def test_values_are_counted_replaced_and_dropped() -> None:
    store = Store()
    store.put_value("a", [1], 100)
    store.put_value("a", [2], 50)
    store.put_inputs(["b"], [b"\x80abc"])
    assert (len(store), store.stored_bytes) == (2, 54)
    store.drop(["a", "nothing"])
    store.drop_inputs(["b", "nothing"])
    assert (len(store), store.stored_bytes) == (0, 0)


def test_a_result_is_not_dropped_as_the_inline_value_whose_place_it_took() -> None:
    store = Store()
    store.put_inputs(["a"], [serialize_inline(1)])
    store.put_value("a", 1, 8)
    store.drop_inputs(["a"])
    assert store.entries["a"].get() == 1


def test_payloads_are_opened_by_whoever_needs_them_once() -> None:
    store = Store()
    store.put_payload("a", serialize(np.arange(10)))
    store.put_inputs(["b"], [serialize_inline({"x": 1})])
    entry = store.entries["a"]
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(entry.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(value) for value in found}) == 1
    assert store.entries["b"].get() is store.entries["b"].get()
    again = store.read("a")
    assert isinstance(again, Payload)
    assert np.array_equal(deserialize(again), np.arange(10))


def test_bytes_that_are_no_object_are_an_error_each_time() -> None:
    store = Store()
    store.put_inputs(["a"], [b"\x80garbage"])
    for _ in range(2):
        with pytest.raises(DeserializationError):
            store.entries["a"].get()


def test_reading_for_a_peer_gives_a_payload_none_or_a_reason() -> None:
    store = Store()
    store.put_value("small", 5, 8, serialize_inline(5))
    store.put_value("live", threading.Lock(), 64)
    small = store.read("small")
    assert isinstance(small, Payload)
    assert deserialize(small) == 5
    assert store.read("nothing") is None
    reason = store.read("live")
    assert isinstance(reason, str)
    assert "live" in reason
    assert "lock" in reason


def test_an_object_that_exits_when_it_is_pickled_is_a_reason() -> None:
    class Exits:
        def __reduce__(self) -> str:
            raise SystemExit(3)

    store = Store()
    store.put_value("exits", Exits(), 64)
    reason = store.read("exits")
    assert isinstance(reason, str)
    assert "SystemExit: 3" in reason


def test_a_small_view_of_a_received_frame_does_not_keep_it() -> None:
    store = Store()
    frame = memoryview(bytearray(1 << 20))
    array = np.ndarray((1 << 17,), np.float64, buffer=frame)
    array[:] = np.arange(1 << 17)
    for key, value, kept in (
        ("slice", array[5:1000:3], False),
        ("turned", array[:2000].reshape(20, 100).T, False),
        ("most", array[:100_000], True),
        ("own", np.arange(1 << 17)[:10], True),
    ):
        store.put_value(key, value, value.nbytes)
        held = store.entries[key].get()
        assert (held is value) == kept, key
        assert np.array_equal(held, value)
        assert np.shares_memory(held, value) == kept
