"""Variables, queues and published datasets between programs and tasks, in real processes."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import selectors
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import IO

import numpy as np
import pytest

from zmqtasks import (
    CancelledError,
    Client,
    Event,
    Future,
    LocalCluster,
    LostDataError,
    Queue,
    QueueError,
    Variable,
    get_client,
    worker_client,
)
from zmqtasks.errors import ConfigError, PayloadTooLargeError


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalCluster]:
    """Two workers of two threads."""
    with LocalCluster(n_workers=2, threads_per_worker=2) as cluster:
        yield cluster


@pytest.fixture
def client(shared: LocalCluster) -> Iterator[Client]:
    with Client(shared) as client:
        yield client


@pytest.fixture
def other(shared: LocalCluster) -> Iterator[Client]:
    with Client(shared, set_as_default=False) as client:
        yield client


def live_keys(client: Client) -> int:
    return sum(client.scheduler_info()["tasks"].values())


# --- variables ------------------------------------------------------------------------------------------------------


def test_a_variable_keeps_futures_of_a_client_that_has_gone(client, shared):
    with Client(shared, set_as_default=False) as gone:
        Variable("kept", gone).set({"square": gone.submit(pow, 7, 2), "list": [1, "two"]})
    variable = Variable("kept")
    value = variable.get(timeout="5s")
    assert value["square"].result(timeout=10) == 49
    assert value["square"].client is client
    assert value["list"] == [1, "two"]
    variable.set(np.arange(10.0))  # while the future is held here
    assert value["square"].result(timeout=10) == 49
    array = variable.get()
    array += 1
    assert array.sum() == 55
    variable.delete()
    del value
    with pytest.raises(TimeoutError, match=r"the variable 'kept' was not set within 0\.05 s"):
        variable.get(timeout="50ms")
    assert pickle.loads(pickle.dumps(variable)).name == "kept"
    assert Variable().name != Variable().name


def set_soon(name: str) -> Future:
    with worker_client() as client:
        assert Variable(f"{name}-asked").get(timeout="20s") == "now"
        Variable(name).set([client.submit(pow, 2, 5), None])


async def wait_async(name: str) -> int:
    [future, _] = await Variable(name).get(timeout="20s")
    return await future


def wait_for(variable: Variable) -> int:
    return variable.get(timeout="20s")[0].result()


def test_tasks_set_and_wait(client):
    waiting = [client.submit(wait_for, Variable("tasks")) for _ in range(6)]  # on 4 slots, which they give back
    waiting.append(client.submit(wait_async, "tasks"))
    setting = client.submit(set_soon, "tasks")
    Variable("tasks-asked").set("now")
    assert client.gather(waiting) == [32] * 7
    setting.result(timeout=10)


def test_values_that_are_refused(client):
    variable = Variable("refused")
    limit = "over the limit of 65536 .*: scatter it"
    with pytest.raises(PayloadTooLargeError, match=f"the variable 'refused' takes .* {limit}"):
        variable.set(b"x" * 70_000)
    with pytest.raises(PayloadTooLargeError, match=f"the queue 'refused' takes 800000 bytes, {limit}"):
        Queue("refused").put(np.zeros(100_000))
    with pytest.raises(PayloadTooLargeError, match=f"the dataset 'refused' .* {limit}"):
        client.publish_dataset(refused="x" * 70_000)
    with pytest.raises(TypeError, match="cannot be pickled"):
        variable.set(threading.Lock())
    with pytest.raises(TypeError, match="give a text"):
        Variable(7)
    many = client.map(pow, range(500), [2] * 500)  # as many futures as fit into 64 KiB several times
    variable.set([(future, "x" * 500) for future in many])
    del many
    assert variable.get()[499][0].result(timeout=10) == 499**2
    variable.delete()


def test_cancelled_futures_and_failed_ones(client, other):
    blocked = client.submit(Event("cancelled-go").wait, "60s")
    failed = client.submit(pow, 1, 0, 0)
    Variable("v").set([blocked, failed])
    blocked.cancel()
    mine, wrong = Variable("v", other).get()
    assert mine.status == "pending"  # the cancellation was for the one client
    assert isinstance(wrong.exception(timeout=10), ValueError)
    mine.cancel(force=True, reason="enough")
    again = Variable("v").get()[0]
    with pytest.raises(CancelledError, match="enough"):
        again.result(timeout=10)
    Event("cancelled-go").set()
    released = client.submit(pow, 3, 3)
    released.cancel()
    Variable("v").set(released)
    with pytest.raises(LostDataError, match="released or cancelled"):
        Variable("v").get().result(timeout=10)
    Variable("v").delete()


# --- queues ---------------------------------------------------------------------------------------------------------


def produce(queue: Queue, numbers: list[int]) -> None:
    client = get_client()
    for number in numbers:
        queue.put((number, client.submit(pow, number, 2)), timeout="20s")


def consume(queue: Queue, count: int) -> list[tuple[int, int]]:
    found = []
    for _ in range(count):
        number, future = queue.get(timeout="20s")
        found.append((number, future.result()))
    return found


def test_tasks_put_and_take_through_a_bounded_queue(client):
    queue = Queue("tasks", maxsize=2)
    producers = [client.submit(produce, queue, list(range(first, 40, 2))) for first in (0, 1)]
    consumers = [client.submit(consume, queue, 20) for _ in range(2)]
    found = client.gather(consumers)
    client.gather(producers)
    assert sorted(found[0] + found[1]) == [(n, n * n) for n in range(40)]
    for taken in found:  # each producer's values in its order
        for parity in (0, 1):
            mine = [n for n, _ in taken if n % 2 == parity]
            assert mine == sorted(mine)
    assert queue.qsize() == 0


def test_order_bounds_batches_and_times(client, other):
    queue, theirs = Queue("q", maxsize=3), Queue("q", other)
    for number in range(3):
        queue.put(number)
    with pytest.raises(TimeoutError, match=r"the queue 'q' was full for 0\.05 s"):
        theirs.put(3, timeout="50ms")
    with pytest.raises(QueueError, match="in use with maxsize=3, not 4"):
        Queue("q", other, 4).put(0)
    assert (queue.qsize(), theirs.get(), theirs.get(batch=2), theirs.get(batch=True)) == (3, 0, [1, 2], [])
    with pytest.raises(TimeoutError, match=r"nothing was put in the queue 'q' within 0\.05 s"):
        theirs.get(timeout="50ms")
    putting = threading.Thread(target=lambda: [queue.put(number) for number in range(8)])
    putting.start()
    assert theirs.get(batch=7, timeout="10s") == list(range(7))  # more than it ever holds
    putting.join(10)
    with pytest.raises(TimeoutError, match="there were no 2 values"):
        theirs.get(timeout="50ms", batch=2)
    assert theirs.get(batch=True) == [7]
    copy = pickle.loads(pickle.dumps(queue))
    assert (copy.name, copy.maxsize) == ("q", 3)
    for wrong in (0, -1, "all"):
        with pytest.raises(ValueError, match="at least 1"):
            queue.get(batch=wrong)
    with pytest.raises(ConfigError, match="maxsize=-1"):
        Queue("q", maxsize=-1)


def test_close_is_for_all_who_use_it_and_a_new_one_begins_anew(client, other):
    queue, theirs = Queue("c"), Queue("c", other)
    before = live_keys(client)
    queue.put(client.submit(pow, 2, 2))
    assert theirs.qsize() == 1
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            theirs.get(batch=2)
        except QueueError as exc:
            raised.append(exc)

    waiting = threading.Thread(target=wait)
    waiting.start()
    queue.close()
    waiting.join(10)
    assert "the queue 'c' was closed" in str(raised)
    for use in (queue.qsize, queue.get, lambda: theirs.put(1), lambda: pickle.loads(pickle.dumps(theirs)).get()):
        with pytest.raises(QueueError, match="was closed"):
            use()
    assert live_keys(client) == before
    new = Queue("c")
    new.put("new")
    assert new.get() == "new"


def test_what_a_taker_cannot_read_stays(client):
    queue = Queue("unreadable")
    queue.put(Unreadable())
    with pytest.raises(ValueError, match="not here"):
        queue.get()
    assert queue.qsize() == 1
    queue.close()


class Unreadable:
    def __reduce__(self) -> tuple:
        return _raise, ()


def _raise() -> None:
    raise LookupError("not here")


def read_line(stream: IO[str], timeout_s: float = 20.0) -> str:
    """The next line of a process; an empty one when there is none in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(timeout_s) else ""


