"""Data links: many requests at once, cancellation, failure, the pool's bound, and bytes that are not copied."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.links import CONFIG, SCHEMES, SECURITY, Node, listening, run, until, wire_to
from zmqtasks.errors import CommClosedError, CommError, ConnectError, SerializationError
from zmqtasks.ids import Key, new_instance_id
from zmqtasks.nodes import data_messages, data_packing, data_server, links
from zmqtasks.nodes.channel import DataPool, DataServer
from zmqtasks.protocol import ops
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.frames import DATA_LIMITS
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, register_serialization, serialize
from zmqtasks.security import ClusterKey, Security

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


class Store:
    """What a worker holds, with a record of how far each request was read."""

    def __init__(self) -> None:
        self.values: dict[Key, Payload | str] = {}
        self.reads: list[Key] = []
        self.on_read: Callable[[], object] = lambda: None

    def read(self, keys: list[Key]) -> Iterator[tuple[Key, Payload | str | None]]:
        for key in keys:
            self.reads.append(key)
            self.on_read()
            yield key, self.values.get(key)

    def write(self, items: list[tuple[Key, Payload]]) -> None:
        self.values.update(items)

    def server(self) -> DataServer:
        return DataServer(self.read, self.write)


def pool_of(**changes: Any) -> DataPool:
    config = dataclasses.replace(CONFIG, **changes)
    return DataPool(security=SECURITY, config=config, instance_id=new_instance_id(), name="asking")


def blob(size: int, fill: int = 7) -> Payload:
    return Payload(b"blob", [memoryview(bytes([fill]) * size)])


@every_scheme
def test_put_and_get(scheme: str) -> None:
    async def main() -> None:
        store = Store()
        async with listening(scheme, data_server=store.server()) as (_, address):
            pool = pool_of()
            items: list[tuple[Key, Payload]] = [
                (1, serialize([1, 2])),
                ("two", serialize(np.arange(10))),
                (3, Payload(b"h", [])),
            ]
            await pool.put(address, items)
            await pool.put(address, [])
            store.values["broken"] = "it cannot be pickled"
            fetched = await pool.get(address, [3, "two", "gone", "broken", 1, 1])
            assert deserialize(fetched.values[1]) == [1, 2]
            assert deserialize(fetched.values["two"]).tolist() == list(range(10))
            assert len(fetched.values[3].frames) == 0
            assert fetched.missing == ["gone"]
            assert fetched.failed == {"broken": "it cannot be pickled"}
            assert (await pool.get(address, [])).values == {}
            await pool.close()
            with pytest.raises(CommClosedError, match="pool is closed"):
                await pool.get(address, [1])

    run(main())


class Samples:
    """A type whose family gives the array as it is."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


register_serialization(
    Samples,
    serializer=lambda samples: (None, [samples.array]),
    deserializer=lambda _, frames: Samples(np.frombuffer(frames[0])),
)


@every_scheme
def test_arrays_that_a_family_gives_as_frames_arrive_whole(scheme: str) -> None:
    async def main() -> None:
        store = Store()
        arrays = {1: np.arange(1000.0), 2: np.arange(100_000.0).reshape(100, 1000), 3: np.empty((0, 3))}
        store.values = {key: serialize(Samples(array)) for key, array in arrays.items()}
        async with listening(scheme, data_server=store.server()) as (_, address):
            pool = pool_of()
            fetched = await pool.get(address, list(arrays))
            for key, array in arrays.items():
                np.testing.assert_array_equal(deserialize(fetched.values[key]).array, array.ravel())
            await pool.close()

    run(main())


@every_scheme
def test_large_arrays_travel_without_a_copy_on_either_side(scheme: str) -> None:
    async def main() -> None:
        store = Store()
        async with listening(scheme, data_server=store.server()) as (_, address):
            pool = pool_of()
            array = np.arange(8 << 20, dtype=np.float64)
            payload = serialize(array)
            assert any(np.shares_memory(np.frombuffer(frame, "u1"), array) for frame in payload.frames)
            store.values["x"] = payload
            fetched = (await pool.get(address, ["x"])).values["x"]
            received = deserialize(fetched)
            assert any(np.shares_memory(np.frombuffer(frame, "u1"), received) for frame in fetched.frames)
            np.testing.assert_array_equal(received, array)
            if scheme == "inproc":
                assert np.shares_memory(received, array)
            else:
                received[0] = 1.5  # memory of the receiver's own
                assert array[0] == 0
            await pool.put(address, [("y", fetched)])
            stored = store.values["y"]
            assert isinstance(stored, Payload)
            np.testing.assert_array_equal(deserialize(stored), received)
            await pool.close()

    run(main())


