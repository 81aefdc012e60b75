"""`python -m bench.tasks [--json FILE] [--profile] [workload ...]`."""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
from collections.abc import Callable
from typing import Any

from bench.tasks.machine import facts

CLUSTER_WORKLOADS = ("map", "latency", "merge", "tree", "chain")
ALL = (*CLUSTER_WORKLOADS, "startup", "zero")
PROFILE_LINES = 30
PROFILED_TASKS = 100_000
PROFILED_WORKERS = 24


def main() -> None:
    """Runs the workloads, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description="What a task costs.")
    parser.add_argument("workload", nargs="*", help=f"some of {', '.join(ALL)} (default: all)")
    parser.add_argument("--tasks", type=int, default=5_000, help="tasks of map and merge (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write machine facts and rows")
    parser.add_argument("--profile", action="store_true", help="profile this process (for zero: the scheduler's code)")
    arguments = parser.parse_args()
    names = list(arguments.workload) or list(ALL)
    if unknown := set(names) - set(ALL):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")

    profile = cProfile.Profile() if arguments.profile else None
    rows = profile.runcall(_run, names, arguments.tasks, True) if profile else _run(names, arguments.tasks)
    result = {"machine": facts(), "rows": rows}
    _print(result)
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(PROFILE_LINES)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as stream:
            json.dump(result, stream, indent=1)


def _run(names: list[str], tasks: int, in_this_process: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if on_cluster := [name for name in names if name in CLUSTER_WORKLOADS]:
        from bench.tasks.workloads import run as run_workloads

        rows += run_workloads(on_cluster, tasks)
    if "startup" in names:
        from bench.tasks.startup import run as run_startup

        rows += run_startup()
    if "zero" in names:
        from bench.tasks import zero_workers

        if in_this_process:
            rows += (
                zero_workers.measure_cost(name, PROFILED_TASKS, PROFILED_WORKERS) for name in zero_workers.WORKLOADS
            )
        else:
            rows += ({**row, "workload": _zero_title(row)} for row in zero_workers.run())
    return rows


def _zero_title(row: dict[str, Any]) -> str:
    """Rows with the same columns go into one table."""
    if "rounds" in row:
        return "zero workers: memory after rounds of tasks"
    what = "memory of waiting tasks" if "bytes_per_waiting_task" in row else "scheduler CPU"
    return f"zero workers: {what}, {row['workload']}"


def _print(result: dict[str, Any]) -> None:
    """One table for each workload, with the columns that its rows have."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print("  ".join(f"{name}: {value}" for name, value in result["machine"].items()), style="dim")
    workloads = dict.fromkeys(row["workload"] for row in result["rows"])
    for workload in workloads:
        rows = [row for row in result["rows"] if row["workload"] == workload]
        columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "workload"]
        table = Table(title=workload, title_justify="left")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*(_cell(row.get(name, "")) for name in columns))
        console.print(table)


def _cell(value: Any) -> str:
    write: Callable[[Any], str] = str
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    if isinstance(value, float):
        write = "{:,.2f}".format
    elif isinstance(value, int):
        write = "{:,}".format
    return write(value)


if __name__ == "__main__":
    main()
