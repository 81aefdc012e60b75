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
    """A MiB for 128 rows, of which an eighth can be saved: not worth the work on a fast link."""
    made = np.random.default_rng(rows).integers(0, 1 << 62, (rows, 1024))
    made[:, 896:] = 0
    return made


def total(array):
    return int(array.sum())


@needs_namespaces
@pytest.mark.parametrize("rate", ["200mbit", None])
def test_auto_compresses_on_a_slow_link_only(rate: str | None) -> None:
    with two_hosts("tcp") as hosts:
        if rate:
            brake(hosts.cable, rate)
        for rows in (4096, 4097, 4098, 4099):  # 32 MiB each, the first to see how fast it goes
            made = hosts.client.submit(grid, rows, workers=[hosts.here])
            used = hosts.client.submit(total, made, workers=[hosts.there])
            assert used.result(timeout=60) == total(grid(rows))

        def counted() -> dict[str, int]:
            worker = hosts.client.scheduler_info()["workers"][hosts.here]
            return worker["metrics"]["compression"]

        if rate:
            wait_until(lambda: counted().get("compressed", 0) >= 3, "the worker compressed")
            assert counted()["bytes_out"] < 0.9 * counted()["bytes_in"]
        else:
            wait_until(lambda: sum(counted().get(n, 0) for n in ("compressed", "declined_by_rate")) >= 4, "it counted")
            assert counted()["declined_by_rate"] >= 2
