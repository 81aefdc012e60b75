"""The figures of a run as rows of text: the terminal and the HTML report show the same tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .document import Report, Series, Subject, median
from .wording import NOTHING, bandwidth_text, figure_text, ratio_text, size_text, time_text

_MESSAGE_RATES = {
    "messages_per_s": "one by one",
    "batched_messages_per_s": "in batches",
    "fan_in_messages_per_s": "fan-in",
    "fan_out_messages_per_s": "fan-out",
    "connects_per_s": "connects",
}
_BYTE_RATES = {
    "read_bytes_per_s": "sent and read",
    "duplex_bytes_per_s": "both ways at once",
    "fan_in_bytes_per_s": "fan-in",
    "fan_out_bytes_per_s": "fan-out",
}
_TERMINAL_SIZES = 5


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a heading; the first column says what, the others are figures."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    baselines: list[bool] = field(default_factory=list)
    """For each row, whether it is of a baseline."""


def sections(report: Report, *, all_sizes: bool = False) -> list[Section]:
    """The tables of a run that have anything in them; `all_sizes`: no choice among the message sizes."""
    made = [_latency(report), _bandwidth(report, all_sizes), _ratios(report, all_sizes)]
    made.append(_data(report, all_sizes))
    made += [_held(report), _message_rates(report), _byte_rates(report)]
    return [section for section in made if section.rows]


def moves_bytes(subject: Subject) -> bool:
    """False for what passes references: its bandwidth is that of nothing."""
    return subject.settings.get("scheme", subject.id) != "inproc"


def _latency(report: Report) -> Section:
    size = min((size for subject in report.links for size in subject.idle.latency_us), default=1)
    section = Section(
        f"Latency: round trips of {size_text(size)}",
        "One message there and back, one at a time.",
        ["", "median", "99 % within", "99.9 % within", "best"],
    )
    for subject in report.links:
        rounds = subject.idle.latency_us.get(size)
        if rounds:
            series = subject.idle
            values = (series.latency_p50(size), series.latency_p99(size), series.latency_p999(size))
            best = min(each.minimum for each in rounds)
            _add(section, subject, [time_text(value) for value in (*values, best)])
    return section


def _bandwidth(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.links, all_sizes)
    columns = ["", *(size_text(size) for size in sizes)]
    about = "One way, by message size; what travels does not compress."
    section = Section("Bandwidth", about, columns)
    for subject in report.links:
        values = [median(subject.idle.bandwidth.get(size, ())) for size in sizes]
        if any(value is not None for value in values):
            cells = [bandwidth_text(value) for value in values]
            _add(section, subject, cells if moves_bytes(subject) else ["by reference"] + [""] * (len(cells) - 1))
    return section


def _data(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.data, all_sizes)
    about = "Values fetched as workers do, by size; measurements compress to about half, noise does not at all."
    section = Section("Data links", about, ["", "fetch of 1 B", *(size_text(size) for size in sizes)])
    for subject in report.data:
        values = [bandwidth_text(median(subject.idle.bandwidth.get(size, ()))) for size in sizes]
        _add(section, subject, [time_text(subject.idle.latency_p50(1)), *values])
    return section


def _ratios(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.links, all_sizes)
    columns = ["", "baseline", "round trip", *(size_text(size) for size in sizes)]
    about = (
        "Round trip: shorter is better. Bandwidth by message size: more is better. Medians of the ratios in each round."
    )
    section = Section("As ratios to the baseline", about, columns)
    for subject in report.links:
        baseline = report.subject(subject.baseline)
        if baseline is None or not moves_bytes(subject):
            continue
        trip = latency_ratio(subject.idle, baseline.idle)
        bandwidths = [bandwidth_ratio(subject.idle, baseline.idle, size) for size in sizes]
        if any(value is not None for value in (trip, *bandwidths)):
            _add(section, subject, [baseline.name, *(ratio_text(value) for value in (trip, *bandwidths))])
    return section


def latency_ratio(ours: Series, theirs: Series) -> float | None:
    """Of median round trips of the smallest message that both have."""
    both = sorted(ours.latency_us.keys() & theirs.latency_us.keys())
    if not both:
        return None
    pairs = zip(ours.latency_us[both[0]], theirs.latency_us[both[0]], strict=False)
    return median([first.p50 / second.p50 for first, second in pairs])


def bandwidth_ratio(ours: Series, theirs: Series, size: int) -> float | None:
    """The median of the ratios in each round."""
    pairs = zip(ours.bandwidth.get(size, ()), theirs.bandwidth.get(size, ()), strict=False)
    return median([first / second for first, second in pairs])


def _message_rates(report: Report) -> Section:
    about = f"Small messages a second; fan-in and fan-out with {_peers(report)} processes, all links together."
    return _rates(report, "Rates of messages of 100 B", about, _MESSAGE_RATES)


def _byte_rates(report: Report) -> Section:
    about = (
        "Large messages. Read: from the transport's memory, copied by the receiver; "
        f"fan-in and fan-out with {_peers(report)} processes, all links together."
    )
    return _rates(report, "Bandwidth in other ways", about, _BYTE_RATES)


def _peers(report: Report) -> object:
    return report.plan.get("idle", {}).get("peers", "several")


def _rates(report: Report, title: str, about: str, headings: dict[str, str]) -> Section:
    names = [name for name in headings if any(name in subject.idle.rates for subject in report.links)]
    section = Section(title, about, ["", *(headings[name] for name in names)])
    for subject in report.links:
        values = [(name, median(subject.idle.rates.get(name, ()))) for name in names]
        if any(value is not None for _, value in values):
            _add(section, subject, [_rate(subject, name, value) for name, value in values])
    return section


def _rate(subject: Subject, name: str, value: float | None) -> str:
    return NOTHING if name.endswith("bytes_per_s") and not moves_bytes(subject) else figure_text(name, value)


def _held(report: Report) -> Section:
    sizes = sorted({size for subject in report.links for size in subject.gil.bandwidth})
    columns = ["", "round trip", "idle round trip"]
    for size in sizes:
        columns += [size_text(size), f"idle {size_text(size)}"]
    section = Section(
        "While another thread holds the GIL",
        "The same, with a thread in both processes that computes in pure Python; beside it the idle figure. Round trips are means.",
        columns,
    )
    for subject in report.links:
        if not subject.gil or not moves_bytes(subject):
            continue
        trip = min(subject.gil.latency_us, default=0)
        cells = [time_text(subject.gil.latency_mean(trip)), time_text(subject.idle.latency_mean(trip))]
        for size in sizes:
            both = (subject.gil, subject.idle)
            cells += [bandwidth_text(median(series.bandwidth.get(size, ()))) for series in both]
        _add(section, subject, cells)
    return section


def _add(section: Section, subject: Subject, cells: list[str]) -> None:
    section.rows.append([subject.name, *cells])
    section.baselines.append(subject.kind == "baseline")


def _sizes(subjects: Iterable[Subject], all_sizes: bool) -> list[int]:
    sizes = sorted({size for subject in subjects for size in subject.idle.bandwidth})
    return sizes if all_sizes else _spread(sizes, _TERMINAL_SIZES)


def _spread(sizes: list[int], count: int) -> list[int]:
    """At most so many, evenly chosen, the last one among them."""
    if len(sizes) <= count:
        return sizes
    step: Callable[[int], int] = lambda number: round(number * (len(sizes) - 1) / (count - 1))  # noqa: E731
    return [sizes[step(number)] for number in range(count)]
