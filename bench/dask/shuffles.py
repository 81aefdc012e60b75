"""A shuffle by many ways: `python -m bench.dask.shuffles [PARTITIONS [ROWS]]`, ROWS of three numbers in each partition.

dask's method "tasks" on zmqtasks, in as many stages as dask makes and in one, then p2p and tasks on dask.distributed; the better of
two runs each, on two worker processes of one thread. The partitions are there before.
"""

from __future__ import annotations

import sys
import time

import dask.dataframe as dd
import numpy as np
import pandas as pd

from .__main__ import engine

WAYS = (
    ("zmqtasks", "tasks", {}),
    ("zmqtasks", "tasks", {"max_branch": 1_000_000}),
    ("distributed", "p2p", {}),
    ("distributed", "tasks", {}),
)


def partition(number: int, rows: int) -> pd.DataFrame:
    """Keys and values that nobody has sorted."""
    rng = np.random.default_rng(number)
    return pd.DataFrame({"key": rng.integers(0, 1_000_000, rows), "a": rng.random(rows), "b": rng.random(rows)})


def main(partitions: int, rows: int) -> None:
    """Prints a line for each way."""
    for name, method, options in WAYS:
        with engine(name, 2, 1):
            frame = dd.from_map(partition, range(partitions), rows=rows, meta=partition(0, 1)).persist()
            assert len(frame) == partitions * rows
            shuffled = frame.shuffle("key", shuffle_method=method, **options).map_partitions(len)
            tasks = len(shuffled.optimize().__dask_graph__()) - partitions
            times = []
            for _ in range(2):
                start = time.perf_counter()
                assert shuffled.sum().compute() == partitions * rows
                times.append(time.perf_counter() - start)
        way = f"{method} in one stage" if options else method
        print(
            f"{name:11} {way:18} {partitions} partitions of {rows:,} rows: {tasks:6,} tasks, {min(times):6.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
