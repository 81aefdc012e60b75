"""`python -m bench.tasks.sharing [--calls N]`: what is shared by name, here and in dask.distributed; microseconds per operation.

Rounds of both in turn, on clusters of one worker process each; the median of a subject is over all its rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

ROUNDS = 5


def subjects(library: Any, client: Any) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    lock, variable = library.Lock("bench"), library.Variable("bench")
    queue, futures = library.Queue("bench"), library.Queue("bench-futures")
    future = client.scatter([1], hash=False)[0]
    variable.set({"loss": 0.1})

    def lock_unlock() -> None:
        lock.acquire()
        lock.release()

    def put_get() -> None:
        queue.put(1)
        queue.get()

    def hand_over() -> None:
        futures.put(future)
        futures.get()

    return {
        "Lock: acquire and release": lock_unlock,
        "Variable: set": lambda: variable.set({"loss": 0.1}),
        "Variable: get": variable.get,
        "Queue: put and get": put_get,
        "Queue: put and get a future": hand_over,
    }


@contextmanager
def ours() -> Iterator[dict[str, Callable[[], Any]]]:
    """zmqtasks over tcp."""
    import zmqtasks

    with (
        zmqtasks.LocalCluster(n_workers=1, threads_per_worker=1, protocol="tcp") as cluster,
        zmqtasks.Client(cluster) as client,
    ):
        yield subjects(zmqtasks, client)


@contextmanager
def dasks() -> Iterator[dict[str, Callable[[], Any]]]:
    """dask.distributed, with its scheduler in a process of its own, as ours."""
    import distributed
    from distributed.deploy.subprocess import SubprocessCluster

    with (
        SubprocessCluster(worker_class="distributed.Nanny", n_workers=1, silence_logs=logging.ERROR) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield subjects(distributed, client)


def run(calls: int) -> None:
    """Prints a row for each subject."""
    with ExitStack() as stack:
        sides = [stack.enter_context(ours()), stack.enter_context(dasks())]
        times: list[dict[str, list[float]]] = [{name: [] for name in side} for side in sides]
        for _ in range(ROUNDS):
            for side, found in zip(sides, times, strict=True):
                for name, call in side.items():
                    started = time.perf_counter()
                    for _ in range(calls):
                        call()
                    found[name].append((time.perf_counter() - started) / calls * 1e6)
    print(f"{'us per operation':32}{'zmqtasks':>10}{'dask.distributed':>18}")
    for name in times[0]:
        mine, theirs = (statistics.median(found[name]) for found in times)
        print(f"{name:32}{mine:10.0f}{theirs:18.0f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="operations of a subject in a round")
    run(parser.parse_args().calls)


if __name__ == "__main__":
    main()
