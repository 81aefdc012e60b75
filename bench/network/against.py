"""A transport beside its raw baseline, in turns: `python -m bench.network.baselines_socket` and the like.

The machine's speed changes from second to second, so the ratio is taken within each round; shown is the median, and the
lowest and highest ratio of all rounds.
"""

from __future__ import annotations

import statistics

from .document import Subject
from .figures import MIB, Plan
from .subjects import Measured
from .suite import Runner, measure_together
from .worker import Task

ROUNDS = 7


def compare_with_raw(scheme: str, baseline: str, sizes: tuple[int, ...] = (64 * MIB, 256 * MIB)) -> None:
    """Prints bandwidth, round trip and message rates of `scheme` and of the module `baseline`."""
    plan = Plan(sizes=sizes, rates=("messages_per_s", "batched_messages_per_s"), time_s=0.1, tail_s=0.5)
    tasks = {scheme: Task(scheme=scheme), "raw": Task(module=baseline)}
    subjects = [Subject(id=name, name=name, kind="transport") for name in tasks]
    with Runner(Measured(subjects[0], tasks[scheme])) as ours, Runner(Measured(subjects[1], tasks["raw"])) as raw:
        for _ in range(ROUNDS):
            measure_together([ours, raw], plan)
            if failed := ours.failed or raw.failed:
                raise SystemExit(failed)
    figures, raw_figures = (subject.idle for subject in subjects)
    for size in plan.sizes:
        _show(f"{size >> 20} MiB", "GB/s", figures.bandwidth[size], raw_figures.bandwidth[size], 1e-9)
    trips, raw_trips = ([each.p50 for each in series.latency_us[1]] for series in (figures, raw_figures))
    _show("round trip", "us", trips, raw_trips)
    for name in plan.rates:
        _show(name, "", figures.rates[name], raw_figures.rates.get(name, []))


def _show(what: str, unit: str, ours: list[float], raw: list[float], scale: float = 1.0) -> None:
    line = f"{what}: {statistics.median(ours) * scale:,.2f} {unit}"
    if raw:
        ratios = sorted(mine / theirs for mine, theirs in zip(ours, raw, strict=True))
        line += f", raw {statistics.median(raw) * scale:,.2f} {unit}"
        line += f", ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(line, flush=True)
