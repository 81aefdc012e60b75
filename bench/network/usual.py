"""Figures of links, and what is usual for each: that of links within the same group of hosts, or between the same two."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .groups import Groups
from .pairs import Link

FEWEST_BETWEEN = 8
"""So many links between two groups have a median of their own; of fewer, that of all links between groups is what is usual."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of a link as a logarithm of slowness: larger is slower."""

    source: int
    target: int
    log: float
    usual: float = 0.0
    """What links like it have."""
    is_reference: bool = True
    """Both of its ends belong to groups."""

    @property
    def excess(self) -> float:
        """Beside what is usual."""
        return self.log - self.usual


def figures_of(links: Iterable[Link], metric: str) -> list[Figure]:
    """Of those that have one; `metric`: "bandwidth" or "latency"."""
    found = []
    for link in links:
        value = link.bandwidth if metric == "bandwidth" else link.latency_us
        if value:
            log = -math.log(value) if metric == "bandwidth" else math.log(value)
            found.append(Figure(link.source, link.target, log))
    return found


def beside_usual(figures: list[Figure], hosts: Sequence[str], groups: Groups) -> list[Figure]:
    """The figures beside what is usual for them, without those for which there is nothing to compare with."""
    blocks: dict[tuple[int, int], list[float]] = {}
    between: list[float] = []
    for figure in figures:
        home = homes(figure, hosts, groups)
        if home is not None and not _loners(figure, hosts, groups):
            blocks.setdefault(home, []).append(figure.log)
            if home[0] != home[1]:
                between.append(figure.log)
    # Few links have no middle of their own.
    enough = {home: logs for home, logs in blocks.items() if home[0] == home[1] or len(logs) >= FEWEST_BETWEEN}
    usual = {home: statistics.median(logs) for home, logs in enough.items()}
    # Of groups that could not be measured with each other there is nothing but what is within them.
    otherwise = between or [log for logs in blocks.values() for log in logs]
    usual_otherwise = statistics.median(otherwise) if otherwise else None
    compared = []
    for figure in figures:
        home, loners = homes(figure, hosts, groups), _loners(figure, hosts, groups)
        if len(loners) > 1 or (loners and home is not None and home[0] != home[1]):
            continue
        expected = usual_otherwise if home is None else usual.get(home, usual_otherwise)
        if expected is not None:
            compared.append(replace(figure, usual=expected, is_reference=not loners))
    return compared


def _loners(figure: Figure, hosts: Sequence[str], groups: Groups) -> frozenset[str]:
    return groups.loners.intersection((hosts[figure.source], hosts[figure.target]))


def homes(figure: Figure, hosts: Sequence[str], groups: Groups) -> tuple[int, int] | None:
    """The groups of both ends; None when one of them is not known."""
    source, target = groups.home.get(hosts[figure.source]), groups.home.get(hosts[figure.target])
    return None if source is None or target is None else (source, target)
