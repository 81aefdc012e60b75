"""One peer that stands still: who sends to it keeps its memory, and everybody else their pace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqtasks import Client, Config, LocalCluster, wait
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import DataPool
from zmqtasks.protocol.frames import KIB, MIB

PROTOCOLS = ["tcp", "zmq"]
PEERS = 50


def memory_of(pid: int) -> int:
    """The anonymous memory of a process, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon:")))


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until_stopped(process: subprocess.Popen[str], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_stopped(process.pid):
        assert process.poll() is None, "it ended instead of stopping"
        assert time.monotonic() < deadline, f"not stopped within {timeout_s:g} s"
        time.sleep(0.01)


@contextlib.contextmanager
def peer(cluster: LocalCluster, role: str, address: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `flow_control_peers`, killed at the end."""
    script = Path(__file__).with_name("flow_control_peers.py")
    assert cluster.security.key is not None
    command = [sys.executable, str(script), role, address, cluster.security.key.hex(), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def answer_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def text(letter: str, size: int) -> str:
    return letter * size


def scheduler_pid(cluster: LocalCluster) -> int:
    return int(cluster._backend._started[0].pid)  # type: ignore[union-attr]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_frozen_peer_of_fifty_delays_none_and_costs_its_holder_little(protocol: str) -> None:
    """The values are made into bytes anew for each request, so what is queued shows in the worker's memory.

    They are too large for malloc to keep their memory when they are gone.
    """
    size, count = 40 * MIB, 10
    with LocalCluster(n_workers=1, threads_per_worker=1, protocol=protocol) as cluster, Client(cluster) as client:
        [(address, worker)] = client.scheduler_info()["workers"].items()
        large = client.map(text, ["x"] * count, [size] * count, key=[f"large-{i}" for i in range(count)])
        small = client.submit(text, "s", MIB, key="small")
        wait(large)
        assert len(small.result()) == MIB
        before = memory_of(worker["pid"])
        names = [f"large-{i}" for i in range(count)]
        with peer(cluster, "fetch", address, *names) as frozen:
            wait_until_stopped(frozen)
            longest_s, most = asyncio.run(_fetch_by_many(cluster, address, worker["pid"]))
            assert is_stopped(frozen.pid)
            print(f"longest {longest_s:.3f} s, {(most - before) / MIB:.0f} MiB of {count * size / MIB:.0f} MiB")
            assert longest_s < 5.0
            assert most - before < 128 * MIB
            os.kill(frozen.pid, signal.SIGCONT)
            assert answer_of(frozen) == count * size


async def _fetch_by_many(cluster: LocalCluster, address: str, pid: int) -> tuple[float, int]:
    """Fetches by 49 others: the longest that one value took, and the most memory that the worker had."""
    pools = [
        DataPool(security=cluster.security, config=Config(), instance_id=new_instance_id(), name=f"peer {number}")
        for number in range(PEERS - 1)
    ]
    longest_s = 0.0
    most = 0

    async def fetch(pool: DataPool) -> None:
        nonlocal longest_s, most
        for _ in range(5):
            began = time.monotonic()
            fetched = await pool.get(address, ["small"])
            longest_s = max(longest_s, time.monotonic() - began)
            most = max(most, memory_of(pid))
            assert list(fetched.values) == ["small"]

    async with asyncio.timeout(60):
        await asyncio.gather(*map(fetch, pools))
    for pool in pools:
        await pool.close()
    return longest_s, most


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_frozen_client_costs_the_scheduler_little_and_gets_everything_later(protocol: str) -> None:
    count, size = 100_000, 4_000
    with LocalCluster(n_workers=1, threads_per_worker=1, protocol=protocol) as cluster, Client(cluster) as client:
        scheduler = scheduler_pid(cluster)
        client.submit(abs, 1).result()
        before = memory_of(scheduler)
        with peer(cluster, "submit", cluster.scheduler_address, str(count), str(size)) as frozen:
            wait_until_stopped(frozen)
            longest_s, most = 0.0, 0
            deadline = time.monotonic() + 60
            while client.scheduler_info()["counters"]["finished"] < count:
                began = time.monotonic()
                assert client.submit(abs, -1, priority=1).result(timeout=30) == 1
                longest_s = max(longest_s, time.monotonic() - began)
                most = max(most, memory_of(scheduler))
                assert time.monotonic() < deadline
            assert is_stopped(frozen.pid)
            print(f"longest {longest_s:.3f} s, {(most - before) / MIB:.0f} MiB of {count * size / MIB:.0f} MiB")
            assert most - before < 256 * MIB
            assert longest_s < 5.0
            os.kill(frozen.pid, signal.SIGCONT)
            assert answer_of(frozen) == count


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_frozen_worker_costs_whoever_gives_it_data_little(protocol: str) -> None:
    count, size = 32, 8 * MIB
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol=protocol) as cluster, Client(cluster) as client:
        (first, worker), (second, _) = client.scheduler_info()["workers"].items()
        os.kill(worker["pid"], signal.SIGSTOP)
        try:
            arguments = (first, str(count), str(size))
            with peer(cluster, "scatter", cluster.scheduler_address, *arguments) as giver:
                assert giver.stdout is not None
                assert giver.stdout.readline() == "scattering\n"
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    assert client.submit(abs, -1, workers=[second]).result(timeout=10) == 1
                    assert giver.poll() is None
                os.kill(worker["pid"], signal.SIGCONT)
                extra = answer_of(giver)
                print(f"{extra / KIB:.0f} KiB beyond {count * size / MIB:.0f} MiB")
                assert extra < 48 * MIB
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGCONT)
