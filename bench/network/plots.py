"""The plots of a run, drawn by matplotlib: as SVG within the report, in the colours of its reader, and as PNG files.

Text and axes of the SVGs are `currentColor`, so the page decides, and one drawing is right in light and dark. A drawing is
as wide as a phone: there its text is as large as the page's, on a desktop larger.
"""

from __future__ import annotations

import functools
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .document import Report, Series, Subject, median
from .processes import MeasuringError
from .tables import moves_bytes
from .wording import bandwidth_text, rate_text, size_text, time_text

HINT = "plots need matplotlib: pip install 'zmqtasks[bench]'"
_WIDTH_IN = 4.5
_INK, _GRID = "#010203", "#040506"
"""Stand for the colours of the page until `_for_page` puts those in."""
_PNG_INK, _PNG_GRID = "#1c2024", "#d9d9e0"
_PNG_DPI = 160
_SHORT_NAME = 16
"""Three such names fit beside each other in a legend."""
_MOST_SIZES = 7
"""So many names of sizes fit below a drawing."""
_FEW_DECADES = 50
"""Below this ratio of the ends of an axis its powers of ten are too few marks."""
_COLOURS = {
    "inproc": "#f76b15",
    "shm": "#30a46c",
    "unix": "#0fa3b1",
    "tcp": "#3e7bfa",
    "zmq": "#e5484d",
    "ucx": "#9b5de5",
    "memcpy": "#8d8d8d",
    "raw-socket": "#7d8bb0",
    "raw-pyzmq": "#b98a8a",
    "raw-ucxx": "#a58fc0",
    "dask": "#ad8b3a",
    "dask-zmq": "#7d6a3a",
}
_OTHER_COLOURS = ("#d6409f", "#5b8c00", "#b35900")
_FIRST, _SECOND = "#8da4ef", "#e5484d"
_MARKERS = "os^Dv<>PX*"
_COMPRESSIONS = {"auto": 1, "lz4": 2, "noise": 3, "zstd": 4}
_DATA_COLOURS = ("#3e7bfa", "#0fa3b1", "#e5484d", "#f76b15", "#9b5de5")
"""Off, and those above."""
_ENCRYPTED_LINE = (0, (5, 1))


class Plot(NamedTuple):
    """A drawing that can be made when it is wanted."""

    name: str
    """Of its file, without the ending."""
    title: str
    about: str
    draw: Callable[[], Any]
    """Gives a figure of matplotlib."""


def need_matplotlib() -> None:
    """Raises `MeasuringError` when it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MeasuringError(HINT) from exc


def plots(report: Report) -> list[Plot]:
    """Those for which the run has figures."""
    made: list[Plot] = []
    subjects = report.links
    if any(moves_bytes(subject) and subject.idle.bandwidth for subject in subjects):
        about = "One way, by message size. Greyish: baselines. Hollow marks: encrypted."
        made.append(Plot("bandwidth", "Bandwidth", about, lambda: _bandwidth(subjects)))
    if any(len(subject.idle.latency_us) > 1 for subject in subjects):
        about = "Round trips by message size: median, and dotted what 99 % stayed within."
        made.append(Plot("latency", "Latency", about, lambda: _latency(subjects)))
    held = [subject for subject in subjects if subject.gil and moves_bytes(subject)]
    # Without what only copies memory, which dwarfs the others.
    loaded = [subject for subject in held if subject.gil.bandwidth and subject.id != "memcpy"]
    if loaded:
        about = "Large messages, idle and while a thread of both processes computes in pure Python."
        made.append(Plot("gil-bandwidth", "Bandwidth while the GIL is held", about, lambda: _held_bandwidth(loaded)))
    if any(subject.gil.latency_us for subject in held):
        about = "Mean round trips, idle and while a thread of both processes computes in pure Python."
        made.append(Plot("gil-latency", "Round trips while the GIL is held", about, lambda: _held_latency(held)))
    if any(subject.idle.latency_us for subject in subjects):
        about = "Round trips of the smallest message: median, 99 % and 99.9 %."
        made.append(Plot("round-trips", "Round trips", about, lambda: _round_trips(subjects)))
    if any(subject.idle.rates for subject in subjects):
        about = "Messages of 100 bytes a second from one process to another, each sent by itself and in batches."
        made.append(Plot("message-rates", "Message rates", about, lambda: _rates(subjects)))
    made += _data_plots(report.data)
    if report.matrix is not None and report.matrix.workers:
        from .heatmap import heat_maps

        made += heat_maps(report.matrix)
    return made


def _data_plots(subjects: list[Subject]) -> list[Plot]:
    """One for each transport: all combinations in one would be twenty lines."""
    by_scheme: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_scheme.setdefault(subject.id.partition("+")[0], []).append(subject)
    about = (
        "Values fetched over data links as workers do, by size, as they are and compressed. Hollow marks: encrypted."
    )
    return [
        Plot(f"data-links-{scheme}", f"Data links: {scheme}", about, functools.partial(_bandwidth, those))
        for scheme, those in by_scheme.items()
    ]


def svg(plot: Plot) -> str:
    """The drawing as an element of a page."""
    with _style(_INK, _GRID, plot.name):
        out = io.StringIO()
        plot.draw().savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), plot)


def write_pngs(report: Report, folder: Path) -> list[Path]:
    """A file for each plot; gives their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for plot in plots(report):
            path = folder / f"{plot.name}.png"
            try:
                _write_png(plot, path)
            except OSError:
                raise
            except Exception as exc:  # as in `report`: the other files are worth having
                print(f"{path} could not be drawn: {type(exc).__name__}: {exc}", file=sys.stderr)
            else:
                written.append(path)
    except OSError as exc:
        raise MeasuringError(f"plots cannot be written to {folder}: {exc}") from exc
    return written


