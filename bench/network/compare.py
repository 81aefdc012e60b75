"""`zmqtasks bench compare A.json B.json`: what got better or worse from one run to the next, beyond the noise.

The noise of a figure is known from its rounds. A figure has changed when no round of one run lies within the range of the
other's, and the medians differ by more than `SMALLEST_CHANGE`; of a figure with a single round nobody knows the noise, and
only a change by more than `UNKNOWN_NOISE` counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.console import Console

from .document import FORMAT, Matrix, Report, Series, read_json
from .figures import RATES
from .machine import differences
from .processes import MeasuringError
from .tables import Section, moves_bytes
from .terminal import show_section
from .wording import NOTHING, bandwidth_text, figure_text, ratio_text, size_text, time_text

SMALLEST_CHANGE = 0.05
UNKNOWN_NOISE = 1.0
_FEW_ROUNDS = 2
"""So few say little of the noise: their range counts for double."""
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
        first, second = _read(first_path), _read(second_path)
    except MeasuringError as exc:
        raise click.ClickException(str(exc)) from exc
    show(first, second, Console())
    return 0


class _Format(msgspec.Struct):
    """What a document of any format has."""

    format: int


def _read(path: Path) -> Report:
    """As `read_json`, but what is of another format, or of none, is told by that and not by the first field that differs."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Format).format
    except OSError as exc:
        raise MeasuringError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except msgspec.DecodeError as exc:
        raise MeasuringError(f"{path} is no result of `zmqtasks bench net --json`: {exc}") from exc
    if found != FORMAT:
        raise MeasuringError(f"{path} has format {found}, this version of zmqtasks reads {FORMAT}")
    return read_json(path)


def show(first: Report, second: Report, console: Console) -> None:
    """The tables and sentences."""
    for sentence in differences(first.machine, second.machine):
        console.print(f"The machines differ in {sentence}", highlight=False, markup=False)
    if not (first.complete and second.complete):
        console.print("A run was interrupted: only what both have is compared.")
    changes = compare(first, second)
    for section in _sections(changes):
        show_section(section, console)
    for sentence in _matrices(first.matrix, second.matrix):
        console.print(sentence, highlight=False, markup=False)
    if not changes:
        if first.matrix is None or second.matrix is None:
            console.print("The runs have no figures in common.")
        return
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


def compare(first: Report, second: Report) -> list[Change]:
    """Every figure that both runs have."""
    changes: list[Change] = []
    for subject in first.subjects:
        other = second.subject(subject.id)
        if other is not None:
            bytes_move = moves_bytes(subject)
            changes += _series(subject.name, subject.idle, other.idle, "", bytes_move)
            changes += _series(subject.name, subject.gil, other.gil, ", GIL held", bytes_move)
    return changes


def _series(name: str, first: Series, second: Series, condition: str, bytes_move: bool) -> Iterator[Change]:
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
                yield _change(name, f"{figure} of {size_text(size)}{condition}", values[0], values[1], -1, text)
    for size in sorted(first.bandwidth.keys() & second.bandwidth.keys()) if bytes_move else ():
        ours, theirs = first.bandwidth[size], second.bandwidth[size]
        text = f"{bandwidth_text(statistics.median(ours))} → {bandwidth_text(statistics.median(theirs))}"
        yield _change(name, f"bandwidth at {size_text(size)}{condition}", ours, theirs, 1, text)
    for rate in RATES:
        if rate in first.rates and rate in second.rates and (bytes_move or not rate.endswith("bytes_per_s")):
            ours, theirs = first.rates[rate], second.rates[rate]
            text = " → ".join(figure_text(rate, statistics.median(values)) for values in (ours, theirs))
            yield _change(name, _rate_name(rate) + condition, ours, theirs, 1, text)


def _rate_name(rate: str) -> str:
    return rate.removesuffix("_per_s").replace("_", " ").replace("fan ", "fan-")


def _change(subject: str, figure: str, first: list[float], second: list[float], better: int, text: str) -> Change:
    """`better`: 1 when more is better, -1 when less is."""
    ours, theirs = statistics.median(first), statistics.median(second)
    verdict = 0
    if beyond_noise(first, second):
        verdict = better if theirs > ours else -better
    return Change(subject, figure, ours, theirs, verdict, text)


def beyond_noise(first: list[float], second: list[float]) -> bool:
    """Whether the values of the rounds of two runs are told apart; see the top of this module."""
    ours, theirs = statistics.median(first), statistics.median(second)
    if min(ours, theirs) <= 0:
        return ours != theirs
    factor = max(ours, theirs) / min(ours, theirs)
    fewest = min(len(first), len(second))
    if fewest == 1:
        return factor > 1 + UNKNOWN_NOISE
    if factor <= 1 + SMALLEST_CHANGE:
        return False
    low, high = (first, second) if ours < theirs else (second, first)
    slack = (max(first) - min(first) + max(second) - min(second)) / 2 if fewest <= _FEW_ROUNDS else 0.0
    return max(low) + slack < min(high)


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


def _matrices(first: Matrix | None, second: Matrix | None) -> Iterator[str]:
    """Of the links that both clusters have, by the names of their workers."""
    if first is None or second is None:
        return
    for word, ours, theirs in (
        ("bandwidth", _links(first, first.bandwidth), _links(second, second.bandwidth)),
        ("round trip", _links(first, first.latency_us), _links(second, second.latency_us)),
    ):
        ratios = [theirs[link] / ours[link] for link in ours.keys() & theirs.keys() if ours[link]]
        if ratios:
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            yield (
                f"{word} of {len(ratios)} links between workers, second run to first: median {ratio_text(middle)}, "
                f"from {ratio_text(low)} to {ratio_text(high)}"
            )


def _links(matrix: Matrix, cells: list[list[float | None]]) -> dict[tuple[str, str], float]:
    names = matrix.workers
    return {
        (names[row], names[column]): cell
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
        if cell is not None
    }
