"""Actors on real clusters: calls in order, state in one place, deaths, errors; from programs, tasks and other actors."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zmqtasks import Actor, ActorFuture, ActorLostError, Client, LocalCluster, get_client, get_worker, wait


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers of one thread."""
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture
def mortal() -> Iterator[Client]:
    """A cluster for one test, which ends its processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[Client]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False) as cluster, Client(cluster) as client:
        yield client


class Counter:
    unit = "pieces"

    def __init__(self, start: int = 0, *, table: object = None) -> None:
        self.n = start
        self.table = np.zeros(50_000) if table is None else table
        self.seen: list[object] = []
        self.inside = 0

    def increment(self, by: int = 1) -> int:
        self.n += by
        return self.n

    def slowly(self, value: object) -> object:
        self.inside += 1
        assert self.inside == 1
        time.sleep(0.002)
        self.seen.append(value)
        self.inside -= 1
        return value

    def add_to_table(self, values: object) -> float:
        self.table += values
        return float(self.table.sum())

    def get_table(self) -> object:
        return self.table

    def fail(self, message: str) -> None:
        self._fail(message)

    def _fail(self, message: str) -> None:
        raise KeyError(message)

    def where(self) -> tuple[int, str, str]:
        return os.getpid(), get_worker().address, threading.current_thread().name

    def wait_for(self, path: str) -> str:
        deadline = time.monotonic() + 30
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.002)
        return path

    def say(self, text: str) -> None:
        print(text)

    def hold(self, thing: object) -> None:
        self.held = thing

    def ask_held(self, by: int) -> int:
        return self.held.increment(by).result()

    def ask_oneself(self, oneself: Actor) -> int:
        return oneself.increment().result(timeout=5)

    async def set_soon(self) -> None:
        await asyncio.sleep(0.01)
        self.event().set()

    async def wait_set(self) -> int:
        await self.event().wait()
        return self.n

    async def fail_later(self) -> None:
        await asyncio.sleep(0)
        self._fail("later")

    async def ask_held_async(self, by: int) -> int:
        return await self.held.increment(by)

    async def sleep_on(self) -> None:
        await asyncio.sleep(600)

    def event(self) -> asyncio.Event:
        if not hasattr(self, "_event"):
            self._event = asyncio.Event()
        return self._event

    @property
    def double(self) -> int:
        return 2 * self.n

    def __del__(self) -> None:
        if (path := os.environ.get("ZMQTASKS_TEST_GONE")) is not None:
            Path(path).touch()


def test_methods_attributes_and_state(client):
    future = client.submit(Counter, 5, actor=True)
    counter = future.result()
    assert isinstance(counter, Actor)
    call = counter.increment()
    assert isinstance(call, ActorFuture)
    assert call.result(timeout=10) == 6
    assert call.done()
    assert counter.increment(by=4).result() == 10
    assert (counter.n, counter.double, counter.unit) == (10, 20, "pieces")
    assert repr(counter).startswith("<Actor: Counter, key=")
    assert {"increment", "fail", "key"} <= set(dir(counter))
    assert not hasattr(counter, "no_such_thing")
    with pytest.raises(AttributeError, match="make a method that sets 'n'"):
        counter.n = 3
    assert future.result() == counter
    assert client.gather([future])[0].increment().result() == 11


def test_calls_run_one_at_a_time_in_the_order_in_which_they_arrive(client):
    counter = client.submit(Counter, actor=True).result()
    calls = [counter.slowly(i) for i in range(50)]
    assert client.gather(calls) == list(range(50))
    assert counter.seen == list(range(50))

    def call_many(actor: Actor, start: int) -> None:
        client.gather([actor.slowly(start + i) for i in range(20)])

    callers = [threading.Thread(target=call_many, args=(counter, start)) for start in (1000, 2000, 3000)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    seen = counter.seen[50:]
    assert sorted(seen) == [start + i for start in (1000, 2000, 3000) for i in range(20)]
    for start in (1000, 2000, 3000):
        assert [value for value in seen if start <= value < start + 20] == [start + i for i in range(20)]


def use(counter: Actor, by: int) -> int:
    assert isinstance(counter, Actor)
    return counter.increment(by).result()


async def use_async(counter: Actor, by: int) -> int:
    return await counter.increment(by)


def read(counter: Actor) -> int:
    return counter.n


def test_from_tasks_on_any_worker_by_its_future_or_itself(client):
    future = client.submit(Counter, actor=True)
    counter = future.result()
    workers = list(client.nthreads())
    calls = [client.submit(use, future, 1, workers=[worker]) for worker in workers for _ in range(3)]
    calls += [client.submit(use, counter, 1, workers=[worker]) for worker in workers]
    calls += [client.submit(use_async, future, 1, workers=[worker]) for worker in workers]
    assert sorted(client.gather(calls)) == list(range(1, 11))
    assert client.submit(read, {"a": [counter]}["a"][0]).result() == 10
    # Futures among the arguments of a call are what they stand for, as those of tasks are.
    assert counter.increment(client.submit(pow, 2, 3)).result() == 18
    assert client.submit(pow, counter.increment(2), 2).result() == 400


def test_an_actor_that_is_busy_can_be_passed_on(client, tmp_path):
    counter = client.submit(Counter, actor=True).result()
    gate = tmp_path / "gate"
    busy = counter.wait_for(str(gate))
    passed = [client.submit(isinstance, counter, Actor), client.submit(lambda actor: [actor], counter)]
    assert client.gather(passed, errors="raise") == [True, [counter]]
    gate.touch()
    assert busy.result(timeout=10) == str(gate)


def test_actors_call_each_other(client):
    places = zip((0, 100), client.nthreads(), strict=True)
    first, second = client.gather([client.submit(Counter, n, workers=[place], actor=True) for n, place in places])
    assert first.where().result()[1] != second.where().result()[1]
    first.hold(second).result()
    assert first.ask_held(5).result() == 105
    assert first.ask_held_async(5).result() == 110
    del second
    gc.collect()
    assert client.submit(use, first, 1).result() == 1
    assert first.ask_held(1).result() == 111  # the one that is held stays
    with pytest.raises(RuntimeError, match="waits for the method that waits for it"):
        first.ask_oneself(first).result(timeout=10)


def test_async_methods_wait_for_each_other(client):
    counter = client.submit(Counter, 7, actor=True).result()
    waiting = counter.wait_set()
    assert counter.increment().result() == 8
    counter.set_soon()
    assert waiting.result(timeout=10) == 8
    with pytest.raises(KeyError, match="later") as caught:
        counter.fail_later().result()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["fail_later", "_fail"]
    assert "_perform" not in names
    endless = counter.sleep_on()
    endless.cancel()
    assert endless.cancelled()
    assert counter.increment().result() == 9


def test_errors_come_back_with_their_traceback_and_the_actor_lives_on(client):
    counter = client.submit(Counter, actor=True).result()
    with pytest.raises(KeyError, match="no such") as caught:
        counter.fail("no such").result()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["fail", "_fail"]
    assert isinstance(counter.fail("x").exception(), KeyError)
    assert counter.increment().result() == 1
    with pytest.raises(TypeError, match="unexpected keyword"):
        client.submit(Counter, colour=1, actor=True).result()
    with pytest.raises(TypeError, match="must be a class"):
        client.submit(3, actor=True)


def test_results_are_what_they_were_and_large_ones_go_as_data(client):
    counter = client.submit(Counter, actor=True).result()
    before = counter.get_table()
    wait(before)
    assert counter.add_to_table(np.ones(50_000)).result() == 50_000  # an argument of 400 kB
    after = counter.get_table()
    wait(after)
    counter.add_to_table(1).result()
    assert before.result().sum() == 0
    assert after.result().sum() == 50_000
    big = client.submit(Counter, table=np.arange(1_000_000.0), actor=True).result()
    assert client.submit(np.sum, big.get_table()).result() == np.arange(1_000_000.0).sum()


def test_a_call_leaves_the_threads_of_its_worker_to_tasks_and_does_not_wait_for_them(client, tmp_path):
    counter = client.submit(Counter, actor=True).result()
    _, address, name = counter.where().result()
    assert name == "zmqtasks-actor-Counter"
    gate = str(tmp_path / "gate")
    holding = counter.wait_for(gate)
    assert client.submit(pow, 2, 5, workers=[address]).result(timeout=10) == 32
    Path(gate).touch()
    assert holding.result(timeout=10) == gate
    gate += "-2"
    busy = client.submit(Counter.wait_for, None, gate, workers=[address])
    assert counter.increment().result(timeout=10) == 1
    Path(gate).touch()
    busy.result(timeout=10)


def set_environment(name: str, value: str) -> None:
    os.environ[name] = value


def test_the_object_goes_with_the_last_future(client, tmp_path, eventually):
    client.run(set_environment, "ZMQTASKS_TEST_GONE", str(tmp_path / "gone"))
    counter = client.submit(Counter, actor=True).result()
    copies = [pickle.loads(pickle.dumps(counter)), client.submit(use, counter, 1)]
    wait(copies[1])
    del counter
    gc.collect()
    assert copies[0].increment().result() == 2
    call = copies[0].slowly("last")
    copies.clear()
    assert call.result(timeout=10) == "last"
    del call
    gc.collect()
    eventually((tmp_path / "gone").exists)
    eventually(lambda: client.scheduler_info()["tasks"]["memory"] == 0)


def actors_of(client: Client) -> list[int]:
    client.run(gc.collect)
    return [worker["metrics"]["actors"] for worker in client.scheduler_info()["workers"].values()]


def test_many_actors_are_spread_evenly(client, eventually):
    eventually(lambda: actors_of(client) == [0, 0])  # those of other tests
    counters = client.gather(client.map(Counter, range(20), actor=True))
    places = [address for _, address, _ in client.gather([counter.where() for counter in counters])]
    assert {places.count(place) for place in places} == {10}
    assert actors_of(client) == [10, 10]
    (address,) = client.gather([client.submit(Counter, actor=True, workers=[places[0]]).result().where()])[0][1:2]
    assert address == places[0]


def test_what_methods_print_comes_to_the_client(client, capfd, eventually):
    counter = client.submit(Counter, actor=True).result()
    counter.say("hello from the actor").result()
    seen = []
    eventually(lambda: seen.append(capfd.readouterr().out) or "hello from the actor" in "".join(seen))


def test_calls_of_an_actor_whose_worker_died_fail_and_nothing_is_made_again_by_itself(mortal, tmp_path):
    future = mortal.submit(Counter, 1, actor=True, key="my-counter")
    counter = future.result()
    other = next(a for a in mortal.nthreads() if a != counter.where().result()[1])
    held = mortal.submit(use, future, 1, workers=[other])
    assert held.result() == 2
    table = counter.get_table()  # large: held by that worker alone
    wait(table)
    running = counter.wait_for(str(tmp_path / "never"))
    queued = counter.increment()
    pid = mortal.run(os.getpid, workers=[next(iter(mortal.who_has([future]).values()))[0]]).popitem()[1]
    os.kill(pid, signal.SIGKILL)
    for call in (running, queued):
        with pytest.raises(ActorLostError, match=r"actor my-counter is lost with its worker .*: killed by SIGKILL"):
            call.result(timeout=20)
    with pytest.raises(ActorLostError, match=r"client\.retry"):
        counter.increment().result(timeout=20)
    with pytest.raises(ActorLostError):
        mortal.submit(use, future, 1).result(timeout=20)
    with pytest.raises(ActorLostError):
        table.result(timeout=20)
    assert future.status == "error"
    assert held.result() == 2
    future.retry()
    assert counter.increment().result(timeout=20) == 2  # a new object, from the same arguments
    mortal.restart()
    with pytest.raises(Exception, match=r"is gone: .*restarted"):
        counter.increment()


def test_a_result_that_is_lost_is_not_computed_by_calling_again(mortal, tmp_path):
    counter = mortal.submit(Counter, actor=True).result()
    _, address, _ = counter.where().result()
    other = next(a for a in mortal.nthreads() if a != address)
    table = counter.get_table()
    derived = mortal.submit(np.add, table, 1, workers=[other])
    wait(derived)
    victim = mortal.run(os.getpid, workers=[other])[other]
    del table
    gc.collect()
    mortal.run(gc.collect)
    os.kill(victim, signal.SIGKILL)  # the sum is lost, and what it was made of is released
    with pytest.raises(
        ActorLostError, match=r"the result of Counter.get_table\S* is lost, and methods .* not called again"
    ):
        derived.result(timeout=20)
    assert counter.increment().result(timeout=20) == 1


def test_actors_in_threads_of_this_process(threads):
    future = threads.submit(Counter, actor=True)
    counter = future.result()
    assert threads.gather([counter.slowly(i) for i in range(20)]) == list(range(20))
    assert sorted(threads.gather([threads.submit(use, future, 1) for _ in range(6)])) == [1, 2, 3, 4, 5, 6]
    other = threads.submit(Counter, 10, actor=True).result()
    other.hold(counter).result()
    assert other.ask_held(1).result(timeout=10) == 7
    assert counter.n == 7


def test_an_asynchronous_client(cluster):
    async def program() -> None:
        async with Client(cluster, asynchronous=True) as client:
            counter = await client.submit(Counter, actor=True)
            assert await counter.increment() == 1
            assert await asyncio.gather(*[counter.increment() for _ in range(3)]) == [2, 3, 4]
            assert await counter.n == 4
            assert await counter.increment().result() == 5

    asyncio.run(program())


def local_use() -> list[int]:
    client = get_client()
    counter = client.submit(Counter, actor=True).result()
    return [counter.increment().result() for _ in range(3)]


def test_a_task_makes_an_actor_of_its_own(client):
    assert client.submit(local_use).result(timeout=20) == [1, 2, 3]


def cut_link(dask_worker) -> None:
    dask_worker.loop.call_soon_threadsafe(dask_worker.channel._comm.abort, "cut by a test")


def cut_own_link(client: Client) -> None:
    """In the loop, which alone changes links."""
    channel = client._node.channel
    assert channel is not None
    if channel._comm is not None:  # else it is still cut
        channel._comm.abort("cut by a test")


def test_calls_are_made_once_and_in_order_whatever_happens_to_links(client):
    counter = client.submit(Counter, actor=True).result()
    _, address, _ = counter.where().result()
    calls = []
    for number in range(200):
        calls.append(counter.slowly(number))
        if number in (20, 120):
            client._node.loop.call_soon_threadsafe(cut_own_link, client)
        if number in (60, 130):
            client.run(cut_link, workers=[address], wait=False)
    assert client.gather(calls) == list(range(200))
    assert counter.seen == list(range(200))
    assert client._node._link_lost_at > 0
