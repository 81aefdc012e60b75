"""The plots of a run: which there are, and what they are about."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from .bars import draw_held_bandwidth, draw_held_latency, draw_rates, draw_round_trips
from .curves import bandwidth_limits, draw_bandwidth, draw_latency, families, has_bandwidth, latency_limits
from .document import Report, Subject
from .drawing import Plot, write_png
from .heatmap import heat_maps
from .processes import MeasuringError
from .tables import moves_bytes

HINT = "plots need matplotlib: pip install 'zmqtasks[bench]'"
_LINES = "Lines: from the lowest round to the highest; marks as in the tables."
_BANDS = "Shaded: from the lowest round to the highest."


def need_matplotlib() -> None:
    """Raises `MeasuringError` when it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MeasuringError(HINT) from exc


def plots(report: Report) -> list[Plot]:
    """Those for which the run has figures."""
    subjects = report.links
    made = [*_curves(subjects), *_held([subject for subject in subjects if subject.gil and moves_bytes(subject)])]
    if any(subject.idle.latency_us for subject in subjects):
        about = "Round trips of the smallest message; blue: transports, brown: baselines."
        made.append(Plot("round-trips", "Round trips", about, partial(draw_round_trips, subjects)))
    if any(subject.idle.rates.get("messages_per_s") for subject in subjects):
        about = (
            f"Messages of 100 bytes a second from one process to another, each sent by itself and in batches. {_LINES}"
        )
        made.append(Plot("message-rates", "Message rates", about, partial(draw_rates, subjects)))
    made += _data(report.data)
    if report.matrix is not None and report.matrix.workers:
        made += heat_maps(report.matrix)
    return made


def _curves(subjects: list[Subject]) -> list[Plot]:
    """One for each family of transports, all on the same scale: a dozen lines in one could not be told apart."""
    made = []
    by_family = families(subjects)
    about = f"One way, by message size; dashed: baselines, hollow: encrypted. {_BANDS} The same scale in all."
    for name, family in by_family.items():
        if any(map(has_bandwidth, family)):
            draw = partial(draw_bandwidth, family, bandwidth_limits(subjects))
            made.append(Plot(f"bandwidth-{_file(name)}", f"Bandwidth: {name}", about, draw))
    about = f"Round trips by message size: median, and dotted what 99 % stayed within. {_BANDS} The same scale in all."
    for name, family in by_family.items():
        if any(len(subject.idle.latency_us) > 1 for subject in family):
            draw = partial(draw_latency, family, latency_limits(subjects))
            made.append(Plot(f"latency-{_file(name)}", f"Latency: {name}", about, draw))
    return made


def _held(subjects: list[Subject]) -> list[Plot]:
    made = []
    # Without what only copies memory, which dwarfs the others.
    loaded = [subject for subject in subjects if subject.gil.bandwidth and subject.id != "memcpy"]
    if loaded:
        about = f"Large messages, idle and while a thread of both processes computes in pure Python. {_LINES}"
        draw = partial(draw_held_bandwidth, loaded)
        made.append(Plot("gil-bandwidth", "Bandwidth while the GIL is held", about, draw))
    late = [subject for subject in subjects if subject.gil.latency_us]
    if late:
        about = f"Mean round trips, idle and while a thread of both processes computes in pure Python. {_LINES}"
        made.append(Plot("gil-latency", "Round trips while the GIL is held", about, partial(draw_held_latency, late)))
    return made


def _data(subjects: list[Subject]) -> list[Plot]:
    about = f"Values fetched over data links as workers do, by size; hollow: encrypted. {_BANDS}"
    made = []
    for name, family in families(subjects).items():
        if any(map(has_bandwidth, family)):
            draw = partial(draw_bandwidth, family, bandwidth_limits(subjects))
            made.append(Plot(f"data-links-{_file(name)}", f"Data links: {name}", about, draw))
    return made


def _file(name: str) -> str:
    return name.replace(" ", "-")


def write_pngs(report: Report, folder: Path) -> list[Path]:
    """A file for each plot; gives their paths. One that cannot be drawn is named on standard error."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots(report):
            path = folder / f"{plot.name}.png"
            try:
                write_png(plot, path)
            except OSError:
                raise
            except Exception as exc:  # as in `report`: the other files are worth having
                print(f"{path} could not be drawn: {type(exc).__name__}: {exc}", file=sys.stderr)
            else:
                written.append(path)
    except OSError as exc:
        raise MeasuringError(f"plots cannot be written to {folder}: {exc}") from exc
    return written
