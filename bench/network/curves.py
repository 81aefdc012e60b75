"""Curves over the size of messages: bandwidth and round trips, a drawing for each family of transports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .document import Subject, median
from .drawing import ink, mark, new_figure, round_mark
from .subjects import BASELINES
from .tables import moves_bytes
from .wording import bandwidth_text, size_text, time_text

_WITHIN_HOST = "within a host"
_MOST_SIZES = 7
"""So many names of sizes fit below a drawing."""
_SHORT_NAME = 11
"""Three such names fit beside each other in a legend."""
_OURS = (("#3e7bfa", "o"), ("#e5484d", "s"), ("#30a46c", "^"), ("#d6409f", "P"), ("#0fa3b1", "X"))
_BASELINES = ((None, "D"), ("#c8860a", "v"), ("#9b5de5", "*"))
"""None: the colour of text."""
_BASELINE_LINES = ((0, (4, 2)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1.5)))
_ENCRYPTED_LINE = (0, (9, 2))
_COMPRESSIONS = ("off", "auto", "lz4", "noise", "zstd")


class Limits(NamedTuple):
    """The ends of both axes: drawings of one kind have the same, so that they can be laid beside each other."""

    sizes: list[int]
    low: float
    high: float


def families(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    """Transports that stand for the same, and after them their baselines, the main one first."""
    found: dict[str, list[Subject]] = {}
    baselines = []
    for subject in subjects:
        if subject.kind == "baseline":
            baselines.append(subject)
        else:
            found.setdefault(_family(subject.id.partition("+")[0]), []).append(subject)
    schemes = {each.id: each.schemes for each in BASELINES}
    main = {each.id for each in BASELINES if each.main}
    for baseline in sorted(baselines, key=lambda each: each.id not in main):
        for name in sorted({_family(scheme) for scheme in schemes.get(baseline.id, ())}):
            if name in found:
                found[name].append(baseline)
    return found


def _family(scheme: str) -> str:
    return _WITHIN_HOST if scheme in ("inproc", "shm", "unix") else scheme


def has_bandwidth(subject: Subject) -> bool:
    """Whether it has a curve of bandwidth."""
    return bool(subject.idle.bandwidth) and moves_bytes(subject)


def bandwidth_limits(subjects: Iterable[Subject]) -> Limits:
    """Of all those that have a curve."""
    series = [subject.idle.bandwidth for subject in subjects if has_bandwidth(subject)]
    return _limits(
        {size for each in series for size in each}, [v for each in series for vs in each.values() for v in vs]
    )


def latency_limits(subjects: Iterable[Subject]) -> Limits:
    """Of all round trips, median and tail."""
    series = [subject.idle for subject in subjects]
    trips = [each for one in series for rounds in one.latency_us.values() for each in rounds]
    tails = [each.p99 for each in trips if each.p99 is not None]
    return _limits({size for each in series for size in each.latency_us}, [*(each.p50 for each in trips), *tails])


def _limits(sizes: set[int], values: Sequence[float]) -> Limits:
    return Limits(sorted(sizes), min(values) / 1.25, max(values) * 1.25)


def draw_bandwidth(subjects: list[Subject], limits: Limits) -> Any:
    """The median of the rounds, on a band from the lowest round to the highest."""
    shown = [(subject, look) for subject, look in _looks(subjects) if has_bandwidth(subject)]
    figure, axes = _curves(len(shown), "bytes a second", bandwidth_text, limits)
    for subject, look in shown:
        sizes = sorted(subject.idle.bandwidth)
        rounds = [subject.idle.bandwidth[size] for size in sizes]
        axes.plot(sizes, [median(values) for values in rounds], label=subject.name, **look)
        _band(axes, sizes, rounds, look)
    return _finish(figure, axes, limits)


def draw_latency(subjects: list[Subject], limits: Limits) -> Any:
    """The same of round trips, and dotted what 99 % stayed within."""
    shown = [(subject, look) for subject, look in _looks(subjects) if subject.idle.latency_us]
    figure, axes = _curves(len(shown), "round trip", time_text, limits)
    for subject, look in shown:
        series = subject.idle
        sizes = sorted(series.latency_us)
        axes.plot(sizes, [series.latency_p50(size) for size in sizes], label=subject.name, **look)
        _band(axes, sizes, [[each.p50 for each in series.latency_us[size]] for size in sizes], look)
        tails = [(size, tail) for size in sizes if (tail := series.latency_p99(size)) is not None]
        if tails:
            dotted = {**look, "linestyle": ":", "linewidth": 1, "markersize": 3}
            axes.plot(*zip(*tails, strict=True), label="_nolegend_", **dotted)
    return _finish(figure, axes, limits)


def _band(axes: Any, sizes: Sequence[int], rounds: Sequence[Sequence[float]], look: dict[str, Any]) -> None:
    lows, highs = [min(values) for values in rounds], [max(values) for values in rounds]
    axes.fill_between(sizes, lows, highs, color=look["color"], alpha=0.13, linewidth=0)


def _looks(subjects: Sequence[Subject]) -> list[tuple[Subject, dict[str, Any]]]:
    """Each with its colour, line and marks: the same in every drawing of the family."""
    counts = {"transport": 0, "baseline": 0, "data": 0}
    made = []
    for subject in subjects:
        number = counts[subject.kind]
        counts[subject.kind] += 1
        encrypted = subject.settings.get("encryption") == "on"
        if subject.kind == "baseline":
            colour, marker = _BASELINES[number % len(_BASELINES)]
            colour = colour or ink()
            line: Any = _BASELINE_LINES[number % len(_BASELINE_LINES)]
        elif subject.kind == "data":
            last = subject.id.split("+")[-1]
            colour, marker = _OURS[_COMPRESSIONS.index(last) if last in _COMPRESSIONS else 0]
            line = _ENCRYPTED_LINE if encrypted else "-"
        else:
            colour, marker = _OURS[number % len(_OURS)]
            line = _ENCRYPTED_LINE if encrypted else "-"
        face = "none" if encrypted else colour
        made.append((subject, {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": face}))
    return made


def _curves(count: int, label: str, text: Callable[[float | None], str], limits: Limits) -> tuple[Any, Any]:
    figure = new_figure(3.0 + 0.18 * -(-count // 2))
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(limits.sizes[0] / 1.5, limits.sizes[-1] * 1.5)
    axes.set_ylim(limits.low, limits.high)
    axes.set_xlabel("message size")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: round_mark(text(value)))
    return figure, axes


def _finish(figure: Any, axes: Any, limits: Limits) -> Any:
    shown = limits.sizes[-1:]
    apart = math.log2(limits.sizes[-1] / limits.sizes[0]) / _MOST_SIZES
    for size in limits.sizes[-2::-1]:  # from the largest on, as far apart as their names need
        if math.log2(shown[0] / size) >= apart:
            shown.insert(0, size)
    axes.set_xticks(shown, [size_text(size) for size in shown], minor=False)
    axes.tick_params(axis="x", labelsize=8)
    _, names = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, names)) <= _SHORT_NAME else 2
    figure.legend(loc="outside lower center", ncols=columns, handlelength=3.2)
    mark(axes.yaxis, limits.low, limits.high)
    return figure
