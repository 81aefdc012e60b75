"""What a dask graph costs the client, per task: `python -m bench.dask.submit [TASKS]`.

A tree: so many small tasks, then sums of ten. Beside it what dask takes to order the same graph, which is part of it.
"""

from __future__ import annotations

import resource
import sys
import time

from dask._task_spec import List, Task, TaskRef
from dask.order import order

from zmqtasks import Client, LocalCluster
from zmqtasks.integrations.dask.collections import submit


def tree(leaves: int) -> tuple[dict, object]:
    """The graph and the key of its root."""
    graph = {("leaf", i): Task(("leaf", i), abs, i) for i in range(leaves)}
    keys: list = list(graph)
    level = 0
    while len(keys) > 1:
        level += 1
        parents = [(f"sum{level}", i) for i in range((len(keys) + 9) // 10)]
        for i, key in enumerate(parents):
            graph[key] = Task(key, sum, List(*map(TaskRef, keys[10 * i : 10 * i + 10])))
        keys = parents
    return graph, keys[0]


def main(leaves: int) -> None:
    """Prints one line."""
    graph, root = tree(leaves)
    start = time.perf_counter()
    order(graph)
    ordering_s = time.perf_counter() - start
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        future = submit(client, graph, [root], named=False)[root]
        submitted_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        assert future.result() == leaves * (leaves - 1) // 2
        whole_s = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    us = 1e6 / len(graph)
    print(
        f"{len(graph)} tasks, us per task: dask.order alone {ordering_s * us:.1f}; submitted after {submitted_s * us:.1f}"
        f" ({cpu_s * us:.1f} of CPU), result after {whole_s * us:.1f}; the client grew by {grown} MiB"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
