"""A worker behind a slow cable is sent, and sends, compressed data by itself; without the brake it soon does not."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from tests.integration.test_cut_links import needs_namespaces, two_hosts, wait_until
from zmqtasks.testing.netns import Cable

MIB = 1 << 20


def brake(wire: Cable, rate: str) -> None:
    """Both ends of the cable send no faster than `rate`."""
    bucket = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
    device = wire.device
    subprocess.run(["tc", "qdisc", "replace", "dev", f"{device}a", *bucket], check=True)
    subprocess.run([*wire.prefix, "tc", "qdisc", "replace", "dev", f"{device}b", *bucket], check=True)


def grid(rows):
    """A MiB for 128 rows, which lz4 makes 0.78 of at some 0.6 GB/s: worth the work up to about 0.1 GB/s."""
    return np.random.default_rng(rows).integers(0, 1 << 32, (rows, 1024))


def total(array):
    return int(array.sum())


@needs_namespaces
@pytest.mark.parametrize(("protocol", "rate"), [("tcp", "80mbit"), ("zmq", "80mbit"), ("tcp", None)])
def test_auto_compresses_on_a_slow_link_only(protocol: str, rate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if rate is None:  # on a busy machine encrypting is what makes a link slow, and this one shall be fast
        monkeypatch.setenv("ZMQTASKS_ENCRYPTION", "off")
    with two_hosts(protocol) as hosts:
        if rate:
            brake(hosts.cable, rate)
        rows = 1024 if rate else 4096
        for number in range(rows, rows + 4):  # 8 or 32 MiB each, the first to see how fast it goes
            made = hosts.client.submit(grid, number, workers=[hosts.here])
            used = hosts.client.submit(total, made, workers=[hosts.there])
            assert used.result(timeout=60) == total(grid(number))

        def counted() -> dict[str, float]:
            worker = hosts.client.scheduler_info()["workers"][hosts.here]
            return worker["metrics"]["compression"]

        if rate:
            wait_until(lambda: counted().get("compressed", 0) >= 3, "the worker compressed")
            assert counted()["ratio"] == pytest.approx(0.78, abs=0.02)
        else:
            wait_until(lambda: sum(counted().get(n, 0) for n in ("compressed", "declined_by_rate")) >= 4, "it counted")
            assert counted()["compressed"] == 0
