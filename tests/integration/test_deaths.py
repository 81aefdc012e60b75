"""Worker processes die, freeze and hold the GIL, under real work."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time

import pytest

from zmqtasks import Client, LocalCluster
from zmqtasks.errors import KilledWorker

PROTOCOLS = ["tcp", "zmq"]


def wait_until(condition, what, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        threading.Event().wait(0.01)
    return found


def pids(client):
    """Process ids of the workers, by address."""
    return {address: worker["pid"] for address, worker in client.scheduler_info()["workers"].items()}


def leaf(i):
    time.sleep(0.003)
    return i


def add(x, y):
    time.sleep(0.003)
    return x + y


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(60)


def hold_the_gil(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return os.getpid()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_graph_of_50_000_tasks_survives_a_kill_every_second(protocol):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed {seed}")
    leaves = 25_000
    killed = []
    done = threading.Event()
    with LocalCluster(n_workers=3, threads_per_worker=2, protocol=protocol) as cluster, Client(cluster) as client:

        def kill():
            until = time.monotonic() + 30
            while time.monotonic() < until and not done.wait(1.0):
                if alive := list(pids(client).values()):
                    pid = rng.choice(alive)
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    killed.append(pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            # a graph with 50,000 tasks, all futures but the last let go of: lost results are computed again along the tree
            level = client.map(leaf, range(leaves))
            while len(level) > 1:
                odd = level[-1:] if len(level) % 2 else []
                level = client.map(add, level[: len(level) // 2 * 2 : 2], level[1::2]) + odd
            assert level[0].result(timeout=240) == leaves * (leaves - 1) // 2
        finally:
            done.set()
            killer.join()
        counters = client.scheduler_info()["counters"]
        assert counters["submitted"] >= 2 * leaves - 1
        assert len(killed) >= 20, "the graph was through too early"
        assert counters["worker_deaths"] >= 0.8 * len(killed)


@pytest.fixture(params=[*PROTOCOLS, "unix"])
def client(request):
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol=request.param) as cluster, Client(cluster) as client:
        yield client


def test_a_task_that_kills_its_worker_fails_by_name_and_blames_nobody_else(client):
    others = client.map(leaf, range(200))
    killer = client.submit(die)
    after = client.map(leaf, range(200, 400))
    with pytest.raises(KilledWorker, match="SIGKILL") as raised:
        killer.result(timeout=60)
    assert "die" in str(raised.value)
    assert client.gather(others + after) == list(range(400))


def test_a_crash_is_told_from_a_kill(client):
    with pytest.raises(KilledWorker, match="SIGSEGV"):
        client.submit(die, signal.SIGSEGV).result(timeout=60)


def test_a_kill_is_noticed_within_a_second(client):
    wait_until(lambda: len(pids(client)) == 2, "two workers")
    address, pid = next(iter(pids(client).items()))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: address not in pids(client), "the death to be noticed", 10)
    assert time.monotonic() - killed < 1.0
    client.wait_for_workers(2)


def test_a_held_gil_and_a_frozen_process_are_not_deaths(client):
    wait_until(lambda: len(pids(client)) == 2, "two workers")
    (holder, holder_pid), (frozen, frozen_pid) = pids(client).items()
    deaths = client.scheduler_info()["counters"]["worker_deaths"]
    holding = client.submit(hold_the_gil, 5, workers=[holder])
    on_frozen = client.submit(time.sleep, 0.5, workers=[frozen])
    os.kill(frozen_pid, signal.SIGSTOP)
    try:
        assert holding.result(timeout=30) == holder_pid
    finally:
        os.kill(frozen_pid, signal.SIGCONT)
    on_frozen.result(timeout=30)
    assert pids(client) == {holder: holder_pid, frozen: frozen_pid}
    assert client.scheduler_info()["counters"]["worker_deaths"] == deaths


def test_nothing_is_computed_twice_while_a_worker_is_frozen_for_a_moment(client, tmp_path):
    log = tmp_path / "runs"

    def note(i):
        with log.open("a") as stream:
            stream.write(f"{i}\n")
        time.sleep(0.002)
        return i

    futures = client.map(note, range(500))
    pid = next(iter(pids(client).values()))
    os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(1.0)
    os.kill(pid, signal.SIGCONT)
    assert client.gather(futures) == list(range(500))
    assert sorted(map(int, log.read_text().split())) == list(range(500))
