"""Drawings with a row for each subject: bars of two figures beside each other, and the spread of round trips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .document import Subject, known_in_all, median
from .drawing import ink, mark, new_figure, round_mark
from .tables import figure as figure_of
from .wording import bandwidth_text, rate_text, size_text, time_text

_FIRST, _SECOND = "#8da4ef", "#e5484d"
_OURS, _BASELINE = "#3e7bfa", "#c8860a"
_QUANTILES = (("median", "o"), ("99 %", "|"), ("99.9 %", "x"))


class _Row(NamedTuple):
    """Of one subject: the rounds of both figures; there may be none."""

    name: str
    first: Sequence[float]
    second: Sequence[float]


def draw_round_trips(subjects: list[Subject]) -> Any:
    """Of the smallest message: how far the tail is from the median."""
    from matplotlib.lines import Line2D

    shown = [subject for subject in subjects if subject.idle.latency_us][::-1]
    figure = new_figure(1.3 + 0.27 * len(shown))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for row, subject in enumerate(shown):
        series, size = subject.idle, min(subject.idle.latency_us)
        colour = _BASELINE if subject.kind == "baseline" else _OURS
        points = [series.latency_p50(size), series.latency_p99(size), series.latency_p999(size)]
        there = [point for point in points if point is not None]
        axes.plot(there, [row] * len(there), color=colour, linewidth=1)
        for point, (_, marker) in zip(points, _QUANTILES, strict=True):
            if point is not None:
                axes.plot([point], [row], marker=marker, color=colour, markersize=6)
    marks = [
        Line2D([], [], color=ink(), linestyle="", marker=marker, markersize=6, label=name)
        for name, marker in _QUANTILES
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return _named(figure, axes, [subject.name for subject in shown], time_text)


def draw_held_bandwidth(subjects: list[Subject]) -> Any:
    """Idle and with the GIL held, of the largest messages."""
    size = max(size for subject in subjects for size in subject.gil.bandwidth)
    rows = [_Row(each.name, each.idle.bandwidth.get(size, ()), each.gil.bandwidth.get(size, ())) for each in subjects]
    return _bars(rows, ("idle", "GIL held"), bandwidth_text, f"messages of {size_text(size)}")


def draw_held_latency(subjects: list[Subject]) -> Any:
    """The same of mean round trips of the smallest."""
    size = min(size for subject in subjects for size in subject.gil.latency_us)
    rows = []
    for subject in subjects:
        means = (
            known_in_all([each.mean for each in of.latency_us.get(size, ())]) for of in (subject.idle, subject.gil)
        )
        rows.append(_Row(subject.name, *means))
    return _bars(rows, ("idle", "GIL held"), time_text, f"messages of {size_text(size)}", log=True)


def draw_rates(subjects: list[Subject]) -> Any:
    """Messages a second, each on its own and in batches."""
    names = ("messages_per_s", "batched_messages_per_s")
    rows = [_Row(each.name, *(each.idle.rates.get(name, ()) for name in names)) for each in subjects]
    return _bars(rows, ("one by one", "in batches"), rate_text, "a second")


def _bars(
    rows: list[_Row], names: tuple[str, str], text: Callable[[float | None], str], label: str, log: bool = False
) -> Any:
    """Two bars for each row that has a figure, with a line from the lowest round to the highest.

    On a logarithmic axis they begin at a power of ten.
    """
    from matplotlib.patches import Patch

    shown = [row for row in rows if row.first or row.second][::-1]
    figure = new_figure(1.35 + 0.42 * len(shown))
    axes = figure.add_subplot()
    known = [value for row in shown for values in row[1:] for value in values]
    low, high = (10 ** math.floor(math.log10(min(known))), max(known)) if log else (0.0, max(known))
    if log:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=4)
    # Room for the text after the longest bar.
    axes.set_xlim(low, high * (high / low) ** 0.3 if log else high * 1.3)
    for number, row in enumerate(shown):
        for place, values, colour in ((number + 0.19, row.first, _FIRST), (number - 0.19, row.second, _SECOND)):
            middle = median(values)
            if middle is not None:
                axes.barh(place, middle - low, left=low, height=0.36, color=colour)
                axes.plot([min(values), max(values)], [place] * 2, color=ink(), linewidth=0.8)
                beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
                axes.annotate(figure_of(values, text), (max(values), place), **beside)
    axes.set_xlabel(label)
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, (_FIRST, _SECOND), strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return _named(figure, axes, [row.name for row in shown], text)


def _named(figure: Any, axes: Any, names: list[str], text: Callable[[float | None], str]) -> Any:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if axes.get_xscale() == "log":
        mark(axes.xaxis, *axes.get_xlim())
    axes.xaxis.set_major_formatter(lambda value, _: round_mark(text(value)))
    return figure
