"""The figures of a run as rows of text: the terminal and the HTML report show the same tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from .document import Report, Series, Subject, known_in_all, median
from .figures import BULK_BYTES, READ_BYTES
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
_APART = 1.5
_APART_MARK, _ONE_ROUND_MARK = "~", "*"


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
    return [_explained(section) for section in made if section.rows]


def figure(values: Sequence[float], text: Callable[[float | None], str]) -> str:
    """The median of the rounds, with a mark where they differ by more than `_APART` times, or where there is one only."""
    written = text(median(values))
    if len(values) == 1:
        return written + _ONE_ROUND_MARK
    return _APART_MARK + written if values and max(values) > _APART * min(values) else written


def _explained(section: Section) -> Section:
    """What the marks of its figures mean; none are needed where all figures are of one round."""
    figures = [cell for row in section.rows for cell in row[1:] if any(map(str.isdigit, cell))]
    said = [section.about]
    if any(cell.startswith(_APART_MARK) for cell in figures):
        said.append(f"{_APART_MARK} the rounds differ by more than {_APART:g} times.")
    single = [cell.endswith(_ONE_ROUND_MARK) for cell in figures]
    if single and all(single):
        said.append("Of one round: how far the next would be off is not known.")
        rows = [[row[0], *(cell.removesuffix(_ONE_ROUND_MARK) for cell in row[1:])] for row in section.rows]
        section = replace(section, rows=rows)
    elif any(single):
        said.append(f"{_ONE_ROUND_MARK} of one round: how far the next would be off is not known.")
    return replace(section, about=" ".join(said))


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
            quantiles = ([each.p50 for each in rounds], [each.p99 for each in rounds], [each.p999 for each in rounds])
            best = [min(each.minimum for each in rounds)] * len(rounds)
            _add(section, subject, [figure(known_in_all(values), time_text) for values in (*quantiles, best)])
    return section


def _bandwidth(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.links, all_sizes)
    columns = ["", *(size_text(size) for size in sizes)]
    about = (
        "One way, by message size; what travels does not compress. The receiver lets go of messages unread: shm has "
        'handed over memory by then, sockets have copied the bytes out. "Sent and read" counts reading everywhere.'
    )
    section = Section("Bandwidth", about, columns)
    for subject in report.links:
        cells = _bandwidths(subject.idle, sizes)
        if subject.idle.bandwidth:
            _add(section, subject, cells if moves_bytes(subject) else ["by reference"] + [""] * (len(cells) - 1))
    return section


def _data(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.data, all_sizes)
    about = "Values fetched as workers do, by size; measurements compress to about half, noise does not at all."
    section = Section("Data links", about, ["", "fetch of 1 B", *(size_text(size) for size in sizes)])
    for subject in report.data:
        trips = [each.p50 for each in subject.idle.latency_us.get(1, ())]
        _add(section, subject, [figure(trips, time_text), *_bandwidths(subject.idle, sizes)])
    return section


def _bandwidths(series: Series, sizes: Iterable[int]) -> list[str]:
    return [figure(series.bandwidth.get(size, ()), bandwidth_text) for size in sizes]


def _ratios(report: Report, all_sizes: bool) -> Section:
    sizes = _sizes(report.links, all_sizes)
    columns = ["", "baseline", "round trip", *(size_text(size) for size in sizes)]
    about = (
        "Round trip: shorter is better. Bandwidth by message size: more is better. Medians of the ratios in each round. "
        "Above 1 is possible: small messages of ours travel together, where a raw socket takes a system call for each; "
        "and shm is not charged with reading."
    )
    section = Section("As ratios to the baseline", about, columns)
    for subject in report.links:
        baseline = report.subject(subject.baseline)
        if baseline is None or not moves_bytes(subject):
            continue
        ratios = [
            latency_ratios(subject.idle, baseline.idle),
            *(bandwidth_ratios(subject.idle, baseline.idle, size) for size in sizes),
        ]
        if any(ratios):
            _add(section, subject, [baseline.name, *(figure(values, ratio_text) for values in ratios)])
    return section


def latency_ratios(ours: Series, theirs: Series) -> list[float]:
    """In each round, of median round trips of the smallest message that both have."""
    both = sorted(ours.latency_us.keys() & theirs.latency_us.keys())
    if not both:
        return []
    pairs = zip(ours.latency_us[both[0]], theirs.latency_us[both[0]], strict=False)
    return [first.p50 / second.p50 for first, second in pairs]


def bandwidth_ratios(ours: Series, theirs: Series, size: int) -> list[float]:
    """In each round."""
    pairs = zip(ours.bandwidth.get(size, ()), theirs.bandwidth.get(size, ()), strict=False)
    return [first / second for first, second in pairs]


def _message_rates(report: Report) -> Section:
    about = f"Small messages a second; fan-in and fan-out with {_peers(report)} processes, all links together."
    return _rates(report, "Rates of messages of 100 B", about, _MESSAGE_RATES)


def _byte_rates(report: Report) -> Section:
    sizes = report.plan.get("idle", {}).get("sizes") or [READ_BYTES]
    about = (
        f"Sent and read: {size_text(min(READ_BYTES, max(sizes)))} in the transport's memory, copied by the receiver, one "
        f"message at a time. The others: messages of {size_text(BULK_BYTES)}; fan-in and fan-out with {_peers(report)} "
        "processes, all links together."
    )
    return _rates(report, "Bandwidth in other ways", about, _BYTE_RATES)


def _peers(report: Report) -> object:
    return report.plan.get("idle", {}).get("peers", "several")


def _rates(report: Report, title: str, about: str, headings: dict[str, str]) -> Section:
    names = [name for name in headings if any(name in subject.idle.rates for subject in report.links)]
    section = Section(title, about, ["", *(headings[name] for name in names)])
    for subject in report.links:
        if any(name in subject.idle.rates for name in names):
            _add(section, subject, [_rate(subject, name) for name in names])
    return section


def _rate(subject: Subject, name: str) -> str:
    if name.endswith("bytes_per_s") and not moves_bytes(subject):
        return NOTHING
    return figure(subject.idle.rates.get(name, ()), partial(figure_text, name))


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
        both = (subject.gil, subject.idle)
        cells = [figure(known_in_all([each.mean for each in of.latency_us.get(trip, ())]), time_text) for of in both]
        for size in sizes:
            cells += [figure(series.bandwidth.get(size, ()), bandwidth_text) for series in both]
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
