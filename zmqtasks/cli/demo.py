"""`zmqtasks demo`: two real computations on a scheduler and two worker processes, each checked against a plain program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from zmqtasks.cli import demo_blocks, demo_words
from zmqtasks.cli.options import PROTOCOLS

if TYPE_CHECKING:
    from rich.console import Console

    from zmqtasks.client import Client

WORKERS = 2


@dataclass(frozen=True)
class Outcome:
    """What one computation took."""

    title: str
    tasks: int
    seconds: float
    moved_bytes: int


@click.command()
@click.option("--protocol", type=click.Choice(PROTOCOLS), help="Default: LocalCluster's, unix on Linux.")
def demo(protocol: str | None) -> int:
    """Run two real computations on a small local cluster.

    Counts the words in the source files of Python's standard library, and takes the mean of x + x.T for a large array whose blocks
    move between the workers. Both answers are compared with those of a plain program.
    """
    from rich.console import Console

    from zmqtasks import Client, LocalCluster

    console = Console(highlight=False)
    began = time.perf_counter()
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, protocol=protocol) as cluster, Client(cluster) as client:
        console.print(
            f"A scheduler at {cluster.scheduler_address} and {WORKERS} worker processes, "
            f"started in {time.perf_counter() - began:.2f} s"
        )
        paths = demo_words.find_sources()
        outcomes = [
            _run(
                console,
                client,
                "Count words",
                lambda: demo_words.submit(client, paths),
                lambda total: demo_words.check(total, paths),
            ),
            _run(console, client, "Mean of x + x.T", lambda: demo_blocks.submit(client), demo_blocks.check),
        ]
    _show(console, outcomes)
    return 0


def _run(
    console: Console, client: Client, title: str, submit: Callable[[], list[Any]], check: Callable[[Any], str]
) -> Outcome:
    """Runs one computation under a progress bar, then checks its answer."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from zmqtasks import as_completed

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    moved_before = _moved_bytes(client)
    with Progress(*columns, console=console) as progress:
        began = time.perf_counter()
        futures = submit()
        bar = progress.add_task(title, total=len(futures))
        for _ in as_completed(futures):
            progress.advance(bar)
        answer = futures[-1].result()
        seconds = time.perf_counter() - began
    moved = _moved_bytes(client) - moved_before
    console.print(f"  {check(answer)}")
    return Outcome(title, len(futures), seconds, moved)


def _moved_bytes(client: Client) -> int:
    """Bytes that workers have fetched from each other up to now: each counts what came in over its data links."""
    return sum(client.run(lambda dask_worker: dask_worker.fetched_bytes).values())


def _show(console: Console, outcomes: list[Outcome]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("computation")
    for heading in ("tasks", "time", "per task", "moved", "rate"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.title,
            f"{outcome.tasks:,}",
            f"{outcome.seconds:.2f} s",
            f"{outcome.seconds / outcome.tasks * 1e6:,.0f} us",
            f"{outcome.moved_bytes / 1e6:,.1f} MB",
            f"{outcome.moved_bytes / outcome.seconds / 1e6:,.0f} MB/s",
        )
    console.print(table)
    console.print("Both answers are those of a plain program. Moved: what workers fetched from each other.")
