"""`python -m bench.tasks.actors [--calls N] [--json FILE]`: a call of an actor beside a task, here and in dask.distributed.

Rounds of all subjects in turn, on one cluster of two single-thread workers each; the median of a subject is over all its
rounds. The data link is what a way past the scheduler would begin with: a request that the worker's loop answers by itself,
without the actor's thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.tasks.machine import facts

ROUNDS = 5
BURST = 2_000


class Counter:
    """The actor."""

    def __init__(self) -> None:
        self.n = 0

    def increment(self, by: int) -> int:
        self.n += by
        return self.n


def inc(x: int) -> int:
    return x + 1


@contextmanager
def ours(protocol: str) -> Iterator[tuple[dict[str, Callable[[], Any]], Callable[[int], Any]]]:
    """Subjects of zmqtasks over one transport, and a burst of calls."""
    from zmqtasks import Client, LocalCluster
    from zmqtasks.fetching import run_on

    with LocalCluster(n_workers=2, threads_per_worker=1, protocol=protocol) as cluster, Client(cluster) as client:
        counter = client.submit(Counter, actor=True).result()
        key = counter._future._state.key
        (address,) = client.who_has([counter._future]).popitem()[1]
        node = client._node
        subjects: dict[str, Callable[[], Any]] = {
            f"{protocol}: task": lambda: client.submit(inc, 1).result(),
            f"{protocol}: actor call": lambda: counter.increment(1).result(),
            f"{protocol}: data link, no thread": lambda: run_on(node, node.pool.get(address, [key])),
        }
        yield subjects, lambda count: client.gather([counter.increment(1) for _ in range(count)])


@contextmanager
def dasks() -> Iterator[tuple[dict[str, Callable[[], Any]], Callable[[int], Any]]]:
    """The same of dask.distributed."""
    import logging

    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR) as cluster,
        Client(cluster) as client,
    ):
        counter = client.submit(Counter, actor=True).result()
        subjects: dict[str, Callable[[], Any]] = {
            "dask.distributed: task": lambda: client.submit(inc, 1, pure=False).result(),
            "dask.distributed: actor call": lambda: counter.increment(1).result(),
        }
        yield subjects, lambda count: [future.result() for future in [counter.increment(1) for _ in range(count)]]


def run(calls: int) -> list[dict[str, Any]]:
    """A row for each subject."""
    rows = []
    for make in (lambda: ours("unix"), lambda: ours("tcp"), dasks):
        with ExitStack() as stack:
            subjects, burst = stack.enter_context(make())
            times: dict[str, list[float]] = {name: [] for name in subjects}
            for _ in range(ROUNDS):
                for name, call in subjects.items():
                    call()
                    for _ in range(calls):
                        began = time.perf_counter()
                        call()
                        times[name].append((time.perf_counter() - began) * 1e3)
            burst(100)
            began = time.perf_counter()
            burst(BURST)
            rate = BURST / (time.perf_counter() - began)
            for name, found in times.items():
                found.sort()
                row = {"subject": name, "ms_median": statistics.median(found), "ms_99th": found[int(0.99 * len(found))]}
                rows.append(row | ({"calls_per_s": round(rate)} if "actor" in name else {}))
    return rows


def main() -> None:
    """Runs all, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks.actors", description="What a call of an actor costs.")
    parser.add_argument("--calls", type=int, default=100, help="of each subject in each round (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write machine facts and rows")
    arguments = parser.parse_args()
    result = {"machine": facts(), "rows": run(arguments.calls)}
    for row in result["rows"]:
        rate = f"  {row['calls_per_s']:>7,} calls/s in a burst" if "calls_per_s" in row else ""
        print(f"{row['subject']:<32} {row['ms_median']:6.2f} ms median {row['ms_99th']:6.2f} ms 99th{rate}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as stream:
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    main()
