"""`zmqtasks bench compare A.json B.json`: what got better or worse from one run to the next, beyond the noise.

The noise of a figure is known from the rounds of all figures of its kind (`noise.py`). What has a baseline must have changed
beside that too: else it is the machine that changed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console

from .compare_matrix import check_comparable, compare_matrices
from .document import Report, Series, Subject, read_json
from .figures import RATES, READ_BYTES
from .machine import differences
from .noise import FALSE_ALARMS, beyond_noise, pooled_noise
from .processes import MeasuringError
from .tables import Section, moves_bytes
from .terminal import show_section
from .wording import NOTHING, bandwidth_text, figure_text, ratio_text, size_text, time_text

_MARKS = {1: " ▲", -1: " ▼", 0: ""}


class Change(NamedTuple):
    """One figure in two runs."""

    subject: str
    figure: str
    first: float
    second: float
    verdict: int
    """1: better beyond the noise, -1: worse, 0: no telling."""
    text: str
    """Both values, written."""

    @property
    def ratio(self) -> float:
        """Second to first."""
        return self.second / self.first if self.first else float("inf")


def run(first_path: Path, second_path: Path) -> int:
    """Prints the comparison; the exit code is 0 whatever it says."""
    try:
        first, second = read_json(first_path), read_json(second_path)
    except MeasuringError as exc:
        raise click.ClickException(str(exc)) from exc
    try:
        if first.matrix is not None and second.matrix is not None:
            check_comparable(first.matrix, second.matrix)
    except MeasuringError as exc:
        raise click.ClickException(str(exc)) from exc
    show(first, second, Console())
    return 0


def show(first: Report, second: Report, console: Console) -> None:
    """The tables and sentences."""
    for sentence in differences(first.machine, second.machine):
        console.print(f"The machines differ in {sentence}", highlight=False, markup=False)
    if not (first.complete and second.complete):
        console.print("A run was interrupted: only what both have is compared.")
    for sentence in _plans(first, second):
        console.print(sentence, highlight=False, markup=False)
    changes = compare(first, second)
    for section in _sections(changes):
        show_section(section, console)
    if first.matrix is not None and second.matrix is not None:
        for sentence in compare_matrices(first.matrix, second.matrix):
            console.print(sentence, highlight=False, markup=False)
    elif not changes:
        console.print("The runs have no figures in common.")
    if changes:
        _show_changes(first, changes, console)


def _show_changes(first: Report, changes: list[Change], console: Console) -> None:
    for verdict, word in ((-1, "worse"), (1, "better")):
        changed = [change for change in changes if change.verdict == verdict]
        if changed:
            console.print(f"[bold]{word.capitalize()} beyond the noise:[/bold]")
        for change in changed:
            line = f"  {change.subject}, {change.figure}: {change.text} ({ratio_text(change.ratio)})"
            console.print(line, highlight=False, markup=False)
    if not any(change.verdict for change in changes):
        console.print("Nothing has changed beyond the noise.")
    elif baselines := sorted({change.subject for change in changes if change.verdict and _is_baseline(first, change)}):
        changed_too = ", ".join(baselines)
        console.print(f"Baselines have changed too ({changed_too}): some of this is the machine.", highlight=False)
    console.print(
        f"{len(changes)} figures were compared; if runs differed no more than their rounds do, chance alone would give "
        f"{FALSE_ALARMS:g} changes.",
        highlight=False,
    )


def compare(first: Report, second: Report) -> list[Change]:
    """Every figure that both runs have, and that means the same in both."""
    pairs: list[_Pair] = []
    left_out = {rate for rate in RATES if rate.startswith("fan_")} if _peers(first) != _peers(second) else set()
    if _read_size(first) != _read_size(second):
        left_out.add("read_bytes_per_s")
    for subject in first.subjects:
        other = second.subject(subject.id)
        if other is not None:
            rates = [rate for rate in RATES if rate not in left_out]
            pairs += _series(subject, subject.idle, other.idle, "", rates)
            pairs += _series(subject, subject.gil, other.gil, ", GIL held", rates)
    by_kind: dict[str, list[list[float]]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.figure, []).extend((pair.first, pair.second))
    noise = {figure: pooled_noise(rounds) for figure, rounds in by_kind.items()}
    by_subject = {(pair.subject.id, pair.figure): pair for pair in pairs}
    changes = []
    for pair in pairs:
        baseline = by_subject.get((pair.subject.baseline or "", pair.figure))
        changes.append(_change(pair, baseline, noise[pair.figure], len(pairs)))
    return changes


class _Pair(NamedTuple):
    """The rounds of one figure of a subject in two runs."""

    subject: Subject
    figure: str
    first: list[float]
    second: list[float]
    better: int
    """1 when more is better, -1 when less is."""
    text: str


def _change(pair: _Pair, baseline: _Pair | None, noise: float | None, comparisons: int) -> Change:
    ours, theirs = statistics.median(pair.first), statistics.median(pair.second)
    direction = 1 if theirs > ours else -1
    changed = beyond_noise(pair.first, pair.second, noise, comparisons)
    if changed and baseline is not None:
        beside = _beside(pair.first, baseline.first), _beside(pair.second, baseline.second)
        same_way = (statistics.median(beside[1]) - statistics.median(beside[0])) * direction > 0
        changed = same_way and beyond_noise(*beside, noise, comparisons)
    verdict = pair.better * direction if changed else 0
    return Change(pair.subject.name, pair.figure, ours, theirs, verdict, pair.text)


def _beside(values: list[float], baseline: list[float]) -> list[float]:
    """As ratios to the baseline, round by round where both had the same rounds."""
    if len(values) == len(baseline) and all(baseline):
        return [value / each for value, each in zip(values, baseline, strict=True)]
    middle = statistics.median(baseline) or 1.0
    return [value / middle for value in values]


def _series(subject: Subject, first: Series, second: Series, condition: str, rates: Sequence[str]) -> Iterator[_Pair]:
    bytes_move = moves_bytes(subject)
    for size in sorted(first.latency_us.keys() & second.latency_us.keys()):
        held = (("mean", "mean round trip"),)
        idle = (("p50", "median round trip"), ("p99", "99 % of round trips"))
        for quantile, figure in held if condition else idle:
            values = [
                [value for each in series.latency_us[size] if (value := getattr(each, quantile)) is not None]
                for series in (first, second)
            ]
            if all(values):
                text = f"{time_text(statistics.median(values[0]))} → {time_text(statistics.median(values[1]))}"
                name = f"{figure} of {size_text(size)}{condition}"
                yield _Pair(subject, name, values[0], values[1], -1, text)
    for size in sorted(first.bandwidth.keys() & second.bandwidth.keys()) if bytes_move else ():
        ours, theirs = first.bandwidth[size], second.bandwidth[size]
        text = f"{bandwidth_text(statistics.median(ours))} → {bandwidth_text(statistics.median(theirs))}"
        yield _Pair(subject, f"bandwidth at {size_text(size)}{condition}", ours, theirs, 1, text)
    for rate in rates:
        if rate in first.rates and rate in second.rates and (bytes_move or not rate.endswith("bytes_per_s")):
            ours, theirs = first.rates[rate], second.rates[rate]
            text = " → ".join(figure_text(rate, statistics.median(values)) for values in (ours, theirs))
            yield _Pair(subject, _rate_name(rate) + condition, ours, theirs, 1, text)


def _peers(report: Report) -> object:
    return report.plan.get("idle", {}).get("peers")


def _read_size(report: Report) -> int | None:
    """Of the messages that are read; None: the document does not say."""
    sizes = report.plan.get("idle", {}).get("sizes")
    return min(READ_BYTES, max(sizes)) if sizes else None


def _plans(first: Report, second: Report) -> Iterator[str]:
    """How the two were measured unlike each other."""
    ours, theirs = first.plan.get("idle", first.plan), second.plan.get("idle", second.plan)
    for name in ("peers", "time_s", "round_trips", "batch"):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            yield f"The runs were measured unlike each other: {name} {ours[name]} → {theirs[name]}"
    if _peers(first) != _peers(second):
        yield "Fan-in and fan-out are not compared: they are with as many processes as there are peers."
    if first.subjects and second.subjects and ours.get("sizes") != theirs.get("sizes"):
        yield "Only message sizes that both have are compared."
    if _read_size(first) != _read_size(second):
        yield "What is sent and read is not compared: its messages have another size."


def _rate_name(rate: str) -> str:
    return rate.removesuffix("_per_s").replace("_", " ").replace("fan ", "fan-")


def _sections(changes: list[Change]) -> Iterator[Section]:
    """Ratios: a row for each subject, a column for each figure."""
    kinds = (
        ("Round trips, second run to first", "Less is better.", "round trip"),
        ("Bandwidth, second run to first", "More is better.", "bandwidth at"),
        ("Bandwidth in other ways, second run to first", "More is better.", " bytes"),
        ("Rates, second run to first", "More is better.", ""),
    )
    left = changes
    for title, about, word in kinds:
        chosen = [change for change in left if word in change.figure]
        left = [change for change in left if word not in change.figure]
        columns = list(dict.fromkeys(change.figure for change in chosen))
        # As many columns as a terminal shows: those that have changed, else an even choice.
        shown = _choose(columns, {change.figure for change in chosen if change.verdict})
        section = Section(
            title, f"{about} ▲ better, ▼ worse beyond the noise.", ["", *(_heading(name) for name in shown)]
        )
        by_cell = {(change.subject, change.figure): change for change in chosen}
        for subject in dict.fromkeys(change.subject for change in chosen):
            section.rows.append([subject, *(_cell(by_cell.get((subject, name))) for name in shown)])
            section.baselines.append(False)
        if section.rows:
            yield section


def _cell(change: Change | None) -> str:
    return NOTHING if change is None else ratio_text(change.ratio) + _MARKS[change.verdict]


def _heading(figure: str) -> str:
    return figure.replace("bandwidth at ", "").replace(" round trip of", "").replace(" of round trips of", "")


def _choose(columns: list[str], changed: set[str], most: int = 5) -> list[str]:
    if len(columns) <= most:
        return columns
    wanted = [name for name in columns if name in changed][:most]
    others = [name for name in columns if name not in wanted]
    step = max(1, len(others) // max(1, most - len(wanted)))
    picked = {*wanted, *others[::step][: most - len(wanted)]}
    return [name for name in columns if name in picked]


def _is_baseline(report: Report, change: Change) -> bool:
    return any(subject.name == change.subject and subject.kind == "baseline" for subject in report.subjects)
