"""Groups of hosts: those of a group reach each other faster than they reach the others.

Racks with a slow way between them look like this, and so do the hosts that are well beside those that are not. Figures are
logarithms, larger is slower; there is one for each pair of hosts.

The figures are cut in two where that leaves the least spread on both sides (Otsu's method), if the sides are far apart for
their spread; one side is fast, the other slow. Hosts are clustered by what is fast: the two groups between which the largest
share of the pairs is fast become one, until between any two less than half are. A group is looked at again in the same way, so
a slow host is found beside racks and racks beside a slow host. A host that is left alone is a *loner*: it reaches nobody at
full speed. Its home is the group that it reaches fastest, if all have been tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

NOISE = 4.0
"""How many standard deviations (by the median absolute deviation, MAD) something must be off."""
LEAST_DEVIATION = 0.1
"""Of logarithms: figures of a calm network agree within 10 %, by chance even better."""
MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution."""

HostPair = tuple[str, str]
"""Either way round, each pair once."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Hosts by who reaches whom at full speed."""

    members: list[list[str]]
    """Of each group, without loners."""
    home: dict[str, int]
    """The group of each host; of loners only if they were measured with every group."""
    loners: frozenset[str]


def one_group(hosts: Iterable[str]) -> Groups:
    """All of them together."""
    members = list(dict.fromkeys(hosts))
    return Groups([members], dict.fromkeys(members, 0), frozenset())


def group_hosts(pairs: Mapping[HostPair, float], factor: float) -> Groups:
    """Groups by the figures of `pairs`; speeds that differ by less than `factor` (a logarithm) are one speed."""
    hosts = sorted({host for pair in pairs for host in pair})
    members, loners = _split(hosts, pairs, factor)
    home = {host: number for number, group in enumerate(members) for host in group}
    reached: dict[str, dict[int, list[float]]] = {host: {} for host in loners}
    for pair, log in pairs.items():
        for host, other in (pair, pair[::-1]):
            if host in reached and other in home:
                reached[host].setdefault(home[other], []).append(log)
    for host, logs in reached.items():
        if len(logs) == len(members):
            home[host] = min(logs, key=lambda group: statistics.median(logs[group]))
    return Groups(members, home, frozenset(loners))


def deviation(logs: Sequence[float], middle: float | None = None) -> float:
    """The standard deviation as far as outliers have no part in it."""
    around = statistics.median(logs) if middle is None else middle
    return max(LEAST_DEVIATION, MAD_TO_DEVIATION * statistics.median(abs(log - around) for log in logs))


def largest_fast(logs: Iterable[float], factor: float) -> float | None:
    """The slowest of the fast ones where figures fall into fast and slow ones; None when they are of one kind."""
    ordered = sorted(logs)
    best, cut, fast, total = 0.0, 0, 0.0, sum(ordered)
    for count, log in enumerate(ordered[:-1], 1):
        fast += log
        slow_count = len(ordered) - count
        apart = (total - fast) / slow_count - fast / count
        if count * slow_count * apart * apart > best:
            best, cut = count * slow_count * apart * apart, count
    if not cut or len(ordered) < 3:
        return None
    middles = [statistics.median(side) for side in (ordered[:cut], ordered[cut:])]
    spread = deviation([log - middles[number >= cut] for number, log in enumerate(ordered)], 0.0)
    return ordered[cut - 1] if middles[1] - middles[0] >= max(factor, NOISE * spread) else None


def _split(hosts: list[str], pairs: Mapping[HostPair, float], factor: float) -> tuple[list[list[str]], list[str]]:
    """Groups and loners."""
    inside = set(hosts)
    mine = {pair: log for pair, log in pairs.items() if inside.issuperset(pair)}
    logs = list(mine.values())
    while (limit := largest_fast(logs, factor)) is not None:
        clusters = _clusters(hosts, {pair: log <= limit for pair, log in mine.items()})
        if len(clusters) == 1:
            logs = [log for log in logs if log <= limit]  # some slow links, nobody's in particular: what of the others?
            continue
        loners = [cluster[0] for cluster in clusters if len(cluster) == 1]
        if 2 * len(loners) > len(hosts):
            break  # some links are faster than is usual here: that makes nobody slow
        members: list[list[str]] = []
        for cluster in clusters:
            if len(cluster) > 1:
                more, alone = _split(cluster, mine, factor)
                members += more
                loners += alone
        return members, loners
    return [hosts], []


def _clusters(hosts: Sequence[str], is_fast: Mapping[HostPair, bool]) -> list[list[str]]:
    """Agglomerative clustering by the share of fast pairs."""
    members = {host: [host] for host in hosts}
    counts: dict[str, dict[str, tuple[int, int]]] = {host: {} for host in hosts}  # fast pairs, and all
    for (first, second), quick in is_fast.items():
        counts[first][second] = counts[second][first] = (int(quick), 1)
    while True:
        # Of the same share the one with more pairs to show for it.
        ranked = (
            (fast / total, total, first, second)
            for first, others in counts.items()
            for second, (fast, total) in others.items()
            if first < second
        )
        share, _, first, second = max(ranked, default=(0.0, 0, "", ""))
        if share < 1 / 2:
            return list(members.values())
        members[first] += members.pop(second)
        for other, (fast, total) in counts.pop(second).items():
            del counts[other][second]
            if other != first:
                fast_before, total_before = counts[first].get(other, (0, 0))
                together = (fast + fast_before, total + total_before)
                counts[first][other] = counts[other][first] = together