def test_ctrl_c_takes_nothing(client, shared):
    script = """
        import sys
        from zmqtasks import Client, ClusterKey, Queue, Security
        client = Client(sys.argv[1], security=Security(ClusterKey.from_hex(sys.stdin.readline())))
        queue = Queue("interrupted")
        queue.put("ready")
        try:
            print("waiting", flush=True)
            queue.get(batch=2)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), shared.scheduler_address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(shared.security.key.hex() + "\n")
        process.stdin.flush()
        assert read_line(process.stdout) == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert read_line(process.stdout) == "interrupted\n"
        queue = Queue("interrupted")
        assert queue.get(timeout="10s") == "ready"  # while that process lives: it has given it back
        queue.put(1)
        assert queue.get(timeout="10s") == 1
    finally:
        process.communicate("", timeout=20)


def test_asynchronous_use(shared):
    async def use() -> None:
        async with Client(shared, asynchronous=True) as client:
            queue, variable = Queue("async", client, maxsize=1), await Variable("async", client)
            getting = asyncio.create_task(queue.get())
            await queue.put(client.submit(pow, 2, 3))
            assert await (await getting) == 8
            await queue.put(1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queue.put(2), 0.05)
            assert await queue.qsize() == 1
            assert await queue.get(batch=True) == [1]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queue.get(), 0.05)
            await queue.put(3)
            assert await queue.get(timeout=5) == 3
            await queue.close()
            await variable.set((1, client.submit(pow, 3, 3)))
            assert await client.gather((await variable.get())[1]) == 27
            await variable.delete()
            await client.publish_dataset(number=client.submit(pow, 2, 4))
            assert await client.list_datasets() == ("number",)
            assert await (await client.get_dataset("number")) == 16
            with pytest.raises(TypeError, match="await get_dataset"):
                len(client.datasets)
            await client.unpublish_dataset("number")

    asyncio.run(use())


# --- datasets -------------------------------------------------------------------------------------------------------


def test_datasets_outlive_their_publisher(client, shared):
    with Client(shared, set_as_default=False) as gone:
        gone.publish_dataset(table=gone.scatter(np.arange(20_000)), sums=[gone.submit(sum, [1, 2])], note="hello")
        gone.publish_dataset(1.5, name=("tuple", 1))
        with pytest.raises(KeyError, match="a dataset 'note' already"):
            gone.publish_dataset(note="another")
        gone.publish_dataset("bye", name="note", override=True)
    assert client.list_datasets() == (("tuple", 1), "note", "sums", "table")
    assert client.get_dataset("table").result(timeout=10).sum() == 199_990_000
    assert client.get_dataset("sums")[0].result(timeout=10) == 3
    assert dict(client.datasets) == {name: client.get_dataset(name) for name in client.list_datasets()}
    assert client.datasets["note"] == "bye"
    client.datasets["note"] = ["set"]
    assert client.datasets["note"] == ["set"]
    assert "note" in client.datasets
    assert len(client.datasets) == 4
    for name in client.datasets:
        del client.datasets[name]
    assert client.list_datasets() == ()
    assert client.get_dataset("note", default=None) is None
    for missing in (client.get_dataset, client.unpublish_dataset):
        with pytest.raises(KeyError, match="there is no dataset 'note'"):
            missing("note")
    with pytest.raises(ValueError, match="name="):
        client.publish_dataset(1)


def in_task() -> float:
    return get_client().get_dataset("array").sum().compute()


def test_persisted_collections(client, shared, eventually):
    da = pytest.importorskip("dask.array", reason="needs the extra `dask`")
    with Client(shared, set_as_default=False) as gone:
        gone.publish_dataset(array=gone.persist(da.ones((400, 400), chunks=(20, 20)) + 1))
    assert client.get_dataset("array").sum().compute() == 320_000
    assert client.submit(in_task).result(timeout=20) == 320_000
    client.unpublish_dataset("array")

    def is_gone() -> bool:
        gc.collect()  # graphs of dask have cycles
        client.run(gc.collect)
        return live_keys(client) < 400

    eventually(is_gone)


# --- workers that die, and restarts ---------------------------------------------------------------------------------


def take_and_tell(name: str) -> None:
    Event(f"{name}-begun").set()
    Queue(name).get()


def test_a_killed_worker_and_a_restart():
    with LocalCluster(n_workers=1, threads_per_worker=2) as cluster, Client(cluster) as client:
        queue = Queue("killed")
        scattered = client.scatter([1, 2], hash=False)
        queue.put(client.submit(pow, 5, 2))
        queue.put(scattered)
        client.publish_dataset(ten=client.submit(int, "10"), plain="plain")
        client.gather(client.get_dataset("ten"))
        taker = client.submit(take_and_tell, "waited-for", idempotent=False)
        assert Event("waited-for-begun").wait("20s")
        [pid] = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        assert queue.get().result(timeout=30) == 25  # computed again
        with pytest.raises(LostDataError, match="the only worker that held the data is gone") as mine:
            scattered[0].result(timeout=30)
        with pytest.raises(LostDataError) as queued:
            queue.get()[0].result(timeout=30)
        assert str(queued.value).split(":")[-1] == str(mine.value).split(":")[-1]
        assert "KilledWorker" in repr(taker.exception(timeout=30))
        waited_for = Queue("waited-for")
        waited_for.put("not for the dead")
        assert waited_for.get(timeout="10s") == "not for the dead"
        assert client.get_dataset("ten").result(timeout=30) == 10
        client.restart()
        assert client.get_dataset("plain") == "plain"
        with pytest.raises(CancelledError, match="the cluster was restarted"):
            client.get_dataset("ten").result(timeout=30)
