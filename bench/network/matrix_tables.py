"""The matrix of a live cluster as tables of text, for the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .document import Matrix, Report, median
from .pairs import Link
from .tables import Section
from .wording import NOTHING, bandwidth_text, size_text, time_text

MOST_COLUMNS = 8
"""Of a matrix written out; larger ones are heat maps and rows of medians only."""


def matrix_sections(report: Report) -> list[Section]:
    """What the matrix says in figures; nothing when the run had none."""
    matrix = report.matrix
    if matrix is None or not matrix.workers:
        return []
    made = []
    if len(matrix.workers) <= MOST_COLUMNS:
        about = "Row: from; column: to."
        made.append(_square("Bandwidth between workers", about, matrix, matrix.bandwidth, bandwidth_text))
        about = "A small fetch and its answer, the median; row: from, column: to (the one that asks)."
        made.append(_square("Round trips between workers", about, matrix, matrix.latency_us, time_text))
    made += [_workers(matrix), _sums(matrix), _kinds(matrix), _hosts(matrix)]
    return [section for section in made if section.rows]


def _square(
    title: str,
    about: str,
    matrix: Matrix,
    cells: Sequence[Sequence[float | None]],
    text: Callable[[float | None], str],
) -> Section:
    section = Section(title, about, ["", *matrix.workers])
    for name, row in zip(matrix.workers, cells, strict=True):
        _add(section, [name, *(text(value) for value in row)])
    return section


def _workers(matrix: Matrix) -> Section:
    about = "Medians of the links of each worker; slowest: its link with the least bandwidth."
    section = Section("Workers", about, ["", "host", "sends", "receives", "round trip", "99 % within", "slowest"])
    for number, name in enumerate(matrix.workers):
        sent = [link for link in matrix.links if link.source == number]
        received = [link for link in matrix.links if link.target == number]
        both = [*sent, *received]
        slowest = min((link for link in both if link.bandwidth), key=lambda link: link.bandwidth or 0.0, default=None)
        cells = [
            name,
            matrix.hosts[number],
            bandwidth_text(_middle(sent, lambda link: link.bandwidth)),
            bandwidth_text(_middle(received, lambda link: link.bandwidth)),
            time_text(_middle(both, lambda link: link.latency_us)),
            time_text(_middle(both, lambda link: link.latency_p99_us)),
            _slowest(matrix, number, slowest),
        ]
        _add(section, cells)
    return section


def _slowest(matrix: Matrix, number: int, link: Link | None) -> str:
    if link is None:
        return NOTHING
    other = f"to {matrix.workers[link.target]}" if link.source == number else f"from {matrix.workers[link.source]}"
    return f"{bandwidth_text(link.bandwidth)} {other}"


def _sums(matrix: Matrix) -> Section:
    """When all pairs ran at the same time: what each host sent and received."""
    sizes = ", ".join(size_text(size) for size in matrix.facts.get("sizes", ()))
    about = f"All pairs at the same time, with values of {sizes}: sums of the links of each host."
    section = Section("Hosts under load", about, ["", "sends", "receives", "within the host"])
    if not matrix.facts.get("together"):
        return section
    for host in dict.fromkeys(matrix.hosts):
        sums = {"sends": 0.0, "receives": 0.0, "within": 0.0}
        for link in matrix.links:
            source, target = matrix.hosts[link.source], matrix.hosts[link.target]
            if host in (source, target):
                way = "within" if source == target else "sends" if source == host else "receives"
                sums[way] += link.bandwidth or 0.0
        _add(section, [host, *(bandwidth_text(value or None) for value in sums.values())])
    return section


def _kinds(matrix: Matrix) -> Section:
    about = "How the workers reach each other, as they have chosen themselves; medians of the pairs."
    columns = ["", "encrypted", "compressed", "pairs", "bandwidth", "round trip", "first fetch"]
    section = Section("Kinds of links", about, columns)
    kinds: dict[tuple[str, bool, bool], list[Link]] = {}
    for link in matrix.links:
        if link.transport:
            inside = matrix.hosts[link.source] == matrix.hosts[link.target]
            kinds.setdefault((link.transport, inside, link.encrypted), []).append(link)
    for (transport, inside, encrypted), links in sorted(kinds.items()):
        first_ms = _middle(links, lambda link: link.first_ms)
        cells = [
            f"{transport}, {'within' if inside else 'between'} hosts",
            "yes" if encrypted else "no",
            "yes" if any(link.compressed for link in links) else "no",
            str(len(links)),
            bandwidth_text(_middle(links, lambda link: link.bandwidth)),
            time_text(_middle(links, lambda link: link.latency_us)),
            time_text(None if first_ms is None else first_ms * 1e3),
        ]
        _add(section, cells)
    return section


def _hosts(matrix: Matrix) -> Section:
    about = "The interface is the one that has the worker's address; its speed is what its driver says."
    section = Section("Hosts", about, ["", "workers", "processors", "interface", "MTU", "speed"])
    for host, facts in matrix.facts.get("hosts", {}).items():
        speed = facts.get("mbit_per_s") or 0
        cells = [
            host,
            str(matrix.hosts.count(host)),
            str(facts.get("processors") or NOTHING),
            str(facts.get("interface") or NOTHING),
            str(facts.get("mtu") or NOTHING),
            f"{speed / 1000:g} Gbit/s" if speed else NOTHING,
        ]
        _add(section, cells)
    return section


def _middle(links: Sequence[Link], value: Callable[[Link], float | None]) -> float | None:
    return median([found for link in links if (found := value(link)) is not None])


def _add(section: Section, cells: list[str]) -> None:
    section.rows.append(cells)
    section.baselines.append(False)
