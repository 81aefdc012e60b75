"""`zmqtasks status`."""

from __future__ import annotations

import json
from typing import Any

import click

from zmqtasks.cli.options import encryption_option, find_scheduler, key_file_option, scheduler_file_option
from zmqtasks.config import load_config
from zmqtasks.deploy.serve import run_loop

WIDE = 250
WAIT_S = 0.0
"""Status does not wait for files: it tells what is there now."""


@click.command()
@click.argument("address", required=False)
@scheduler_file_option
@key_file_option
@encryption_option
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(
    address: str | None, scheduler_file: str | None, key_file: str | None, encryption: str | None, as_json: bool
) -> int:
    """Show workers, tasks and memory of the cluster at ADDRESS (or in --scheduler-file)."""
    from zmqtasks.deploy.ask import ask

    target = find_scheduler(address, scheduler_file, key_file, WAIT_S, encryption)
    info = run_loop(ask(target.address, "scheduler_info", security=target.security, config=load_config()))
    info["address"] = target.address
    if as_json:
        click.echo(json.dumps(info, indent=2))
    else:
        _show(info)
    return 0


def _show(info: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # for `grep` and its like: one line per worker
        console.width = WIDE
    workers = info["workers"]
    threads = sum(worker["nthreads"] for worker in workers.values())
    used = sum(worker["metrics"]["memory"] for worker in workers.values())
    limits = [worker["memory_limit"] for worker in workers.values()]
    memory = f"{_measured(used)} of {_size(sum(limits))}" if all(limits) and limits else _measured(used)
    console.print(f"{info['address']}  {_count(len(workers), 'worker')}, {_count(threads, 'thread')}, memory {memory}")
    tasks = {state: count for state, count in info["tasks"].items() if count}
    console.print("tasks: " + (", ".join(f"{count:,} {state}" for state, count in tasks.items()) or "none"))
    if not workers:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("worker", "address", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("threads", "tasks", "memory", "limit", "results", "cpu"):
        table.add_column(heading, justify="right", no_wrap=True)
    compression = any(worker["metrics"].get("compression") for worker in workers.values())
    if compression:
        table.add_column("compressed", no_wrap=True)
    for address, worker in sorted(workers.items(), key=lambda item: item[1]["name"]):
        metrics = worker["metrics"]
        table.add_row(
            worker["name"],
            address,
            worker["status"],
            str(worker["nthreads"]),
            f"{metrics['processing']:,}",
            _measured(metrics["memory"]),
            _size(worker["memory_limit"]) if worker["memory_limit"] else "none",
            f"{metrics['stored_keys']:,} ({_size(metrics['stored_bytes'])})",
            f"{metrics['cpu']:.0f} %" if metrics["memory"] else "-",
            *([_compressed(metrics.get("compression", {}))] if compression else []),
        )
    console.print(table)


def _compressed(counted: dict[str, float]) -> str:
    """What became of a worker's large frames; "-" when there were none."""
    said = []
    if frames := counted.get("compressed"):
        said.append(
            f"{frames:,} ({_size(counted['bytes_in'])} to {_size(counted['bytes_out'])}, {counted['ratio']:.0%})"
        )
    declined = {"declined_by_sample": "do not shrink", "declined_by_rate": "link is faster"}
    said += [f"{count:,} {why}" for name, why in declined.items() if (count := counted.get(name))]
    return ", ".join(said) or "-"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _measured(size_bytes: float) -> str:
    """The memory of workers; nothing is known of those that have just come."""
    return _size(size_bytes) if size_bytes else "-"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
