"""Collections on zmqtasks and on dask.distributed: `python -m bench.dask [--rounds N] [--only TEXT] [--json FILE]`.

In each round each engine gets a cluster of its own, of the same workers, and runs all workloads; the order of the engines
alternates. The table has the medians. The ratio is distributed's time by ours, and the last lines its geometric mean per set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .workloads import SETS

ENGINES = ("zmqtasks", "distributed")
Times = dict[tuple[str, str], dict[str, list[float]]]


@contextlib.contextmanager
def engine(name: str, workers: int, threads: int) -> Iterator[Any]:
    """A cluster and the default client of it."""
    if name == "zmqtasks":
        import zmqtasks

        with (
            zmqtasks.LocalCluster(n_workers=workers, threads_per_worker=threads) as cluster,
            zmqtasks.Client(cluster) as client,
        ):
            yield client
        return
    import distributed

    with (
        distributed.LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def _imports() -> None:
    """What tasks import, which is no part of any workload."""
    for module in ("dask.array", "dask.bag", "dask.dataframe", "dask.delayed", "pyarrow.parquet", "xarray"):
        importlib.import_module(module)


def run_round(name: str, arguments: argparse.Namespace, times: Times, answers: dict[tuple[str, str], float]) -> None:
    """All workloads on one engine, once; raises RuntimeError when an answer differs from the one before."""
    with engine(name, arguments.workers, arguments.threads) as client:
        client.wait_for_workers(arguments.workers)
        client.run(_imports)
        for group, workloads in SETS.items():
            for what, run in workloads.items():
                if arguments.only not in f"{group} {what}":
                    continue
                start = time.perf_counter()
                answer = run()
                times.setdefault((group, what), {}).setdefault(name, []).append(time.perf_counter() - start)
                if not math.isclose(answer, answers.setdefault((group, what), answer), rel_tol=1e-9):
                    raise RuntimeError(f"{group} {what}: {answer} on {name}, {answers[group, what]} before")


def ratios(times: Times, group: str) -> dict[str, float]:
    """By workload: the median time of distributed by ours."""
    return {
        what: statistics.median(found["distributed"]) / statistics.median(found["zmqtasks"])
        for (its_group, what), found in times.items()
        if its_group == group
    }


def show(times: Times) -> None:
    """Prints the table."""
    table = Table("set", "workload", "zmqtasks", "distributed", "ratio")
    for group in SETS:
        found = ratios(times, group)
        for what, ratio in found.items():
            cells = [f"{statistics.median(times[group, what][name]) * 1000:,.0f} ms" for name in ENGINES]
            table.add_row(group, what, *cells, f"{ratio:.2f}")
        if found:
            table.add_row(
                group, "geometric mean", "", "", f"{statistics.geometric_mean(found.values()):.2f}", end_section=True
            )
    Console(width=100).print(table)


def main(argv: list[str]) -> None:
    """Runs, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.dask", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--only", default="", help="workloads with this text in set and name, as 'small array'")
    parser.add_argument("--json", type=Path, help="where to write all times, in seconds")
    arguments = parser.parse_args(argv)
    times: Times = {}
    answers: dict[tuple[str, str], float] = {}
    for number in range(arguments.rounds):
        for name in ENGINES if number % 2 == 0 else reversed(ENGINES):
            run_round(name, arguments, times, answers)
            print(f"round {number + 1} of {arguments.rounds}: {name} done", file=sys.stderr)
    show(times)
    if arguments.json:
        rows = [{"set": group, "workload": what, "times_s": found} for (group, what), found in times.items()]
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