def _write_png(plot: Plot, path: Path) -> None:
    with _style(_PNG_INK, _PNG_GRID, plot.name):
        drawing = plot.draw()
        drawing.suptitle(plot.title, x=0.02, ha="left", fontsize=10, fontweight="bold")
        drawing.savefig(path, format="png", dpi=_PNG_DPI, facecolor="white")


def new_figure(height_in: float, width_in: float = _WIDTH_IN) -> Any:
    """An empty figure; without pyplot, which keeps figures and looks for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


@contextmanager
def _style(ink: str, grid: str, salt: str) -> Iterator[None]:
    import matplotlib

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(coloured, ink),
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(settings):
        yield


def _for_page(text: str, plot: Plot) -> str:
    text = text[text.index("<svg") :]
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    # The page sets the size; every drawing numbers its groups from 1, and ids are of the whole page.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|[A-Za-z]+)[._]\w*"', "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{plot.title}"', 1)


def _look(subject: Subject, number: int) -> dict[str, Any]:
    root = subject.id.partition("+")[0]
    colour = _COLOURS.get(root) or _OTHER_COLOURS[number % len(_OTHER_COLOURS)]
    marker = _MARKERS[number % len(_MARKERS)]
    if subject.kind == "baseline":
        return {"color": colour, "linestyle": (0, (4, 2)), "marker": marker, "markersize": 3}
    encrypted = subject.settings.get("encryption") == "on"
    if subject.kind == "data":  # in drawings of their own, a transport in each
        colour = _DATA_COLOURS[_COMPRESSIONS.get(subject.id.split("+")[-1], 0)]
        face = "none" if encrypted else colour
        return {"color": colour, "marker": marker, "linestyle": "--" if encrypted else "-", "markerfacecolor": face}
    # Variants of one transport have its colour, hollow marks and lines of their own.
    style, face = (_ENCRYPTED_LINE, "none") if encrypted else ("-", colour)
    return {"color": colour, "marker": marker, "linestyle": style, "markerfacecolor": face}


def _curves(height_in: float, label: str, text: Callable[[float | None], str]) -> tuple[Any, Any]:
    figure = new_figure(height_in)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("message size")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: _round(text(value)))
    return figure, axes


def _finish(figure: Any, axes: Any, sizes: list[int]) -> Any:
    shown = sizes[-1:]
    apart = math.log2(sizes[-1] / sizes[0]) / _MOST_SIZES
    for size in sizes[-2::-1]:  # from the largest on, as far apart as their names need
        if math.log2(shown[0] / size) >= apart:
            shown.insert(0, size)
    axes.set_xticks(shown, [size_text(size) for size in shown], minor=False)
    axes.tick_params(axis="x", labelsize=8)
    names = [line.get_label() for line in axes.get_lines()]
    figure.legend(loc="outside lower center", ncols=3 if max(map(len, names)) <= _SHORT_NAME else 2)
    _mark(axes.yaxis, *axes.get_ylim())
    return figure


def _mark(axis: Any, low: float, high: float) -> None:
    """Marks of a logarithmic axis that are neither too many nor too few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > _FEW_DECADES else (1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())


