"""What a run says, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .document import Report, Subject, median
from .tables import bandwidth_ratios, latency_ratios, moves_bytes
from .wording import bandwidth_text, ratio_text, size_text, time_text


def findings(report: Report) -> list[str]:
    """The sentences at the head of the report: the fastest, how far from their baselines, what the GIL does."""
    said = list(report.matrix.findings) if report.matrix is not None else []
    transports = [subject for subject in report.subjects if subject.kind == "transport" and moves_bytes(subject)]
    if len(transports) > 1:
        said += _fastest(transports)
    said += _ratios(report, transports)
    said += _held(transports)
    return said


def _large(subjects: list[Subject]) -> int | None:
    """The size that stands for bulk data: the largest up to 64 MiB, above which memory decides."""
    sizes = {size for subject in subjects for size in subject.idle.bandwidth}
    return max((size for size in sizes if size <= 64 << 20), default=min(sizes, default=None))


def _fastest(transports: list[Subject]) -> list[str]:
    said = []
    trips = [(value, each.name) for each in transports if (value := _trip(each)) is not None]
    if trips:
        value, name = min(trips)
        said.append(f"The shortest round trip between two processes: {name}, {time_text(value)}.")
    size = _large(transports)
    read = {each.name: each.idle.rates.get("read_bytes_per_s", ()) for each in transports}
    if any(read.values()):
        said.append(f"The most bandwidth, sent and read: {_most(read)}.")
    elif size is not None:
        sent = {each.name: each.idle.bandwidth.get(size, ()) for each in transports}
        if any(sent.values()):
            said.append(f"The most bandwidth, with messages of {size_text(size)} that nobody reads: {_most(sent)}.")
    return said


def _most(rounds: Mapping[str, Sequence[float]]) -> str:
    value, name = max((value, name) for name, values in rounds.items() if (value := median(values)) is not None)
    return f"{name}, {bandwidth_text(value)}"


def _trip(subject: Subject) -> float | None:
    return subject.idle.latency_p50(min(subject.idle.latency_us)) if subject.idle.latency_us else None


def _ratios(report: Report, transports: list[Subject]) -> list[str]:
    said = []
    size = _large(transports)
    for subject in transports:
        baseline = report.subject(subject.baseline)
        if baseline is None:
            continue
        trip = median(latency_ratios(subject.idle, baseline.idle))
        load = None if size is None else median(bandwidth_ratios(subject.idle, baseline.idle, size))
        parts = [f"{ratio_text(load)} its bandwidth at {size_text(size or 0)}"] if load is not None else []
        parts += [f"{ratio_text(trip)} its round trip"] if trip is not None else []
        if parts:
            said.append(f"{subject.name}, beside {baseline.name}: {', '.join(parts)}.")
    return said


def _held(transports: list[Subject]) -> list[str]:
    """What is left of the bandwidth, best first."""
    sizes = {size for subject in transports for size in subject.gil.bandwidth}
    if not sizes:
        return []
    size = max(sizes)
    left = []
    for subject in transports:
        held, idle = (median(series.bandwidth.get(size, ())) for series in (subject.gil, subject.idle))
        if held is not None and idle is not None:
            left.append((held, held / idle, subject.name))
    if not left:
        return []
    listed = "; ".join(
        f"{name} {bandwidth_text(held)} ({share:.0%})" for held, share, name in sorted(left, reverse=True)
    )
    rounds = "; of one round" if any(len(subject.gil.bandwidth.get(size, ())) == 1 for subject in transports) else ""
    return [f"While a thread of both processes holds the GIL ({size_text(size)}, share of idle{rounds}): {listed}."]
