"""`zmqtasks bench net --scheduler`: connects to a live cluster, has its links measured and makes the document."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime

from rich.console import Console

from zmqtasks import Client
from zmqtasks.cli.options import find_scheduler
from zmqtasks.errors import TaskTimeoutError
from zmqtasks.transports.address import parse_host_port, split_scheme
from zmqtasks.transports.registry import get_transport

from . import machine
from .document import Matrix, Report
from .figures import MIB
from .matrix import MatrixPlan, measure_matrix
from .suite import Step
from .terminal import progress
from .wording import size_text

CONNECT_S = 30.0
WORKERS_S = 300.0
"""For all workers to come: on a large cluster file systems and schedulers take their time."""


def measure_cluster(
    scheduler: str | None,
    scheduler_file: str | None,
    key_file: str | None,
    *,
    quick: bool,
    sizes: Collection[int] | None,
    pairs: int | None = None,
    together: bool = False,
    limit_s: float | None = None,
    workers: int | None = None,
    console: Console,
) -> Report:
    """The document of one run; not complete when Ctrl-C has ended it early.

    It waits until there are so many `workers`; those that do not come in `WORKERS_S` are a finding.
    Raises what `find_scheduler` and `Client` raise, and MeasuringError when there is nothing to measure.
    """
    plan = _plan(quick, sizes, pairs, together, limit_s)
    _check_address(scheduler)
    target = find_scheduler(scheduler, scheduler_file, key_file)
    started, began = datetime.now(UTC), time.monotonic()
    client = Client(
        target.address,
        security=target.security,
        timeout=CONNECT_S,
        name="bench-net",
        set_as_default=False,
        shows_output=False,
    )
    with client, progress(console) as on_step:
        missing = _wait_for(client, workers, on_step)
        matrix = measure_matrix(client, plan, lambda done, of, text: on_step(Step(text, done, of)))
    matrix.findings[:0] = missing
    return Report(
        title="Links between workers" + (", all at once" if together else ""),
        command=_command(quick, sizes, pairs, together, limit_s),
        started=started.astimezone().isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 3),
        complete=not matrix.facts["interrupted"],
        rounds=0,
        machine=machine.facts(),
        plan=_described(plan, matrix),
        matrix=matrix,
    )


def _check_address(address: str | None) -> None:
    """Raises AddressError or what an unknown transport raises, before anybody waits for a key of nobody."""
    if address is None:
        return
    whole = address if "://" in address else f"tcp://{address}"
    if get_transport(split_scheme(whole)[0]).capabilities.uses_ip:
        parse_host_port(whole)


def _wait_for(client: Client, workers: int | None, on_step: Callable[[Step], None]) -> list[str]:
    """A sentence when not all have come."""
    if workers is None:
        return []
    on_step(Step(f"waiting for {workers} workers", 0, 1))
    try:
        client.wait_for_workers(workers, timeout=WORKERS_S)
    except TaskTimeoutError as exc:
        return [str(exc)]
    return []


def _plan(
    quick: bool, sizes: Collection[int] | None, pairs: int | None, together: bool, limit_s: float | None
) -> MatrixPlan:
    plan = MatrixPlan(pairs=pairs, together=together)
    if quick:
        plan = replace(plan, sizes=(MIB, 16 * MIB), time_s=0.2)
    if together:
        plan = replace(plan, time_s=max(plan.time_s, 1.0 if quick else 3.0))
    if sizes:
        plan = replace(plan, sizes=tuple(sorted(sizes)))
    return plan if limit_s is None else replace(plan, limit_s=limit_s)


def _described(plan: MatrixPlan, matrix: Matrix) -> dict[str, object]:
    return {
        "sizes": matrix.facts["sizes"],
        "time_s": plan.time_s,
        "round_trips": plan.round_trips,
        "limit_s": plan.limit_s,
        "together": plan.together,
    }


def _command(
    quick: bool, sizes: Collection[int] | None, pairs: int | None, together: bool, limit_s: float | None
) -> str:
    """The command line as far as it decides about figures."""
    parts = ["zmqtasks bench net --scheduler ...", *(["--quick"] if quick else [])]
    if sizes:
        parts.append(f"--sizes {','.join(size_text(size).replace(' ', '') for size in sorted(sizes))}")
    parts += [f"--pairs {pairs}"] if pairs else []
    parts += ["--parallel"] if together else []
    parts += [f"--pair-timeout {limit_s:g}"] if limit_s is not None else []
    return " ".join(parts)
