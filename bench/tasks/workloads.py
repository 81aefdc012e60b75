"""Workloads on a real cluster of two single-thread workers, over each transport; beside them, where it can do the same, the
standard library's process pool in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from zmqtasks import Client, LocalCluster

PROTOCOLS = ("tcp", "unix", "zmq", "inproc")
WORKERS = 2
WARM_UP_TASKS = 200
ROUNDS = 3
LATENCY_CALLS = 300
TREE_DEPTH = 12
CHAIN_LENGTH = 10


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def total(xs: list[int]) -> int:
    return sum(xs)


def run_map(client: Client, tasks: int) -> dict[str, float]:
    """No-op tasks, gathered; the best round, and all of them."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        results = client.gather(client.map(inc, range(tasks)))
        times.append((time.perf_counter() - began) / tasks * 1e6)
        assert sum(results) == tasks * (tasks + 1) // 2
    return {"tasks": tasks, "us_per_task": min(times), "us_per_task_median": statistics.median(times)}


def run_latency(client: Client, tasks: int) -> dict[str, float]:
    """Submit one, wait for its result."""
    times = []
    for number in range(LATENCY_CALLS):
        began = time.perf_counter()
        assert client.submit(inc, number).result() == number + 1
        times.append((time.perf_counter() - began) * 1e3)
    times.sort()
    return {"tasks": LATENCY_CALLS, "ms_median": statistics.median(times), "ms_99th": times[int(0.99 * len(times))]}


def run_merge(client: Client, tasks: int) -> dict[str, float]:
    """Many tasks into one."""
    began = time.perf_counter()
    leaves = client.map(inc, range(tasks))
    assert client.submit(total, leaves).result() == tasks * (tasks + 1) // 2
    return {"tasks": tasks, "us_per_task": (time.perf_counter() - began) / tasks * 1e6}


def run_tree(client: Client, tasks: int) -> dict[str, float]:
    """Pairwise sums of 2^12 leaves."""
    leaves = 1 << TREE_DEPTH
    began = time.perf_counter()
    level = client.map(inc, range(leaves))
    while len(level) > 1:
        level = client.map(add, level[::2], level[1::2])
    assert level[0].result() == leaves * (leaves + 1) // 2
    return {"tasks": 2 * leaves - 1, "us_per_task": (time.perf_counter() - began) / (2 * leaves - 1) * 1e6}


def run_chain(client: Client, tasks: int) -> dict[str, float]:
    """Ten tasks, each with the result of the one before."""
    times = []
    for number in range(LATENCY_CALLS // CHAIN_LENGTH):
        began = time.perf_counter()
        last = client.submit(inc, number)
        for _ in range(CHAIN_LENGTH - 1):
            last = client.submit(inc, last)
        assert last.result() == number + CHAIN_LENGTH
        times.append((time.perf_counter() - began) / CHAIN_LENGTH * 1e6)
    return {"tasks": LATENCY_CALLS, "us_per_task_median": statistics.median(times)}


WORKLOADS: dict[str, Callable[[Client, int], dict[str, float]]] = {
    "map": run_map,
    "latency": run_latency,
    "merge": run_merge,
    "tree": run_tree,
    "chain": run_chain,
}


def run_pool(names: list[str], tasks: int) -> list[dict[str, Any]]:
    """The baseline: `concurrent.futures`, one call a task as here."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(inc, range(WARM_UP_TASKS)))
        if "map" in names:
            times = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                results = [future.result() for future in [pool.submit(inc, number) for number in range(tasks)]]
                times.append((time.perf_counter() - began) / tasks * 1e6)
                assert sum(results) == tasks * (tasks + 1) // 2
            found = {"tasks": tasks, "us_per_task": min(times), "us_per_task_median": statistics.median(times)}
            rows.append({"workload": "map", "protocol": "process pool", **found})
        if "latency" in names:
            times = []
            for number in range(LATENCY_CALLS):
                began = time.perf_counter()
                assert pool.submit(inc, number).result() == number + 1
                times.append((time.perf_counter() - began) * 1e3)
            times.sort()
            found = {"ms_median": statistics.median(times), "ms_99th": times[int(0.99 * len(times))]}
            rows.append({"workload": "latency", "protocol": "process pool", "tasks": LATENCY_CALLS, **found})
    return rows


def run(names: list[str], tasks: int) -> list[dict[str, Any]]:
    """Rows for the named workloads, over every transport."""
    rows = run_pool(names, tasks)
    for protocol in PROTOCOLS:
        options: dict[str, Any] = {"processes": False} if protocol == "inproc" else {"protocol": protocol}
        with (
            LocalCluster(n_workers=WORKERS, threads_per_worker=1, **options) as cluster,
            Client(cluster) as client,
        ):
            client.gather(client.map(inc, range(WARM_UP_TASKS)))
            rows.extend({"workload": name, "protocol": protocol, **WORKLOADS[name](client, tasks)} for name in names)
    return rows