def _bandwidth(subjects: list[Subject]) -> Any:
    shown = [subject for subject in subjects if subject.idle.bandwidth and moves_bytes(subject)]
    figure, axes = _curves(3.3 + 0.18 * -(-len(shown) // 2), "bytes a second", bandwidth_text)
    for number, subject in enumerate(shown):
        sizes = sorted(subject.idle.bandwidth)
        values = [median(subject.idle.bandwidth[size]) for size in sizes]
        axes.plot(sizes, values, label=subject.name, **_look(subject, number))
    return _finish(figure, axes, sorted({size for subject in shown for size in subject.idle.bandwidth}))


def _latency(subjects: list[Subject]) -> Any:
    shown = [subject for subject in subjects if subject.idle.latency_us]
    figure, axes = _curves(3.4 + 0.18 * -(-len(shown) // 3), "round trip", time_text)
    for number, subject in enumerate(shown):
        series, look = subject.idle, _look(subject, number)
        sizes = sorted(series.latency_us)
        axes.plot(sizes, [series.latency_p50(size) for size in sizes], label=subject.name, **look)
        tails = [(size, tail) for size in sizes if (tail := series.latency_p99(size)) is not None]
        if tails:
            axes.plot(*zip(*tails, strict=True), color=look["color"], linestyle=":", linewidth=0.9)
    return _finish(figure, axes, sorted({size for subject in shown for size in subject.idle.latency_us}))


def _round_trips(subjects: list[Subject]) -> Any:
    shown = [subject for subject in subjects if subject.idle.latency_us][::-1]
    figure = new_figure(1.0 + 0.27 * len(shown))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for row, subject in enumerate(shown):
        series, size = subject.idle, min(subject.idle.latency_us)
        colour = _look(subject, row)["color"]
        points = [series.latency_p50(size), series.latency_p99(size), series.latency_p999(size)]
        there = [point for point in points if point is not None]
        axes.plot(there, [row] * len(there), color=colour, linewidth=1)
        for point, marker in zip(points, "o|x", strict=True):
            if point is not None:
                axes.plot([point], [row], marker=marker, color=colour, markersize=6)
    return _rows(figure, axes, [subject.name for subject in shown], time_text)


def _held_bandwidth(subjects: list[Subject]) -> Any:
    size = max(size for subject in subjects for size in subject.gil.bandwidth)
    rows = [(each.name, _bandwidth_at(each.idle, size), _bandwidth_at(each.gil, size)) for each in subjects]
    return _bars(rows, ("idle", "GIL held"), bandwidth_text, f"messages of {size_text(size)}")


def _held_latency(subjects: list[Subject]) -> Any:
    size = min(size for subject in subjects for size in subject.gil.latency_us)
    rows = [(each.name, each.idle.latency_mean(size), each.gil.latency_mean(size)) for each in subjects]
    return _bars(rows, ("idle", "GIL held"), time_text, f"messages of {size_text(size)}", log=True)


def _rates(subjects: list[Subject]) -> Any:
    names = ("messages_per_s", "batched_messages_per_s")
    rows = []
    for subject in subjects:
        singly, batched = (median(subject.idle.rates.get(name, ())) for name in names)
        rows.append((subject.name, singly, batched))
    return _bars(rows, ("one by one", "in batches"), rate_text, "a second")


def _bandwidth_at(series: Series, size: int) -> float | None:
    return median(series.bandwidth.get(size, ()))


def _bars(
    rows: list[tuple[str, float | None, float | None]],
    names: tuple[str, str],
    text: Callable[[float | None], str],
    label: str,
    log: bool = False,
) -> Any:
    """Two bars for each row that has a figure; on a logarithmic axis they begin at a power of ten."""
    from matplotlib.patches import Patch

    shown = [row for row in rows if row[1] is not None or row[2] is not None][::-1]
    figure = new_figure(1.35 + 0.42 * len(shown))
    axes = figure.add_subplot()
    known = [value for row in shown for value in row[1:] if value is not None]
    low, high = (10 ** math.floor(math.log10(min(known))), max(known)) if log else (0.0, max(known))
    if log:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=4)
    # Room for the text after the longest bar.
    axes.set_xlim(low, high * (high / low) ** 0.3 if log else high * 1.3)
    for row, (_, first, second) in enumerate(shown):
        for offset, value, colour in ((0.19, first, _FIRST), (-0.19, second, _SECOND)):
            if value is not None:
                axes.barh(row + offset, value - low, left=low, height=0.36, color=colour)
                place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
                axes.annotate(text(value), (value, row + offset), **place)
    axes.set_xlabel(label)
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, (_FIRST, _SECOND), strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return _rows(figure, axes, [row[0] for row in shown], text)


def _rows(figure: Any, axes: Any, names: list[str], text: Callable[[float | None], str]) -> Any:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if axes.get_xscale() == "log":
        _mark(axes.xaxis, *axes.get_xlim())
    axes.xaxis.set_major_formatter(lambda value, _: _round(text(value)))
    return figure


def _round(text: str) -> str:
    """Marks of an axis are round numbers: `1.00 GB/s` is `1 GB/s`."""
    return "0" if text.startswith(("0 ", "0.00 ")) else re.sub(r"(\.\d*?)0+(?= )", r"\1", text).replace(". ", " ")
