"""Data, graphs, workers: scatter, get, run, who_has and the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from operator import add
from typing import Any

import client_tasks as tasks
import numpy as np
import pytest

from zmqtasks import Client, TaskTimeoutError
from zmqtasks.errors import ConfigError, KeyConflictError, NoWorkerError

Eventually = Callable[[Callable[[], object]], None]


def test_scatter(client: Client) -> None:
    array = np.arange(100_000.0)
    future = client.scatter(array)
    assert (future.status, client.submit(tasks.sum_array, future).result(10)) == ("finished", array.sum())
    assert np.array_equal(future.result(10), array)
    assert client.scatter(array.copy()).key == future.key
    assert client.scatter(array, hash=False).key != future.key
    assert client.gather(client.scatter([1, 2])) == [1, 2]
    assert client.gather(client.scatter((1, 2))) == (1, 2)
    assert client.gather(client.scatter(iter([1, 2]))) == [1, 2]
    assert client.gather(client.scatter(range(2))) == [0, 1]
    named = client.scatter({"x": 1, ("y", 2): 2})
    assert {name: future.key for name, future in named.items()} == {"x": "x", ("y", 2): ("y", 2)}
    assert client.gather(named) == {"x": 1, ("y", 2): 2}
    with pytest.raises(KeyConflictError):
        client.scatter({"x": 3})


def test_scatter_to_all_or_some(client: Client) -> None:
    addresses = sorted(client.nthreads())
    everywhere = client.scatter(np.ones(1000), broadcast=True)
    assert sorted(client.who_has([everywhere])[everywhere.key]) == addresses
    here = client.scatter(b"here", workers=addresses[0])
    assert client.who_has(here)[here.key] == [addresses[0]]
    with pytest.raises(TaskTimeoutError, match="no worker has taken"):
        client.scatter(1, workers=["nowhere"], timeout=0.1)


def test_scattered_data_is_released(client: Client, eventually: Eventually) -> None:
    future = client.scatter(np.ones(1000))
    assert client.nbytes()
    del future
    eventually(lambda: not client.nbytes())
    assert client._node.machine.payloads == {}


def test_graphs(client: Client) -> None:
    graph: dict[Any, Any] = {
        "x": 1,
        "y": (tasks.inc, "x"),
        ("z", 0): (add, "y", 10),
        "alias": ("z", 0),
        "nested": (tasks.total, ["x", "y", (tasks.inc, (add, "x", 1))]),
        "list": ["x", (tasks.inc, "x"), {"k": "y"}],
        "unused": (tasks.fail,),
        7: (add, 1.5, 7.0),
    }
    assert client.get(graph, "y") == 2
    assert client.get(graph, [["alias", ("z", 0)], "nested", "list"]) == [[12, 12], 6, [1, 2, {"k": 2}]]
    assert client.get(graph, [7]) == [8.5]
    futures = client.get(graph, ["y", ("z", 0)], sync=False)
    assert [future.key for future in futures] == ["y", ("z", 0)]
    with pytest.raises(KeyError, match="no key 'w'"):
        client.get(graph, "w")
    with pytest.raises(ConfigError, match="cycle"):
        client.get({"a": (tasks.inc, "b"), "b": (tasks.inc, "a")}, "a")


def test_a_deep_graph(client: Client) -> None:
    graph: dict[Any, Any] = {"x0": 0, **{f"x{n}": (tasks.inc, f"x{n - 1}") for n in range(1, 1500)}}
    assert client.get(graph, "x1499") == 1499


def test_run(client: Client) -> None:
    addresses = set(client.nthreads())
    pids = client.run(os.getpid)
    assert set(pids) == addresses
    assert os.getpid() not in pids.values()
    (address, *_) = addresses
    assert client.run(tasks.add, 1, y=2, workers=[address]) == {address: 3}
    with pytest.raises(ValueError, match="no") as caught:
        client.run(tasks.fail)
    assert caught.value.__traceback__ is not None
    returned = client.run(tasks.fail, on_error="return")
    assert {type(exc) for exc in returned.values()} == {ValueError}
    assert client.run(tasks.fail, on_error="ignore") == {}
    assert client.run(os.getpid, wait=False) is None
    with pytest.raises(NoWorkerError, match="no worker is called nobody"):
        client.run(os.getpid, workers="nobody")
    with pytest.raises(AttributeError, match=r"use Client\.run"):
        _ = client.run_on_scheduler


def test_looking_at_the_cluster(client: Client) -> None:
    future = client.submit(tasks.inc, 1)
    future.result(10)
    (holder,) = client.who_has(future)[future.key]
    assert client.has_what()[holder] == [future.key]
    assert client.nbytes(future)[future.key] > 0
    assert list(client.nbytes(summary=True)) == ["inc"]
    assert client.nthreads() == client.ncores()
    assert set(client.nthreads().values()) == {2}
    assert client.processing() == {address: [] for address in client.nthreads()}
    info = client.scheduler_info()
    assert set(info["workers"]) == set(client.nthreads())
    assert len(client.scheduler_info(n_workers=1)["workers"]) == 1
    assert client.story(future)
    stuck = client.submit(tasks.inc, 1, workers="nobody", resources={"GPU": 1})
    assert "no worker has workers=['nobody'], resources={'GPU': 1.0}" in client.story(stuck)[-1]
    versions = client.get_versions(check=True)
    assert all(there == versions["client"] for there in versions["workers"].values())
    assert client.dashboard_link == ""


def test_wait_for_workers(client: Client) -> None:
    client.wait_for_workers(2, timeout=5)
    with pytest.raises(TaskTimeoutError, match="only 2 of 3 workers"):
        client.wait_for_workers(3, timeout=0.05)
    with pytest.raises(ConfigError, match="n_workers=0"):
        client.wait_for_workers(0)
