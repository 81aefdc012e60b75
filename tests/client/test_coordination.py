"""Locks, semaphores and events between programs and tasks, in real processes."""

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
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from interrupting import Interrupt

from zmqtasks import Client, Event, LeaseError, LocalCluster, Lock, Semaphore


def read_line(stream: IO[str], timeout_s: float = 20.0) -> str:
    """The next line of a process; an empty one when there is none in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(timeout_s) else ""


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalCluster]:
    """Two workers of two threads."""
    with LocalCluster(n_workers=2, threads_per_worker=2) as cluster:
        yield cluster


@pytest.fixture
def client(shared: LocalCluster) -> Iterator[Client]:
    with Client(shared) as client:
        yield client


def count_up(path: str, lock: Lock) -> int:
    with lock:
        number = int(Path(path).read_text())
        time.sleep(0.001)
        Path(path).write_text(str(number + 1))
    return os.getpid()


def test_tasks_of_two_workers_lose_nothing_under_a_lock(client, tmp_path):
    path = tmp_path / "counter"
    path.write_text("0")
    lock = Lock(client=client)
    pids = client.gather(client.map(count_up, [str(path)] * 60, lock=lock))
    assert path.read_text() == "60"
    assert len(set(pids)) == 2
    assert lock.locked() is False


def test_two_clients_share_a_lock(client, shared):
    mine = Lock("shared", client=client)
    with Client(shared, set_as_default=False) as other, mine:
        theirs = Lock("shared", client=other)
        assert theirs.locked()
        assert theirs.acquire(blocking=False) is False
        before = time.monotonic()
        assert theirs.acquire(timeout="50ms") is False
        assert time.monotonic() - before >= 0.045  # clocks of event loops are some milliseconds coarse
        with pytest.raises(LeaseError, match="not acquired by this object"):
            theirs.release()
        waiting = threading.Thread(target=theirs.acquire)
        waiting.start()
        mine.release()
        waiting.join(10)
        assert not waiting.is_alive()
        assert mine.acquire(timeout=0) is False
        other.close()  # with the lock
        assert mine.acquire(timeout="10s") is True


def hold_and_tell(name: str) -> None:
    lock = Lock(name)
    lock.acquire()
    Event(f"{name}-held").set()
    time.sleep(600)


def test_a_lock_of_a_killed_worker_is_free_at_once():
    with LocalCluster(n_workers=1, threads_per_worker=1) as cluster, Client(cluster) as client:
        future = client.submit(hold_and_tell, "killed", idempotent=False)
        assert Event("killed-held").wait("30s")
        lock = Lock("killed")
        assert lock.locked()
        [pid] = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        assert lock.acquire(timeout="5s") is True
        lock.release()
        assert "KilledWorker" in repr(future.exception())


def wait_for(name: str) -> bool:
    return Event(name).wait("30s")


def test_tasks_that_wait_give_their_slots_back(client):
    waiting = client.map(wait_for, ["go"] * 8, key=[f"w{n}" for n in range(8)])  # for 4 slots
    assert client.submit(pow, 2, 3).result(timeout=20) == 8
    client.submit(Event.set, Event("go")).result(timeout=20)
    assert client.gather(waiting) == [True] * 8
    event = Event("go")
    assert event.is_set()
    event.clear()
    assert not event.is_set()
    assert event.wait(0.01) is False


def test_semaphores(client):
    semaphore = Semaphore(max_leases=2, name="s")
    copy = pickle.loads(pickle.dumps(semaphore))
    assert (copy.name, copy.max_leases) == ("s", 2)
    assert semaphore.acquire()
    assert copy.acquire(timeout=1)
    assert semaphore.get_value() == 2
    assert copy.acquire(timeout=0) is False
    with pytest.raises(LeaseError, match="max_leases=2, not 3"):
        Semaphore(3, "s").acquire()
    copy.release()
    with copy:
        assert semaphore.get_value() == 2
    assert semaphore.leases() == [client.name]
    assert Semaphore(name="free").leases() == []
    semaphore.close()
    with pytest.raises(LeaseError, match="was closed"):
        copy.acquire()
    assert Lock().name != Lock().name
    with pytest.raises(ValueError, match="leave it out"):
        Lock().acquire(blocking=False, timeout=1)


def test_an_interrupt_at_any_moment_leaves_nothing_behind(client):
    """Neither a lease that nobody knows of, nor a coroutine that was never awaited."""
    other = Lock("anywhere")
    number, interrupted = 1, True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while interrupted:
            lock, interrupt = Lock("anywhere"), Interrupt(number)
            with interrupt.armed():
                lock.acquire(timeout="5s")
            interrupted = interrupt.happened
            while lock._leases:  # it came last of all: the object has the lease
                lock.release()
            assert other.acquire(timeout="5s"), f"the lock is held after an interrupt at {interrupt.where}"
            other.release()
            number += 1
        gc.collect()
    assert number > 50
    assert [str(warning.message) for warning in caught] == []


def test_ctrl_c_gives_up(client, shared):
    lock = Lock("interrupted", client=client)
    lock.acquire()
    script = """
        import sys
        from zmqtasks import Client, ClusterKey, Lock, Security
        client = Client(sys.argv[1], security=Security(ClusterKey.from_hex(sys.stdin.readline())))
        lock = Lock("interrupted")
        try:
            print("waiting", flush=True)
            lock.acquire()
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
        lock.release()
        assert lock.acquire(timeout="10s")  # while that process lives: it is not in the line any more
        lock.release()
    finally:
        process.communicate("", timeout=20)


def test_asynchronous_use_and_cancelled_waits(shared):
    async def use() -> None:
        async with Client(shared, asynchronous=True) as client:
            first, second = Lock("async", client), Lock("async", client)
            async with first:
                assert await first.locked()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(second.acquire(), 0.05)
                assert await second.acquire(timeout="20ms") is False
                many = [Lock("async", client) for _ in range(1000)]
                order: list[int] = []

                async def take(number: int) -> None:
                    async with many[number]:
                        order.append(number)

                tasks = [asyncio.create_task(take(number)) for number in range(1000)]
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)
            assert order == list(range(1000))
            assert not await first.locked()
            event = Event("async-event", client)
            waiting = asyncio.create_task(event.wait())
            await event.set()
            assert await waiting is True

    asyncio.run(use())
