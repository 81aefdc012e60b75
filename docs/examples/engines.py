"""Runs an example's program on zmqtasks, on the threads of this process and on dask.distributed, and prints the times.

Each engine has the same number of threads: two worker processes of one thread, or two threads. The program runs once
without being timed, so that workers have imported what they need; then it is timed. Each answer is compared with the one
that the example has computed plainly.

Options of all examples: `--big` for sizes that are worth a cluster, `--rounds N` to time N runs and print the shortest.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import numpy as np

import zmqtasks

WORKERS = 2

_parser = argparse.ArgumentParser()
_parser.add_argument("--big", action="store_true", help="sizes that are worth a cluster")
_parser.add_argument("--rounds", type=int, default=1, help="timed runs on each engine; the shortest is printed")
OPTIONS, _ = _parser.parse_known_args()  # a notebook's kernel has arguments of its own


def size(small: int, big: int) -> int:
    """How much of something an example makes: `small`, or with `--big` `big`."""
    return big if OPTIONS.big else small


def compare(
    program: Callable[[], Any],
    expected: Any,
    client: zmqtasks.Client,
    *,
    threads: Callable[[], Any] | None = None,
    threads_are: str = "dask's threads",
    distributed: Callable[[], Any] | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Prints the time of `program` on each engine; zmqtasks comes first, and `client` is closed when its turn is over.

    `threads` and `distributed` are the program for that engine where it is not the same. Raises AssertionError when an
    answer is not `expected`: equal, or for numbers and arrays equal within `tolerance`.
    """
    with client:
        _time("zmqtasks", program, expected, tolerance)
    with dask.config.set(scheduler="threads", num_workers=WORKERS):
        _time(threads_are, threads or program, expected, tolerance)
    with _distributed_cluster():
        _time("dask.distributed", distributed or program, expected, tolerance)


def _time(engine: str, program: Callable[[], Any], expected: Any, tolerance: float) -> None:
    answers = [program()]
    times = []
    for _ in range(OPTIONS.rounds):
        start = time.perf_counter()
        answers.append(program())
        times.append(time.perf_counter() - start)
    for answer in answers:
        _check(engine, answer, expected, tolerance)
    print(f"{engine + ':':<28}{min(times):8.3f} s")


def _check(engine: str, answer: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, (float, np.ndarray)):
        np.testing.assert_allclose(answer, expected, rtol=tolerance, atol=tolerance, err_msg=f"on {engine}")
    else:
        assert answer == expected, f"on {engine} the answer is {answer!r}; it should be {expected!r}"


@contextlib.contextmanager
def _distributed_cluster() -> Iterator[None]:
    """A LocalCluster of dask.distributed, and its client as the default one."""
    import distributed

    main = sys.modules["__main__"]
    path = main.__dict__.pop(
        "__file__", None
    )  # its processes would run the program again, which has no guard against that
    # Its workers complain, in two ways, when they are closed in the middle of a heartbeat.
    os.environ["DASK_LOGGING"] = "{'distributed': 'critical', 'tornado.application': 'critical'}"
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            dask.config.set({"temporary-directory": folder}),
            distributed.LocalCluster(
                n_workers=WORKERS,
                threads_per_worker=1,
                dashboard_address=":0",  # else a warning where there is one already
                silence_logs=logging.CRITICAL,
            ) as cluster,
            distributed.Client(cluster),
        ):
            yield
    finally:
        del os.environ["DASK_LOGGING"]
        if path is not None:
            main.__file__ = path
