"""What became of the links between workers from one matrix to the next: all of them, and whose changed unlike the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .document import Matrix
from .finding import Finding
from .pairs import Link
from .processes import MeasuringError
from .slow import judge
from .wording import ratio_text, size_text

LISTED = 10
"""Hosts, workers and links that are named; the rest is counted."""


class _Place(NamedTuple):
    """An end of a link that is found again in another run."""

    name: str
    host: str


def check_comparable(first: Matrix, second: Matrix) -> None:
    """Raises MeasuringError when one is of a loaded network and the other is not."""
    loaded = [bool(matrix.facts.get("together")) for matrix in (first, second)]
    if loaded[0] != loaded[1]:
        which = "first" if loaded[0] else "second"
        raise MeasuringError(
            f"only the {which} run had all pairs at the same time (--parallel): a loaded network beside an idle one "
            "says nothing of either; measure both in the same way"
        )


def compare_matrices(first: Matrix, second: Matrix) -> Iterator[str]:
    """Sentences about the links that both have, by the names of their workers, or by host where workers have none."""
    by_host = any("://" in worker for matrix in (first, second) for worker in matrix.workers)
    if by_host:
        yield "Workers without names are told apart by their hosts only: medians of the links between two hosts are compared."
    sizes = _common_sizes(first, second)
    if sizes is not None and not sizes:
        yield "No size of values is in both runs, so bandwidth between workers is not compared."
    elif sizes and any(set(matrix.facts.get("sizes", sizes)) != sizes for matrix in (first, second)):
        yield f"Bandwidth between workers is compared at {', '.join(map(size_text, sorted(sizes)))}, which both runs have."
    compared = False
    for metric in ("bandwidth", "round trip"):
        ours, theirs = (_cells(matrix, metric, by_host, sizes) for matrix in (first, second))
        ratios = {pair: theirs[pair] / ours[pair] for pair in ours.keys() & theirs.keys()}
        if ratios:
            compared = True
            yield from _sentences(metric, dict(sorted(ratios.items())))
    if not compared:
        yield "The runs have no links between workers in common."


def _common_sizes(first: Matrix, second: Matrix) -> set[int] | None:
    """Of values; None when a run does not say which it had."""
    had = [{size for link in matrix.links for size in link.by_size} for matrix in (first, second)]
    return had[0] & had[1] if all(had) else None


def _cells(matrix: Matrix, metric: str, by_host: bool, sizes: set[int] | None) -> dict[tuple[_Place, _Place], float]:
    places = [
        _Place(host if by_host else worker, host) for worker, host in zip(matrix.workers, matrix.hosts, strict=True)
    ]
    values: dict[tuple[_Place, _Place], list[float]] = {}
    if metric == "bandwidth" and sizes is not None:
        for link in matrix.links:
            if common := [value for size, value in link.by_size.items() if size in sizes and value]:
                values.setdefault((places[link.source], places[link.target]), []).append(max(common))
    else:
        for row, cells in enumerate(matrix.bandwidth if metric == "bandwidth" else matrix.latency_us):
            for column, cell in enumerate(cells):
                if cell:
                    values.setdefault((places[row], places[column]), []).append(cell)
    return {pair: statistics.median(each) for pair, each in values.items()}


def _sentences(metric: str, ratios: Mapping[tuple[_Place, _Place], float]) -> Iterator[str]:
    ordered = sorted(ratios.items(), key=lambda item: item[1])
    (low, least), (high, most) = ordered[0], ordered[-1]
    yield (
        f"{metric} of {len(ratios)} links between workers, second run to first: "
        f"median {ratio_text(statistics.median(ratios.values()))}, from {ratio_text(least)} ({_way(low)}) "
        f"to {ratio_text(most)} ({_way(high)})"
    )
    for word in ("slower", "faster"):
        found = [each for each in _judged(metric, ratios, word) if each.names]
        for each in found[:LISTED]:
            who = " → ".join(each.names) if each.kind == "link" else each.names[0]
            ways = {"sending": ", in what it sends", "receiving": ", in what it receives"}.get(each.direction, "")
            yield f"  {each.kind} {who}{ways}: {metric} became {each.factor:.3g} x {word} than that of the other links"
        if len(found) > LISTED:
            yield f"  and {len(found) - LISTED} more"


def _way(pair: tuple[_Place, _Place]) -> str:
    return f"{pair[0].name} → {pair[1].name}"


def _judged(metric: str, ratios: Mapping[tuple[_Place, _Place], float], word: str) -> list[Finding]:
    """Whose links became slower, or faster, unlike the others: ratios are judged as figures of a matrix are."""
    places = list(dict.fromkeys(place for pair in ratios for place in pair))
    numbers = {place: number for number, place in enumerate(places)}
    links = []
    for (source, target), ratio in ratios.items():
        slowness = ratio if metric == "round trip" else 1 / ratio
        # What changed the other way is as good as unchanged: beside links that became slower, nobody became faster.
        change = max(1.0, slowness if word == "slower" else 1 / slowness)
        link = Link(source=numbers[source], target=numbers[target])
        if metric == "bandwidth":
            link.bandwidth = 1 / change
        else:
            link.latency_us = change
        links.append(link)
    found = judge([place.name for place in places], [place.host for place in places], links)
    return [finding for finding in found if finding.kind in ("host", "worker", "link")]
