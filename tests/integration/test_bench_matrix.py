"""`zmqtasks bench net --scheduler` on live clusters: four workers on four hosts (network namespaces), one of them slowed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.network.matrix import MatrixPlan, measure_matrix
from bench.network.probe import make_bytes
from tests.shells import Shell, start_scheduler
from zmqtasks import Client, LocalCluster, get_worker, wait
from zmqtasks.testing.netns import Host, can_make_namespaces, switch

needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip and nft")
DELAY_S = 0.005
MARK = 7


@dataclass
class FourHosts:
    scheduler: str
    hosts: list[Host]
    workers: list[Shell]


@contextmanager
def four_hosts(slow_down=lambda host: None, *, slow: int = 2) -> Iterator[FourHosts]:
    """A scheduler here, workers w0 to w3 on hosts of their own; one of them is slowed before it connects."""
    with ExitStack() as stack:
        net = stack.enter_context(switch(4))
        if (slowed := slow_down(net.hosts[slow])) is not None:
            stack.enter_context(slowed)
        scheduler, address = start_scheduler("--host", net.here)
        stack.enter_context(scheduler)
        workers = [
            stack.enter_context(
                Shell("worker", address, "--name", f"w{i}", "--no-nanny", "--nthreads", "1", prefix=host.prefix)
            )
            for i, host in enumerate(net.hosts)
        ]
        with Client(address, timeout=30, set_as_default=False) as client:
            client.wait_for_workers(4, timeout=30)
        yield FourHosts(address, net.hosts, workers)
        with Client(address, timeout=30, set_as_default=False) as client:
            client.shutdown()


@contextmanager
def delayed(host: Host) -> Iterator[None]:
    """Everything that the host sends or receives is held back by a proxy there."""
    command = [*host.prefix, sys.executable, "-m", "tests.delaying_proxy", str(DELAY_S), str(MARK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            host.redirect(int(proxy.stdout.readline()), MARK)
            yield
        finally:
            assert proxy.stdin is not None
            proxy.stdin.close()
            proxy.wait(30)


def bench(cluster: FourHosts, folder: Path, *options: str) -> tuple[dict, str]:
    """The document and what was printed."""
    path = folder / "net.json"
    command = [sys.executable, "-m", "zmqtasks", "bench", "net", "--scheduler", cluster.scheduler, "--quick"]
    done = subprocess.run(
        [*command, "--json", str(path), *options], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout


@needs_namespaces
def test_the_report_names_the_host_with_100_mbit(tmp_path):
    with four_hosts(lambda host: host.limit("100mbit")) as cluster:
        slow = cluster.hosts[2].address
        report, printed = bench(cluster, tmp_path, "--html", str(tmp_path / "net.html"))
    matrix = report["matrix"]
    assert matrix["workers"] == ["w0", "w1", "w2", "w3"]
    assert matrix["facts"]["pairs_measured"] == 12
    for number, row in enumerate(matrix["bandwidth"]):
        for other, value in enumerate(row):
            assert (value is None) == (number == other)
            if value is not None and 2 in (number, other):
                assert 1e6 < value < 13e6
    # The four hosts share this machine: what else runs on it may tell in the latencies, never in bandwidths so far apart.
    worst = next(found for found in matrix["judged"] if found["metric"] == "bandwidth")
    assert (worst["kind"], worst["direction"]) == ("host", "both")
    assert slow in worst["names"][0]
    assert "w2" in worst["text"]
    assert worst["text"] in matrix["findings"]
    flat = " ".join(printed.split())
    assert worst["text"] in flat
    assert worst["text"].split(":")[0] in (tmp_path / "net.html").read_text()
    assert matrix["facts"]["hosts"][worst["names"][0]]["interface"] == "eth0"
    encrypted = {link["encrypted"] for link in matrix["links"]}
    assert encrypted == {True}  # by default, between hosts


@needs_namespaces
def test_the_report_names_the_host_that_answers_late(tmp_path):
    with four_hosts(delayed, slow=1) as cluster:
        late = cluster.hosts[1].address
        report, _ = bench(cluster, tmp_path)
    found = [f for f in report["matrix"]["judged"] if f["kind"] == "host" and f["metric"] == "latency"]
    assert late in found[0]["names"][0]  # the worst one
    latency = report["matrix"]["latency_us"]
    assert all(latency[a][b] > 2e6 * DELAY_S for a, b in ((0, 1), (1, 0), (2, 1), (1, 3)))


@needs_namespaces
def test_workers_that_hang_or_die_are_named_and_the_others_are_measured():
    with four_hosts() as cluster, Client(cluster.scheduler, set_as_default=False) as client:
        pids = {worker["name"]: worker["pid"] for worker in client.scheduler_info()["workers"].values()}
        os.kill(pids["w3"], signal.SIGSTOP)
        try:
            plan = MatrixPlan(sizes=(1 << 20,), time_s=0.1, prepare_s=4.0)
            hanging = measure_matrix(client, plan)
        finally:
            os.kill(pids["w3"], signal.SIGCONT)

        def kill_one(number: int, of: int, text: str) -> None:
            if number == 1:
                os.kill(pids["w2"], signal.SIGKILL)

        began = time.monotonic()
        dying = measure_matrix(client, MatrixPlan(sizes=(1 << 20,), time_s=0.1), kill_one)
        assert time.monotonic() - began < 30
    assert hanging.facts["pairs_measured"] == 6
    assert (hanging.judged[0].kind, hanging.judged[0].names) == ("failed", ["w3"])
    failed = [link for link in dying.links if link.error]
    assert failed
    assert all(2 in (link.source, link.target) for link in failed)
    assert (dying.judged[0].kind, dying.judged[0].names) == ("failed", ["w2"])
    assert "left the cluster" in dying.judged[0].text


@contextmanager
def three_workers() -> Iterator[Client]:
    cluster = LocalCluster(n_workers=3, threads_per_worker=1)
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is for Linux")
def test_each_fetch_within_a_host_costs_a_copy():
    """The copy that another reader has would come for nothing, and say nothing of what the first reader pays."""
    size = 8 << 20

    def hold_two(address: str, key: str) -> bool:
        worker = get_worker()

        async def fetch() -> list[object]:
            return [await worker.data_pool.get(address, [key]) for _ in range(2)]

        worker.held = asyncio.run_coroutine_threadsafe(fetch(), worker.loop).result()
        return worker.data_pool.about(address).transport == "shm"

    def lent() -> int:
        from zmqtasks.transports.shm.own_arena import lent_bytes

        return lent_bytes()

    with three_workers() as client:
        source, target, _ = client.scheduler_info()["workers"]
        value = client.submit(make_bytes, size, key="value", workers=[source])
        wait([value])
        assert client.submit(hold_two, source, "value", workers=[target]).result()
        assert client.run(lent, workers=[source])[source] >= 2 * size


def test_nothing_is_left_on_the_workers():
    done: list[tuple[int, int]] = []
    plan = MatrixPlan(sizes=(1 << 20,), time_s=0.05)
    with three_workers() as client:
        matrix = measure_matrix(client, plan, lambda number, of, text: done.append((number, of)))
        deadline = time.monotonic() + 10
        while left := [key for keys in client.has_what().values() for key in keys]:
            assert time.monotonic() < deadline, left
            threading.Event().wait(0.02)
    assert done[:6] == [(number, 6) for number in range(1, 7)]  # links that look slow come once more
    assert not [link.error for link in matrix.links if link.error]
    assert all(link.bandwidth and link.latency_us for link in matrix.links)
    assert len(set(matrix.hosts)) == 1


def test_a_sample_and_all_at_once():
    plan = MatrixPlan(sizes=(1 << 16, 1 << 20, 1 << 40), time_s=0.3, pairs=4, together=True)
    with three_workers() as client:
        matrix = measure_matrix(client, plan)
        # Workers need not have the benchmarks: what they ran came by value.
        loaded = client.run(lambda: [name for name in sys.modules if name.partition(".")[0] in ("bench", "tests")])
        assert set(map(tuple, loaded.values())) == {()}
    assert matrix.facts["pairs_measured"] == 4
    assert matrix.facts["sizes"] == [1 << 20]  # the largest for which there is memory
    assert {size for link in matrix.links for size in link.by_size} == {1 << 20}
    assert all(link.bandwidth and link.latency_us for link in matrix.links)


def test_an_interruption_keeps_what_there_is():
    def after_two(number: int, of: int, text: str) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with three_workers() as client:
        matrix = measure_matrix(client, MatrixPlan(sizes=(1 << 20,), time_s=0.05), after_two)
        assert client.submit(abs, -1).result(timeout=10) == 1
    assert matrix.facts["interrupted"]
    assert matrix.facts["pairs_measured"] == 2


def test_ctrl_c_ends_the_command_with_what_there_is(tmp_path):
    path = tmp_path / "net.json"
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, protocol="tcp")
    with cluster, Client(cluster, set_as_default=False) as client:
        busy = client.submit(time.sleep, 60, workers=[next(iter(client.nthreads()))])
        key_file = tmp_path / "key"
        with open(key_file, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            stream.write(cluster.security.key.hex() + "\n")
        options = ["--scheduler", cluster.scheduler_address, "--key-file", str(key_file), "--json", str(path)]
        with Shell("bench", "net", *options) as command:
            # The values on the busy worker cannot be made yet: the run is in the middle.
            deadline = time.monotonic() + 30
            while not any("bench-net" in str(key) for keys in client.has_what().values() for key in keys):
                assert time.monotonic() < deadline, command.output
                threading.Event().wait(0.02)
            command.send(signal.SIGINT)
            assert command.wait_exit() == 130
            assert "Traceback" not in command.output
        assert not busy.done()
    report = json.loads(path.read_text())
    assert report["complete"] is False
    assert report["matrix"]["facts"]["pairs_measured"] == 0
