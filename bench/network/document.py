"""The document of a run: what `--json` writes, and what tables, the HTML report and `compare` read.

Every figure is a list with one value per round: the spread of the rounds is the noise that `compare` knows of.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .figures import Figures, Quantiles
from .finding import Finding
from .pairs import Link
from .processes import MeasuringError

FORMAT = 1


class Series(msgspec.Struct, kw_only=True):
    """Figures of one subject in one condition; keys are message sizes in bytes, or names of rates."""

    latency_us: dict[int, list[Quantiles]] = {}
    bandwidth: dict[int, list[float]] = {}
    rates: dict[str, list[float]] = {}

    def add(self, figures: Figures) -> None:
        """Takes up one more round."""
        for size, quantiles in figures.latency_us.items():
            self.latency_us.setdefault(size, []).append(quantiles)
        for size, value in figures.bandwidth.items():
            self.bandwidth.setdefault(size, []).append(value)
        for name, value in figures.rates.items():
            self.rates.setdefault(name, []).append(value)

    def __bool__(self) -> bool:
        return bool(self.latency_us or self.bandwidth or self.rates)

    def latency_p50(self, size: int) -> float | None:
        """The median over the rounds of the median round trip, us."""
        return median([each.p50 for each in self.latency_us.get(size, ())])

    def latency_mean(self, size: int) -> float | None:
        """The median over the rounds of the mean round trip, us.

        For where a thread holds the GIL: round trips of 10 ms and of 30 us come in turns there, as the threads are
        scheduled, and a median is that of whichever were more.
        """
        return median([each.mean for each in self.latency_us.get(size, ()) if each.mean is not None])

    def latency_p99(self, size: int) -> float | None:
        """The median over the rounds of what 99 % of the round trips stayed within, us.

        None unless all rounds had enough of them to tell, else it were that of the fast rounds.
        """
        return median(known_in_all([each.p99 for each in self.latency_us.get(size, ())]))

    def latency_p999(self, size: int) -> float | None:
        """The same of 99.9 %."""
        return median(known_in_all([each.p999 for each in self.latency_us.get(size, ())]))


class Subject(msgspec.Struct, kw_only=True):
    """What was measured: a transport with its settings, or a baseline."""

    id: str
    """One word without spaces, the same in every run: "tcp", "tcp+encryption"."""
    name: str
    kind: str
    """"transport", "baseline", or "data": values fetched over data links, a layer above."""
    settings: dict[str, str | int | float | bool] = {}
    baseline: str | None = None
    """The `id` of the baseline that stands beside it."""
    idle: Series = msgspec.field(default_factory=Series)
    gil: Series = msgspec.field(default_factory=Series)
    """While another thread of both processes holds the GIL."""


class Skipped(msgspec.Struct):
    """What was not measured, and why."""

    subject: str
    reason: str


class Matrix(msgspec.Struct, kw_only=True):
    """Links between the workers of a live cluster; row: from, column: to, None: not measured."""

    workers: list[str] = []
    hosts: list[str] = []
    """The host of each worker."""
    latency_us: list[list[float | None]] = []
    """Median round trips."""
    bandwidth: list[list[float | None]] = []
    """Bytes/s."""
    findings: list[str] = []
    """What the figures say, a sentence each: slow hosts, slow links."""
    judged: list[Finding] = []
    """The same as data."""
    links: list[Link] = []
    """All that is known of each pair; the matrices are made of it."""
    facts: dict[str, Any] = {}


class Report(msgspec.Struct, kw_only=True):
    """A whole run."""

    format: int = FORMAT
    title: str = "zmqtasks bench net"
    command: str = ""
    started: str = ""
    """ISO 8601, with the zone."""
    seconds: float = 0.0
    complete: bool = True
    """False: the run was interrupted, and this is what it had."""
    rounds: int = 0
    machine: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    subjects: list[Subject] = []
    skipped: list[Skipped] = []
    matrix: Matrix | None = None

    @property
    def links(self) -> list[Subject]:
        """Transports and baselines."""
        return [subject for subject in self.subjects if subject.kind != "data"]

    @property
    def data(self) -> list[Subject]:
        """Data links."""
        return [subject for subject in self.subjects if subject.kind == "data"]

    def subject(self, subject_id: str | None) -> Subject | None:
        """The subject of that id."""
        return next((each for each in self.subjects if each.id == subject_id), None)


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def known_in_all(rounds: Sequence[float | None]) -> list[float]:
    """Nothing where a round had too few times to tell, else it were the figure of the fast rounds."""
    known = [value for value in rounds if value is not None]
    return known if len(known) == len(rounds) else []


def to_dict(report: Report) -> dict[str, Any]:
    """Plain data, as it stands in JSON."""
    made: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(report))
    return made


def from_dict(data: dict[str, Any]) -> Report:
    """The other way; `MeasuringError` when it is no document of this format."""
    return _decode(msgspec.json.encode(data), "the report")


def write_json(report: Report, path: Path) -> None:
    """Writes the document, indented."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_json(path: Path) -> Report:
    """Reads a document; `MeasuringError` names the file and what is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise MeasuringError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    return _decode(data, str(path))


class _Format(msgspec.Struct):
    """What a document of any format has."""

    format: int


def _decode(data: bytes, name: str) -> Report:
    try:
        # First: what is of another format is told by that, and not by the first field that differs.
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise MeasuringError(f"{name} has format {found}, this version of zmqtasks reads {FORMAT}")
        return msgspec.json.decode(data, type=Report)
    except msgspec.DecodeError as exc:
        raise MeasuringError(f"{name} is no result of `zmqtasks bench net --json`: {exc}") from exc
