"""Links between hosts are cut: packets vanish, nobody is told. One worker is on another host (a network namespace)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.shells import Shell, start_scheduler
from zmqtasks import Client
from zmqtasks.testing.netns import Cable, cable, can_make_namespaces

PROTOCOLS = ["tcp", "zmq"]
needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip and nft")


@dataclass
class Hosts:
    cable: Cable
    client: Client
    here: str
    there: str


@contextmanager
def two_hosts(protocol: str) -> Iterator[Hosts]:
    """Scheduler, client and a worker here, a worker there."""
    with ExitStack() as stack:
        wire = stack.enter_context(cable())
        scheduler, address = start_scheduler("--host", wire.here, "--protocol", protocol)
        stack.enter_context(scheduler)
        stack.enter_context(Shell("worker", address, "--name", "here"))
        stack.enter_context(Shell("worker", address, "--name", "there", prefix=wire.prefix))
        with Client(address, timeout=30) as client:
            client.wait_for_workers(2, timeout=30)
            yield Hosts(wire, client, *(a for n in ("here", "there") for a in addresses(client, n)))
            client.shutdown()


def addresses(client, name):
    workers = client.scheduler_info()["workers"]
    return [address for address, worker in workers.items() if worker["name"].startswith(name)]


def wait_until(condition, what, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        threading.Event().wait(0.02)


def note(path, i):
    with open(path, "a") as stream:
        stream.write(f"{i}\n")
    time.sleep(0.02)
    return i


@needs_namespaces
@pytest.mark.parametrize("heartbeat_s", ["1", "15"], ids=["noticed", "unnoticed"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_link_cut_for_3_s_resumes_and_nothing_is_computed_twice(protocol, heartbeat_s, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMQTASKS_HEARTBEAT_S", heartbeat_s)
    log = str(tmp_path / "runs")
    with two_hosts(protocol) as hosts:
        futures = hosts.client.map(lambda i: note(log, i), range(300))
        wait_until(lambda: sum(f.done() for f in futures) > 50, "the first results")
        hosts.cable.cut()
        threading.Event().wait(3.0)
        hosts.cable.mend()
        assert hosts.client.gather(futures) == list(range(300))
        twice = [i for i, n in Counter((tmp_path / "runs").read_text().split()).items() if n != 1]
        assert not twice
        assert hosts.client.scheduler_info()["counters"]["worker_deaths"] == 0


@needs_namespaces
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_link_that_stays_cut_ends_with_the_work_done_elsewhere(protocol, monkeypatch):
    monkeypatch.setenv("ZMQTASKS_HEARTBEAT_S", "1")
    monkeypatch.setenv("ZMQTASKS_GRACE_S", "2")
    with two_hosts(protocol) as hosts:
        client = hosts.client
        there = client.submit(lambda: bytes(100_000), workers=[hosts.there], allow_other_workers=True)
        size = client.submit(len, there)
        assert size.result() == 100_000
        futures = client.map(lambda i: time.sleep(0.02) or i, range(300))
        hosts.cable.cut()
        assert client.gather(futures) == list(range(300))
        wait_until(lambda: list(client.scheduler_info()["workers"]) == [hosts.here], "the worker to be given up")
        assert len(there.result()) == 100_000  # computed again here
        hosts.cable.mend()
