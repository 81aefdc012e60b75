"""A worker node against a peer that speaks the scheduler's side: real links, real threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.nodes.scheduler_stub import CONFIG, DEADLINE_S, Link, SchedulerStub, scheduler
from zmqtasks import worker_api
from zmqtasks.errors import ConnectError, SchedulerLostError
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import DataPool
from zmqtasks.nodes.worker.addresses import listen_address_for
from zmqtasks.nodes.worker.node import WorkerNode
from zmqtasks.protocol.failures import load_exception
from zmqtasks.protocol.ops import (
    CallFinished,
    CallFunction,
    CancelRuns,
    ComputeTasks,
    DataAdded,
    FetchFailed,
    FreeKeys,
    Inputs,
    LogMessages,
    Peers,
    RetractRuns,
    RunsDropped,
    RunsExecuting,
    StopWorker,
    TaskBlocked,
    TaskErred,
    TaskResumed,
    TasksFinished,
    UpdateLocations,
    WorkerMetrics,
)
from zmqtasks.protocol.serialize import KeyRef, deserialize, deserialize_inline, serialize, serialize_inline
from zmqtasks.testing.comms import wait_until

ADDRESSES = ["tcp://127.0.0.1:0", "inproc://"]

gates: dict[str, threading.Event] = {}
"""Tasks run in this process, and wait for what tests set here."""


def gate(name: str) -> threading.Event:
    return gates.setdefault(name, threading.Event())


@pytest.fixture(autouse=True)
def _open_gates() -> Any:
    gates.clear()
    yield
    for event in gates.values():
        event.set()


def hold(name: str, value: Any = None) -> Any:
    assert gate(name).wait(DEADLINE_S)
    return value


@asynccontextmanager
async def cluster(
    n_workers: int = 1, address: str = "tcp://127.0.0.1:0", **options: Any
) -> AsyncIterator[tuple[SchedulerStub, list[Link], list[WorkerNode]]]:
    async with scheduler(address) as (stub, where):
        nodes = [WorkerNode(where, security=stub.security, config=CONFIG, **options) for _ in range(n_workers)]
        try:
            for node in nodes:
                await node.start()
            yield stub, await stub.wait_workers(n_workers), nodes
        finally:
            for event in gates.values():
                event.set()
            for node in nodes:
                await node.close("the test is over")


def every_address(test: Callable[[str], Awaitable[None]]) -> Callable[..., None]:
    @pytest.mark.parametrize("address", ADDRESSES)
    def run(address: str) -> None:
        asyncio.run(test(address))  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


def on_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@every_address
async def test_it_introduces_itself_and_runs_tasks(address: str) -> None:
    async with cluster(address=address, nthreads=2, resources={"GPU": 1}, name="alice") as (_, [link], [node]):
        introduction = link.introduction
        assert (introduction.name, introduction.nthreads, introduction.resources) == ("alice", 2, {"GPU": 1.0})
        assert introduction.data_address == node.address
        assert node.address.split("://")[0] == address.split("://")[0]
        args = [serialize_inline(((number,), {})) for number in (5, 6)]
        link.compute(lambda x: x * 2, [1, 2], args=b"".join(args), args_lengths=[len(a) for a in args])
        values = {}
        for _ in range(2):
            finished = await link.take(TasksFinished)
            offset = 0
            for run_id, length in zip(finished.run_ids, finished.lengths, strict=True):
                values[run_id] = deserialize_inline(finished.values[offset : offset + length])
                offset += length
            if len(values) == 2:
                break
        assert values == {1: 10, 2: 12}
        metrics = await link.take(WorkerMetrics)
        assert metrics.memory_bytes > 1 << 20


@every_address
async def test_inputs_come_from_peers_and_make_replicas(address: str) -> None:
    async with cluster(2, address=address) as (_, [one, two], [first, second]):
        one.compute(lambda: b"x" * 100_000, [1])
        finished = await one.take(TasksFinished)
        assert finished.lengths == [-1]
        assert finished.sizes[0] >= 100_000
        two.send(Peers([7], [first.address]), Inputs(["k1"], [100_000], [[7]]))
        two.compute(len, [2], dep_counts=[1], deps=["k1"])
        assert (await two.take(DataAdded)).keys == ["k1"]
        finished = await two.take(TasksFinished)
        assert deserialize_inline(finished.values) == 100_000
        # The first worker's copy may go now: the second one has its own.
        one.send(FreeKeys(["k1"]))
        two.compute(len, [3], dep_counts=[1], deps=["k1"])
        await two.take(TasksFinished, lambda op: op.run_ids == [3])
        assert "k1" in second._store.entries


@on_loop
async def test_inline_inputs_are_gone_after_their_last_run() -> None:
    async with cluster() as (_, [link], [node]):
        value = serialize_inline([1, 2, 3])
        link.send(Inputs(["a"], [len(value)], [[]], [len(value)], value))
        args = serialize_inline(((KeyRef(0), KeyRef(0)), {}))
        link.compute(lambda x, y: x + y, [1], dep_counts=[1], deps=["a"], args=args, args_lengths=[len(args)])
        finished = await link.take(TasksFinished)
        assert deserialize_inline(finished.values) == [1, 2, 3, 1, 2, 3]
        await wait_until(lambda: set(node._store.entries) == {"k1"}, "the books were not kept")


@on_loop
async def test_an_input_that_a_peer_lost_or_that_went_with_it_is_reported_and_found_elsewhere() -> None:
    async with cluster(3) as (_, [one, _, three], nodes):
        one.compute(lambda: 42, [1])
        await one.take(TasksFinished)
        three.send(Peers([1, 2, 9], [nodes[0].address, nodes[1].address, "tcp://127.0.0.1:1"]))
        three.send(Inputs(["k1"], [8], [[2]]))
        three.compute(lambda x: x + 1, [5], dep_counts=[1], deps=["k1"])
        assert await three.take(FetchFailed) == FetchFailed(["k1"], 2, True)
        three.send(UpdateLocations(["k1"], [[9]]))
        assert await three.take(FetchFailed) == FetchFailed(["k1"], 9, False)
        three.send(UpdateLocations(["k1"], [[]]), UpdateLocations(["k1"], [[1]]))
        assert deserialize_inline((await three.take(TasksFinished)).values) == 43


@on_loop
async def test_a_result_that_cannot_be_pickled_stays_and_says_why_it_cannot_leave() -> None:
    async with cluster(2) as (_, [one, two], [first, _second]):
        one.compute(threading.Lock, [1])
        assert (await one.take(TasksFinished)).lengths == [-1]
        one.compute(lambda lock: type(lock).__name__, [2], dep_counts=[1], deps=["k1"])
        assert deserialize_inline((await one.take(TasksFinished)).values) == "lock"
        two.send(Peers([1], [first.address]), Inputs(["k1"], [8], [[1]]))
        two.compute(repr, [3], dep_counts=[1], deps=["k1"])
        error = (await two.take(TaskErred)).error
        assert error.kind == "SerializationError"
        assert "lock" in error.text
        assert "k1" in error.text


@on_loop
async def test_errors_name_the_exception_and_carry_it() -> None:
    async with cluster() as (_, [link], _):
        link.compute(lambda: {}["missing"], [1])
        erred = await link.take(TaskErred)
        assert (erred.run_id, erred.error.text) == (1, "KeyError: 'missing'")
        assert isinstance(load_exception(erred.error.payload)[0], KeyError)


@on_loop
async def test_retraction_and_cancellation_answer_each_run_once() -> None:
    async with cluster() as (_, [link], [node]):
        node.executor.functions[b"hold"] = hold
        args = serialize_inline((("a",), {}))
        link.send(
            ComputeTasks(b"hold", "hold", ["h"], [1], [0], args, [len(args)]),
        )
        assert (await link.take(RunsExecuting)).run_ids == [1]
        link.compute(lambda: 1, [2, 3, 4])
        link.send(RetractRuns([1, 2, 77]), CancelRuns([3]))
        dropped = sorted([*(await link.take(RunsDropped)).run_ids, *(await link.take(RunsDropped)).run_ids])
        assert dropped == [2, 3]
        link.send(CancelRuns([1]))
        await link.wait(lambda: node._machine.runs[1].cancelled)
        gate("a").set()
        assert (await link.take(RunsDropped)).run_ids == [1]
        assert (await link.take(TasksFinished)).run_ids == [4]
        node.executor.drain()  # a single answer goes out before the books are kept
        assert set(node._store.entries) == {"k4"}


@on_loop
async def test_a_task_that_waits_is_reported_and_others_run_meanwhile() -> None:
    def wait(name: str) -> str:
        with worker_api.waiting():
            hold(name)
        return "waited"

    async with cluster() as (_, [link], [node]):
        node.executor.functions[b"wait"] = wait
        args = serialize_inline((("a",), {}))
        link.send(ComputeTasks(b"wait", "wait", ["w"], [1], [0], args, [len(args)]))
        assert await link.take(TaskBlocked) == TaskBlocked(1)
        link.compute(lambda: 1, [2])
        assert (await link.take(TasksFinished)).run_ids == [2]
        gate("a").set()
        assert await link.take(TaskResumed) == TaskResumed(1)
        assert (await link.take(TasksFinished)).run_ids == [1]


@on_loop
async def test_print_and_warn_reach_the_scheduler_before_the_result() -> None:
    def speak() -> None:
        worker_api.print("hello", 1, sep="-", end="")
        with pytest.warns(UserWarning, match="careful"):
            worker_api.warn("careful")

    async with cluster() as (_, [link], [node]):
        node.executor.functions[b"speak"] = speak
        link.send(ComputeTasks(b"speak", "speak", ["s"], [1], [0]))
        await link.wait(lambda: any(isinstance(op, TasksFinished) for op in link.ops))
        before = [op for op in link.ops if not isinstance(op, WorkerMetrics)]
        records = [record for op in before[:-1] if isinstance(op, LogMessages) for record in op.records]
        assert isinstance(before[-1], TasksFinished)
        assert [(r.level, r.text, r.category, r.worker) for r in records] == [
            (0, "hello-1", "", node.address),
            (30, "careful", "UserWarning", node.address),
        ]


@on_loop
async def test_functions_outside_of_tasks() -> None:
    def call(x: int, *, dask_worker: Any) -> Any:
        assert worker_api.get_worker() is dask_worker
        return x + dask_worker.nthreads

    async def coroutine() -> str:
        await asyncio.sleep(0)
        return "async"

    def fail() -> None:
        raise SystemExit("no")

    async with cluster() as (_, [link], _):
        for number, function in enumerate([call, coroutine, fail]):
            args = (5,) if function is call else ()
            link.send(CallFunction(number, serialize_inline((function, args, {}))))
        answers = sorted([await link.take(CallFinished) for _ in range(3)], key=lambda answer: answer.call)
        assert [answer.erred for answer in answers] == [False, False, True]
        assert deserialize_inline(answers[0].result) == 6
        assert deserialize_inline(answers[1].result) == "async"
        assert isinstance(load_exception(answers[2].result)[0], SystemExit)


@every_address
async def test_data_can_be_put_and_got(address: str) -> None:
    async with cluster(address=address) as (stub, [link], [node]):
        pool = DataPool(security=stub.security, config=CONFIG, instance_id=new_instance_id(), name="test")
        try:
            await pool.put(node.address, [("d", serialize({"x": 1})), ("e", serialize(b"y" * 10))])
            assert (await link.take(DataAdded)).keys == ["d", "e"]
            link.compute(lambda d: d["x"], [1], dep_counts=[1], deps=["d"])
            assert deserialize_inline((await link.take(TasksFinished)).values) == 1
            fetched = await pool.get(node.address, ["e", "k1", "nope"])
            assert {key: deserialize(value) for key, value in fetched.values.items()} == {"e": b"y" * 10, "k1": 1}
            assert fetched.missing == ["nope"]
        finally:
            await pool.close()


@on_loop
async def test_get_worker_in_a_task_and_in_its_own_threads() -> None:
    async with cluster() as (_, [link], [node]):

        def look() -> bool:
            found = []
            helper = threading.Thread(target=lambda: found.append(worker_api.get_worker()))
            helper.start()
            helper.join()
            return worker_api.get_worker() is node and found == [node] and worker_api.current_key() == "w"

        node.executor.functions[b"look"] = look
        link.send(ComputeTasks(b"look", "look", ["w"], [1], [0]))
        assert deserialize_inline((await link.take(TasksFinished)).values) is True


@on_loop
async def test_it_ends_when_told_and_when_the_scheduler_is_gone() -> None:
    async with cluster(2) as (stub, [one, _two], [first, second]):
        one.send(StopWorker("enough"))
        async with asyncio.timeout(DEADLINE_S):
            assert await first.finished() is None
            await first.close("told to")
            await one.wait(lambda: one.ended)
            await stub.close()
            assert isinstance(await second.finished(), SchedulerLostError)


@on_loop
async def test_closing_does_not_wait_for_a_task_that_runs() -> None:
    async with cluster() as (_, [link], [node]):
        node.executor.functions[b"hold"] = hold
        args = serialize_inline((("a",), {}))
        link.send(ComputeTasks(b"hold", "hold", ["h"], [1], [0], args, [len(args)]))
        await link.take(RunsExecuting)
        async with asyncio.timeout(CONFIG.termination_s):
            await node.close("now")


class Proxy:
    """A TCP link between worker and scheduler that can be cut and mended."""

    def __init__(self, target: str) -> None:
        self._host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._port = int(port)
        self._pipes: set[asyncio.Task[None]] = set()
        self.cut = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.ensure_future(self._pump(source, sink))
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
        except OSError:
            pass
        finally:
            sink.transport.abort()

    async def break_links(self) -> None:
        self.cut = True
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)

    async def close(self) -> None:
        await self.break_links()
        self._server.close()
        await self._server.wait_closed()


@on_loop
async def test_it_works_on_while_its_link_is_cut_and_loses_nothing() -> None:
    async with scheduler() as (stub, where):
        proxy = Proxy(where)
        node = WorkerNode(
            await proxy.start(), security=stub.security, config=replace(CONFIG, grace_s=DEADLINE_S), nthreads=1
        )
        try:
            await node.start()
            [link] = await stub.wait_workers(1)
            node.executor.functions[b"hold"] = hold
            args = serialize_inline((("a",), {}))
            link.send(ComputeTasks(b"hold", "hold", ["h"], [1], [0], args, [len(args)]))
            link.compute(lambda: "after", [2, 3])
            await link.take(RunsExecuting)
            await proxy.break_links()
            async with asyncio.timeout(DEADLINE_S):
                while node.channel.connected:
                    await asyncio.sleep(0.005)
                gate("a").set()
                while node._machine.runs:
                    await asyncio.sleep(0.005)
            assert not any(isinstance(op, TasksFinished) for op in link.ops)
            proxy.cut = False
            answered: list[int] = []
            while len(answered) < 3:
                answered += (await link.take(TasksFinished)).run_ids
            assert answered == [1, 2, 3]
        finally:
            await node.close("the test is over")
            await proxy.close()


@pytest.mark.parametrize(
    ("scheduler_address", "wanted", "expected"),
    [
        ("tcp://127.0.0.1:5", None, "tcp://127.0.0.1:0"),
        ("tcp://localhost:5", "tcp://:77", "tcp://127.0.0.1:77"),
        ("tcp://[::1]:5", None, "tcp://[::1]:0"),
        ("tcp://127.0.0.1:5", "tcp://127.0.0.2:9", "tcp://127.0.0.2:9"),
        ("tcp://127.0.0.1:5", "zmq://:0", "zmq://127.0.0.1:0"),
        ("inproc://x", None, "inproc://"),
        ("inproc://x", "tcp://:0", "tcp://127.0.0.1:0"),
        ("unix://x", None, "unix://"),
        ("unix://x", "zmq://:0", "zmq://127.0.0.1:0"),
        ("tcp://127.0.0.1:5", "unix://:0", "unix://"),
        ("tcp://127.0.0.1:5", "unix://mine", "unix://mine"),
    ],
)
def test_where_it_listens(scheduler_address: str, wanted: str | None, expected: str) -> None:
    assert asyncio.run(listen_address_for(scheduler_address, wanted)) == expected


def test_a_scheduler_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(ConnectError, match="no-such-host"):
        asyncio.run(listen_address_for("tcp://no-such-host.invalid:5", None))