@every_scheme
def test_many_gets_share_one_link(scheme: str) -> None:
    async def main() -> None:
        store = Store()
        store.values.update({number: blob(number) for number in range(500)})
        async with listening(scheme, data_server=store.server()) as (node, address):
            pool = pool_of()
            all_fetched = await asyncio.gather(*(pool.get(address, [number, number + 1]) for number in range(499)))
            for number, fetched in enumerate(all_fetched):
                assert {key: sum(len(frame) for frame in value.frames) for key, value in fetched.values.items()} == {
                    number: number,
                    number + 1: number + 1,
                }
            assert len(node.peers) == 1
            await pool.close()

    run(main())


@every_scheme
def test_long_answers_are_cut_and_take_turns(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small get does not wait for the whole of a large one that came first."""
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        store.values.update({number: blob(1 << 20) for number in range(100)})
        store.values["small"] = blob(1)
        store.values["huge"] = blob(5 << 20)
        async with listening(scheme, data_server=store.server()) as (_, address):
            pool = pool_of()
            reading = asyncio.Event()
            store.on_read = reading.set
            large = asyncio.ensure_future(pool.get(address, [*range(100), "huge", "gone"]))
            await reading.wait()
            small = await pool.get(address, ["small"])
            assert len(small.values) == 1
            assert not large.done()
            assert len([key for key in store.reads if key != "small"]) < 102, "values are read as they are sent"
            fetched = await large
            assert set(fetched.values) == {*range(100), "huge"}
            assert fetched.missing == ["gone"]
            await pool.put(address, [(f"put-{number}", blob(700_000)) for number in range(10)])
            assert sum(str(key).startswith("put-") for key in store.values) == 10
            await pool.close()

    run(main())


def cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()


@every_scheme
def test_cancelled_get_leaves_the_link_usable(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        store.values.update({number: blob(1 << 20) for number in range(40)})
        async with listening(scheme, data_server=store.server()) as (node, address):
            pool = pool_of()
            for _ in range(5):
                getting = asyncio.ensure_future(pool.get(address, list(range(40))))
                putting = asyncio.ensure_future(pool.put(address, [("p", blob(3 << 20))]))
                store.on_read = functools.partial(cancel, getting, putting)
                await asyncio.wait([getting, putting])
                assert getting.cancelled()
            fetched = await pool.get(address, [1, 2])
            assert len(fetched.values) == 2
            assert len(node.peers) == 1
            await pool.close()

    run(main())


@every_scheme
def test_the_rest_of_a_cancelled_get_is_not_sent(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        value = blob(1 << 20)
        store.values.update(dict.fromkeys(range(1000), value))
        server = store.server()
        async with listening(scheme, data_server=server) as (_, address):
            pool = pool_of()
            getting = asyncio.ensure_future(pool.get(address, list(range(1000))))
            store.on_read = getting.cancel
            await asyncio.wait([getting])
            assert getting.cancelled()
            (link,) = server._links
            await until(lambda: not link._answers and link._task is None)
            assert len(store.reads) < 500
            assert link._by_request == {}
            assert list((await pool.get(address, [1])).values) == [1]
            await pool.close()

    run(main())


@every_scheme
def test_link_that_breaks_takes_all_its_requests_with_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        store.values.update({number: blob(1 << 20) for number in range(100)})
        async with listening(scheme, data_server=store.server()) as (_, address), wire_to(address) as wire:
            pool = pool_of()
            gets = [asyncio.ensure_future(pool.get(wire.address, list(range(100)))) for _ in range(3)]
            reading = asyncio.Event()
            store.on_read = reading.set
            await reading.wait()
            wire.cut()
            for outcome in await asyncio.gather(*gets, return_exceptions=True):
                error = outcome if isinstance(outcome, BaseException) else outcome.broken
                assert isinstance(error, CommError)
                assert wire.address in str(error)
            with pytest.raises(ConnectError):
                await pool.get(wire.address, [1])
            wire.mend()
            assert len((await pool.get(wire.address, [1])).values) == 1
            await pool.close()

    run(main())


def test_errors_of_the_store_are_answers(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Store):
        def read(self, keys: list[Key]) -> Iterator[tuple[Key, Payload | str | None]]:
            yield keys[0], blob(1)
            raise OSError("the disk is gone")

        def write(self, items: Iterable[tuple[Key, Payload]]) -> None:
            raise MemoryError("no room")

    async def main() -> None:
        async with listening("tcp", data_server=Failing().server()) as (_, address):
            pool = pool_of()
            fetched = await pool.get(address, ["a", "b", "c"])
            assert list(fetched.values) == ["a"]
            assert fetched.failed == {"b": "OSError: the disk is gone", "c": "OSError: the disk is gone"}
            with pytest.raises(CommError, match="could not take data: MemoryError: no room"):
                await pool.put(address, [("a", blob(1))])
            assert list((await pool.get(address, ["a"])).values) == ["a"]
            await pool.close()

    run(main())
    assert "no room" in caplog.text


def test_a_value_that_cannot_be_sent_is_an_answer_and_the_next_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)
    no_bytes = Payload(b"blob", [np.zeros((3, 3), order="F").data])  # neither C-contiguous nor of one dimension

    async def main() -> None:
        store = Store()
        store.values.update({"bad": no_bytes, "good": blob(1), **{number: blob(1 << 20) for number in range(40)}})
        async with listening("tcp", data_server=store.server()) as (_, address):
            pool = pool_of()
            requests: list[list[Key]] = [["bad"], [*range(40), "bad", "good"], ["bad"], ["good"]]
            outcomes = await asyncio.wait_for(asyncio.gather(*(pool.get(address, keys) for keys in requests)), 20)
            for keys, fetched in zip(requests, outcomes, strict=True):
                assert set(fetched.failed) == {"bad"} & set(keys)
                assert set(fetched.values) == set(keys) - {"bad"}
            assert "TypeError" in outcomes[0].failed["bad"]
            await pool.close()

    run(main())


def test_a_value_that_exits_when_it_is_read_is_an_answer() -> None:
    class Exiting(Store):
        def read(self, keys: list[Key]) -> Iterator[tuple[Key, Payload | str | None]]:
            yield keys[0], blob(1)
            raise SystemExit(3)

    async def main() -> None:
        async with listening("tcp", data_server=Exiting().server()) as (_, address):
            pool = pool_of()
            fetched = await pool.get(address, ["a", "b"])
            assert list(fetched.values) == ["a"]
            assert fetched.failed == {"b": "SystemExit: 3"}
            await pool.close()

    run(main())


def test_pool_closes_the_least_recently_used_link_and_never_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        store.values.update({number: blob(1 << 20) for number in range(60)})
        nodes = [Node(data_server=store.server()) for _ in range(5)]
        addresses = [await node.acceptor.listen("tcp://127.0.0.1:0") for node in nodes]
        pool = pool_of(data_links=2)
        for address in addresses[:3]:
            await pool.get(address, [0])
        assert pool.addresses == addresses[1:3]
        await pool.get(addresses[1], [0])
        await pool.get(addresses[3], [0])
        assert pool.addresses == [addresses[1], addresses[3]]
        outcomes = await asyncio.gather(*(pool.get(address, list(range(60))) for address in addresses))
        assert all(len(fetched.values) == 60 for fetched in outcomes)
        assert len(pool.addresses) == 2
        await pool.close()
        for node in nodes:
            await node.close()

    run(main())


class Silent(DataServer):
    """Takes links, and answers nothing."""

    def __init__(self) -> None:
        super().__init__(lambda keys: [], lambda items: None)
        self.messages = 0
        self.ends: list[Exception] = []

    def serve(self, comm: Any, *_: Any) -> None:
        comm.set_handler(self)

    def message_received(self, frames: list[memoryview]) -> None:
        self.messages += 1

    def comm_ended(self, error: Exception) -> None:
        self.ends.append(error)


class Trickling(Silent):
    """Answers each request key by key, as many as it is told to, with a pause before each."""

    def __init__(self, most: int, pause_s: float) -> None:
        super().__init__()
        self.most = most
        self.pause_s = pause_s

    def serve(self, comm: Any, *_: Any) -> None:
        super().serve(comm)
        self.comm = comm

    def message_received(self, frames: list[memoryview]) -> None:
        (request,) = ASK.decode_untrusted(frames[0])[2]
        self.answer(request.request, request.keys[: self.most])

    def answer(self, request: int, keys: list[Key]) -> None:
        if keys:
            self.comm.send([ANSWER.encode(0, 0, [ops.DataSent(request, keys[:1], [b"h"], [0])])])
            asyncio.get_running_loop().call_later(self.pause_s, self.answer, request, keys[1:])


@every_scheme
def test_a_link_on_which_nothing_passes_fails_for_all_who_wait(scheme: str) -> None:
    async def main() -> None:
        silent = Silent()
        async with listening(scheme, data_server=silent) as (_, address):
            pool = pool_of(grace_s=0.2)
            calls = [pool.get(address, [1]), pool.get(address, [2]), pool.put(address, [(3, blob(1))])]
            for outcome in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20):
                assert isinstance(outcome, CommError)
                assert f"{address} ended before the answer was complete: nothing has passed for 0.2 s" in str(outcome)
            await until(lambda: silent.ends)
            assert pool.addresses == []
            await pool.close()

    run(main())


def test_what_came_before_a_link_fell_silent_is_kept() -> None:
    async def main() -> None:
        async with listening("tcp", data_server=Trickling(2, 0)) as (_, address):
            pool = pool_of(grace_s=0.2)
            fetched = await asyncio.wait_for(pool.get(address, ["a", "b", "c", "d"]), 20)
            assert list(fetched.values) == ["a", "b"]
            assert fetched.unanswered(["a", "b", "c", "d"]) == ["c", "d"]
            assert address in str(fetched.broken)
            await pool.close()

    run(main())


def test_a_slow_answer_may_take_longer_than_a_silence() -> None:
    async def main() -> None:
        async with listening("tcp", data_server=Trickling(20, 0.05)) as (_, address):
            pool = pool_of(grace_s=0.5)
            fetched = await pool.get(address, list(range(20)))
            assert len(fetched.values) == 20
            assert fetched.broken is None
            await pool.close()

    run(main())


def test_a_link_is_not_closed_as_surplus_before_its_first_request() -> None:
    async def main() -> None:
        silent, store = Silent(), Store()
        store.values[1] = blob(1)
        async with listening("tcp", data_server=silent) as (_, address):
            answering = Node(data_server=store.server())
            other = await answering.acceptor.listen("tcp://127.0.0.1:0")
            pool = pool_of(data_links=1)
            waiting = asyncio.ensure_future(pool.get(address, [1]))
            await until(lambda: silent.messages)
            fetched = await asyncio.wait_for(pool.get(other, [1]), 20)
            assert list(fetched.values) == [1]
            assert len(answering.peers) == 1
            assert pool.addresses == [address]
            await pool.close()
            with pytest.raises(CommClosedError):
                await waiting
            await answering.close()

    run(main())


def test_a_link_whose_put_is_being_packed_is_not_closed_as_surplus() -> None:
    async def main() -> None:
        taking, giving = Store(), Store()
        giving.values[1] = blob(1)
        free = threading.Event()
        threads = data_packing._threads()
        async with listening("tcp", data_server=taking.server()) as (_, address):
            answering = Node(data_server=giving.server())
            other = await answering.acceptor.listen("tcp://127.0.0.1:0")
            pool = pool_of(data_links=1, compression="lz4")
            await pool.get(address, ["nothing"])
            try:
                for _ in range(threads._max_workers):
                    threads.submit(free.wait)
                putting = asyncio.ensure_future(pool.put(address, [("x", blob(4 << 20))]))
                await until(lambda: threads._work_queue.qsize())
                assert list((await pool.get(other, [1])).values) == [1]
            finally:
                free.set()
            await putting
            assert list(taking.values) == ["x"]
            await pool.close()
            await answering.close()

    run(main())


def test_a_node_that_admits_links_and_ends_them_is_an_error_and_not_dialed_again_and_again() -> None:
    class Ending(Silent):
        def serve(self, comm: Any, *_: Any) -> None:
            comm.abort()

    async def main() -> None:
        async with listening("tcp", data_server=Ending()) as (node, address):
            pool = pool_of()
            with pytest.raises(CommError, match=address):
                await asyncio.wait_for(pool.get(address, [1]), 20)
            assert len(node.peers) == 1
            await pool.close()

    run(main())


def test_one_dial_serves_all_who_wait_for_it() -> None:
    async def main() -> None:
        store = Store()
        store.values[1] = blob(1)
        async with listening("tcp", data_server=store.server()) as (node, address):
            pool = pool_of()
            gets = [asyncio.ensure_future(pool.get(address, [1])) for _ in range(10)]
            await asyncio.sleep(0)
            gets[0].cancel()
            outcomes = await asyncio.gather(*gets, return_exceptions=True)
            assert isinstance(outcomes[0], asyncio.CancelledError)
            assert all(not isinstance(outcome, BaseException) for outcome in outcomes[1:])
            assert len(node.peers) == 1
            await pool.close()

    run(main())


def test_failed_dial_is_an_error_of_its_own_for_each() -> None:
    async def main() -> None:
        async with listening("tcp") as (_, address):
            pass
        pool = pool_of()
        outcomes = await asyncio.gather(*(pool.get(address, [1]) for _ in range(4)), return_exceptions=True)
        assert all(isinstance(outcome, ConnectError) for outcome in outcomes)
        assert len({id(outcome) for outcome in outcomes}) == 4
        async with listening("tcp", data_server=Store().server()) as (_, address):
            stranger = DataPool(
                security=Security(ClusterKey.generate()), config=CONFIG, instance_id=new_instance_id(), name="x"
            )
            with pytest.raises(CommError, match="need the same key"):
                await stranger.get(address, [1])
            await stranger.close()
        await pool.close()

    run(main())


def test_a_closed_pool_leaves_no_timer_behind_while_memory_is_lent() -> None:
    async def main() -> None:
        store = Store()
        store.values[1] = blob(2 << 20)
        async with listening("tcp", data_server=store.server()) as (_, address):
            pool = pool_of()
            fetched = await pool.get(address, [1])
            timer = pool._trimming
            assert timer is not None
            await pool.close()
            assert timer.cancelled()
            assert len(fetched.values) == 1

    run(main())


def test_a_value_of_too_many_buffers_is_not_put_and_the_link_goes_on() -> None:
    async def main() -> None:
        store = Store()
        async with listening("tcp", data_server=store.server()) as (node, address):
            pool = pool_of()
            await pool.put(address, [("a", blob(1))])
            with pytest.raises(SerializationError, match="b has 1048576 buffers, a message takes 1048575"):
                await pool.put(address, [("b", Payload(b"h", [b"x"] * DATA_LIMITS.frames))])
            await pool.put(address, [("c", blob(1))])
            assert set(store.values) == {"a", "c"}
            assert len(node.peers) == 1
            await pool.close()

    run(main())


def test_closing_the_pool_ends_requests_and_dials() -> None:
    async def main() -> None:
        store = Store()
        store.values[1] = blob(200 << 20)
        async with listening("tcp", data_server=store.server()) as (_, address):
            pool = pool_of()
            await pool.get(address, ["x"])
            getting = asyncio.ensure_future(pool.get(address, [1]))
            dialing = asyncio.ensure_future(pool.get("tcp://127.0.0.2:9", [1]))
            await until(lambda: 1 in store.reads)
            await pool.close()
            for waiting in (getting, dialing):
                with pytest.raises(CommError):
                    await waiting

    run(main())


@every_scheme
def test_many_requests_on_one_link_pause_its_reading(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_server, "REQUESTS_PER_LINK", 4)
    monkeypatch.setattr(data_messages, "CUT_BYTES", 1 << 20)

    async def main() -> None:
        store = Store()
        store.values.update({number: blob(1 << 20) for number in range(4)})
        async with listening(scheme, data_server=store.server()) as (_, address):
            pool = pool_of()
            outcomes = await asyncio.gather(*(pool.get(address, [0, 1, 2, 3]) for _ in range(40)))
            assert all(len(fetched.values) == 4 for fetched in outcomes)
            await pool.close()

    run(main())


ASK = Codec(ops.DataRequest)
BAD_REQUESTS = [
    ("no batch", [b"\xc1"], "not a batch of ops"),
    ("fewer frames than told", [ASK.encode(0, 0, [ops.PutData(1, ["a"], [b"h"], [2])]), b"x"], "1 frames and counts of 2"),
    ("negative count", [ASK.encode(0, 0, [ops.PutData(1, ["a", "b"], [b"h", b"h"], [-1, 2])]), b"x"], "counts of 1"),
    ("fewer headers than keys", [ASK.encode(0, 0, [ops.PutData(1, ["a"], [], [0])])], "1 keys with 0 headers"),
    ("an answer", [ASK.encode(0, 0, [ops.DataPut(1)])], "unknown op, tag 123"),
]  # fmt: skip


@every_scheme
@pytest.mark.parametrize(
    ("frames", "says"), [case[1:] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS]
)
def test_bad_request_is_told(scheme: str, frames: list[bytes], says: str) -> None:
    class Asking:
        messages: list[list[memoryview]] = []
        ended: Exception | None = None

        def message_received(self, frames: list[memoryview]) -> None:
            self.messages = [*self.messages, frames]

        def comm_ended(self, error: Exception) -> None:
            self.ended = error

    async def main() -> None:
        store = Store()
        async with listening(scheme, data_server=store.server()) as (_, address):
            request = LinkRequest(ops.DataIntroduction("raw"), new_instance_id(), b"")
            dialed = await links.dial(address, request, security=SECURITY, config=CONFIG, limits=DATA_LIMITS)
            asking = Asking()
            dialed.comm.set_handler(asking)
            dialed.comm.resume_receiving()
            dialed.comm.send(frames)
            await until(lambda: asking.ended)
            (goodbye,) = Codec(ops.DataReply).decode_untrusted(asking.messages[-1][0])[2]
            assert says in goodbye.reason
            await dialed.comm.close()
            assert store.values == {}

    run(main())


ANSWER = Codec(ops.DataReply)
BAD_ANSWERS = [
    ("a key that was not asked for", [ANSWER.encode(0, 0, [ops.DataSent(1, ["z"], [b"h"], [0])])], "key 'z', which was not"),
    ("a request that was never made", [ANSWER.encode(0, 0, [ops.DataSent(9, [], [], [])])], "request 9, which was never made"),
    ("reasons missing", [ANSWER.encode(0, 0, [ops.DataSent(1, [], [], [], [], ["a"], [])])], "1 failures with 0 reasons"),
    ("bytes that are no batch", [b"\x00"], "not a batch"),
    ("a put that was never made", [ANSWER.encode(0, 0, [ops.DataPut(9)])], "request 9, which was never made"),
    ("goodbye", [ANSWER.encode(0, 0, [ops.Goodbye("leaving")])], "closed the data link: leaving"),
]  # fmt: skip


@pytest.mark.parametrize(("frames", "says"), [case[1:] for case in BAD_ANSWERS], ids=[case[0] for case in BAD_ANSWERS])
def test_bad_answer_fails_the_request(frames: list[bytes], says: str) -> None:
    class Lying(DataServer):
        def serve(self, comm: Any, *_: Any) -> None:
            class Handler:
                def message_received(self, received: list[memoryview]) -> None:
                    comm.send(frames)

                def comm_ended(self, error: Exception) -> None:
                    pass

            comm.set_handler(Handler())

    async def main() -> None:
        async with listening("tcp", data_server=Lying(lambda keys: [], lambda items: None)) as (_, address):
            pool = pool_of()
            with pytest.raises(CommError, match=says):
                await pool.get(address, ["a"])
            await pool.close()

    run(main())
