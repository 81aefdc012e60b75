"""Clusters for tests of integrations: one in this process, and one of processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zmqtasks import Client, LocalCluster

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def inprocess_cluster() -> Iterator[LocalCluster]:
    """All nodes in this process."""
    with LocalCluster(processes=False, n_workers=1, threads_per_worker=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def process_cluster() -> Iterator[LocalCluster]:
    """Two worker processes, which can import the modules beside this one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        with LocalCluster(n_workers=2, threads_per_worker=2, resources={"licence": 1}) as cluster:
            yield cluster
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Waits until a condition holds."""

    def wait(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    return wait


@pytest.fixture
def client(inprocess_cluster: LocalCluster) -> Iterator[Client]:
    """The default client, of a cluster in this process."""
    with Client(inprocess_cluster) as client:
        yield client


@pytest.fixture
def process_client(process_cluster: LocalCluster) -> Iterator[Client]:
    """The default client, of a cluster of processes."""
    with Client(process_cluster) as client:
        yield client
