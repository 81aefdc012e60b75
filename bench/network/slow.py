"""Which hosts, workers and links of a matrix are slow, said in a sentence each.

Theory of operation
-------------------
Figures are compared as logarithms: half and twice the bandwidth are equally far off. There is no table of what a network
should give; links are compared with other links of the same matrix, those inside of hosts and those between hosts apart.

*Groups of hosts* that reach each other faster than the rest come first (`groups.py`): with racks, a link is slow beside links
between the same two racks, or within the same one. The median of those is what is *usual* for it. A host that reaches nobody at
full speed belongs to no group: its links to the group that it reaches best are compared with those within that group, its other
links with nothing. If pairs are a sample, and it was not measured with hosts of every group, its own group may be one of the
missing ones: then its links are compared with those between groups.

*A host* (or, where hosts have several workers, a worker) is suspected when the median of its links, each beside what is usual for
it, is slower by `FACTORS`, and clearly beyond the noise, than that of links that it has no part in; by `SURELY_HOST` it is slow
however noisy the others are. Leaving its own links out of the comparison is what makes this work in small clusters: with four
hosts, half of all links are those of a slow one. The worst suspect is named if most of its links are slow, its links are left out
of everything that follows, and the others are looked at again. Sending and receiving are looked at apart: a host may be slow in
one direction only.

*A link* is named when it is slow and neither of its ends has been. With two workers there is nothing to compare with but
the way back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .finding import Finding
from .groups import LEAST_DEVIATION, NOISE, Groups, HostPair, deviation, group_hosts, one_group
from .pairs import Link
from .remarks import LISTED, failures, remarks
from .usual import Figure, beside_usual, figures_of, homes
from .wording import bandwidth_text, time_text

__all__ = ["Finding", "judge"]

FACTORS = {"bandwidth": 1.5, "latency": 2.0}
"""What is slower by less is not named: 1.5 is more than processors and placement explain, and the way through one more
switch may double a latency of 2 us, never one of 100."""
SURELY_HOST = 3.0
"""A host that is slower by so much is slow, however noisy the others are: that is what most of its links say."""
SURELY_LINK = 10.0
"""The same of a single link, which may have been measured at a bad moment."""
MOST = 2 / 3
"""Of a host's links must be slow for the host to be named."""
MANY = 32
"""With more hosts than this, one host's links do not shift the median of all, and leaving them out costs time."""
WIDE = 3.0
"""Where the fastest and the slowest tenth of the links are so far apart, nothing found is not all well."""
GROUP_NAMES = 8
"""Hosts of a group that are listed; the rest is counted."""
GROUPS_LISTED = 6
"""Groups, likewise."""


@dataclass(frozen=True, slots=True)
class _Suspect:
    name: str
    direction: str
    excess: float
    """Logarithm of the factor."""
    mine: float


def judge(
    workers: Sequence[str], hosts: Sequence[str], links: Sequence[Link], gone: Mapping[int, str] | None = None
) -> list[Finding]:
    """What the figures say: failures, groups of hosts, then hosts, workers and links, the worst first, asymmetries, remarks.

    `gone`: workers that were given up in the middle, and why.
    """
    findings = failures(workers, hosts, links, gone or {})
    slow: list[Finding] = []
    odd: list[Finding] = []
    wide: list[Finding] = []
    for inside in (False, True):
        chosen = [each for each in links if (hosts[each.source] == hosts[each.target]) == inside]
        for metric in FACTORS:
            judging = _Judge(workers, hosts, metric, inside)
            more, asymmetric = judging.findings(chosen)
            slow += more
            odd += asymmetric
            if not more:
                wide += judging.spread(chosen)
    order = ("groups", "host", "worker", "link")
    slow.sort(key=lambda finding: (order.index(finding.kind), -finding.factor))
    return [*findings, *slow, *odd, *wide, *remarks(workers, hosts, links)]


class _Judge:
    """Of one metric, among links inside of hosts or between them."""

    def __init__(self, workers: Sequence[str], hosts: Sequence[str], metric: str, inside: bool) -> None:
        self._workers = workers
        self._hosts = hosts
        self._metric = metric
        self._factor = math.log(FACTORS[metric])
        self._inside = inside
        self._are_grouped = False

    def findings(self, links: Iterable[Link]) -> tuple[list[Finding], list[Finding]]:
        """Groups, slow hosts, workers and links; asymmetries of what has not been named."""
        all_figures = figures_of(links, self._metric)
        groups = self._groups(all_figures)
        self._are_grouped = len(groups.members) > 1
        found = self._groups_text(groups, all_figures) if self._are_grouped else []
        figures = beside_usual(all_figures, self._hosts, groups)
        if not self._inside:
            more, figures = self._name_ends("host", lambda worker: self._hosts[worker], figures)
            found += more
        if self._inside or len(set(self._hosts)) < len(self._hosts):
            more, figures = self._name_ends("worker", lambda worker: self._workers[worker], figures)
            found += more
        slow = self._slow_links(figures)
        found += self._links_text(slow)
        named = {(figure.source, figure.target) for figure in slow}
        return found, self._asymmetries(figures, named)

    # Groups

    def _groups(self, figures: list[Figure]) -> Groups:
        if self._inside:
            return one_group(self._hosts)
        # Of two hosts the best of all links, either way: one bad cable or direction does not part them.
        pairs: dict[HostPair, float] = {}
        for figure in figures:
            first, second = sorted((self._hosts[figure.source], self._hosts[figure.target]))
            pairs[first, second] = min(figure.log, pairs.get((first, second), math.inf))
        return group_hosts(pairs, self._factor)

    def _groups_text(self, groups: Groups, figures: list[Figure]) -> list[Finding]:
        within: list[float] = []
        between: list[float] = []
        met: set[frozenset[int]] = set()
        for figure in figures:
            home = homes(figure, self._hosts, groups)
            if home is not None and groups.loners.isdisjoint((self._hosts[figure.source], self._hosts[figure.target])):
                (within if home[0] == home[1] else between).append(figure.log)
                met.add(frozenset(home))
        if not between:
            return []  # no pair of them could be measured: that they are apart is no finding of speed
        fast, slow = statistics.median(within), statistics.median(between)
        known = list(dict.fromkeys(self._hosts))
        members = [sorted(group, key=known.index) for group in groups.members]
        members.sort(key=lambda group: known.index(group[0]))
        listed = "; ".join(_listed(group) for group in members[:GROUPS_LISTED])
        if len(members) > GROUPS_LISTED:
            listed += f"; and {len(members) - GROUPS_LISTED} more"
        if len(met) < len(members) * (len(members) + 1) // 2:
            listed += " (a sample of the pairs: some groups may be one; --pairs takes more)"
        factor = math.exp(slow - fast)
        text = (
            f"hosts fall into {len(members)} groups: {self._metric} {self._text(slow)} from one to another, "
            f"{self._text(fast)} within ({_times(factor)} slower): racks, a slow way between switches, a wrong route? {listed}"
        )
        return [Finding(kind="groups", names=[], metric=self._metric, factor=factor, text=text, groups=members)]

    def spread(self, links: Iterable[Link]) -> list[Finding]:
        """What is said where nothing was found, and yet links are not alike."""
        logs = sorted(figure.log for figure in figures_of(links, self._metric))
        tenth = len(logs) // 10
        if not tenth or logs[-tenth] - logs[tenth - 1] < math.log(WIDE):
            return []
        where = "within hosts" if self._inside else "between hosts"
        text = (
            f"no host and no link stands out, but links {where} are of several kinds: {self._metric} "
            f"{self._text(logs[tenth - 1])} or better on a tenth of them, {self._text(logs[-tenth])} or worse on another"
        )
        return [Finding(kind="note", names=[], metric=self._metric, text=text)]

    # Hosts and workers

    def _name_ends(
        self, kind: str, name_of: Callable[[int], str], figures: list[Figure]
    ) -> tuple[list[Finding], list[Figure]]:
        """Names the slow ones, the worst first; what is left is the links that none of them has a part in."""
        named: dict[str, list[_Suspect]] = {}
        while True:
            suspects = self._suspects(name_of, figures, named)
            worst = max(suspects, key=lambda suspect: suspect.excess, default=None)
            if worst is None:
                return [self._end_text(kind, each) for each in named.values()], figures
            named.setdefault(worst.name, []).append(worst)
            figures = [
                figure
                for figure in figures
                if not (
                    (worst.direction != "receiving" and name_of(figure.source) == worst.name)
                    or (worst.direction != "sending" and name_of(figure.target) == worst.name)
                )
            ]

    def _suspects(
        self, name_of: Callable[[int], str], figures: list[Figure], named: Mapping[str, list[_Suspect]]
    ) -> list[_Suspect]:
        sends: dict[str, list[Figure]] = {}
        receives: dict[str, list[Figure]] = {}
        ends = [(name_of(figure.source), name_of(figure.target), figure) for figure in figures]
        for source, target, figure in ends:
            if source != target:
                sends.setdefault(source, []).append(figure)
                receives.setdefault(target, []).append(figure)
        names = sorted({name for source, target, _ in ends for name in (source, target)})
        if len(names) < 3:
            return []  # nobody to compare with
        well = [each for each in ends if each[2].is_reference]
        everyone = _Reference(self, [figure for *_, figure in well]) if len(names) > MANY else None
        found = []
        for name in names:
            reference = everyone or _Reference(self, [each for *both, each in well if name not in both])
            suspect = _suspect(name, sends.get(name, []), receives.get(name, []), reference, name in named)
            if suspect is not None:
                found.append(suspect)
        return found

    def margin(self, excesses: list[float], surely: float) -> float:
        """How much slower than their median is slow."""
        return max(self._factor, min(math.log(surely), NOISE * deviation(excesses)))

    def _end_text(self, kind: str, suspects: list[_Suspect]) -> Finding:
        """Of one that is slow, both ways alike or each in its own measure."""
        worst = suspects[0]
        what = {"sending": "what it sends", "receiving": "what it receives", "both": "what it sends and receives"}
        inside = " within the host" if self._inside else ""
        whose = "usual on such links" if self._are_grouped else "between the others"
        parts = [
            f"{self._text(each.mine)} in {what[each.direction]}{inside}, {self._text(each.mine - each.excess)} {whose} "
            f"({_times(math.exp(each.excess))} slower)"
            for each in suspects
        ]
        text = f"{kind} {worst.name}{self._more(kind, worst.name)} is slow: {self._metric} {', and '.join(parts)}"
        return Finding(
            kind=kind,
            names=[worst.name],
            metric=self._metric,
            direction=worst.direction if len(suspects) == 1 else "both",
            factor=math.exp(worst.excess),
            text=text,
        )

    def _more(self, kind: str, name: str) -> str:
        """The workers of a host, or the host of a worker."""
        if kind == "worker":
            return (
                "" if self._inside and len(set(self._hosts)) == 1 else f" on {self._hosts[self._workers.index(name)]}"
            )
        there = [worker for worker, host in zip(self._workers, self._hosts, strict=True) if host == name]
        if there == [name]:
            return ""  # a worker that has no name of its own
        what = "worker" if len(there) == 1 else "workers"
        rest = f" and {len(there) - 3} more" if len(there) > 3 else ""
        return f" ({what} {', '.join(there[:3])}{rest})"

    # Links

    def _slow_links(self, figures: list[Figure]) -> list[Figure]:
        if len({frozenset((figure.source, figure.target)) for figure in figures}) < 3:
            return []  # which of two would be the slow one?
        excesses = [figure.excess for figure in figures]
        limit = statistics.median(excesses) + self.margin(excesses, SURELY_LINK)
        return sorted((figure for figure in figures if figure.excess > limit), key=lambda figure: -figure.excess)

    def _links_text(self, slow: list[Figure]) -> list[Finding]:
        by_pair = {(figure.source, figure.target): figure for figure in slow}
        found: list[Finding] = []
        for figure in slow:
            if by_pair.pop((figure.source, figure.target), None) is None:
                continue  # named with its way back
            back = by_pair.pop((figure.target, figure.source), None)
            ends = [self._workers[figure.source], self._workers[figure.target]]
            ways = f"between {ends[0]} and {ends[1]}" if back else f"from {ends[0]} to {ends[1]}"
            factor = math.exp(figure.excess)
            whose = "usual on such links" if self._are_grouped else "in the middle of all"
            text = (
                f"the link {ways} is slow: {self._metric} {self._text(figure.log)}"
                + (f" and {self._text(back.log)}" if back else "")
                + f", {self._text(figure.usual)} {whose} ({_times(factor)} slower)"
            )
            pair = (figure.source, figure.target)
            found.append(Finding(kind="link", names=ends, metric=self._metric, factor=factor, pair=pair, text=text))
        if len(found) > LISTED:
            rest = len(found) - LISTED
            text = f"{rest} more links are slow ({self._metric}); the JSON has all figures"
            last = Finding(kind="link", names=[], metric=self._metric, factor=found[LISTED].factor, text=text)
            found[LISTED:] = [last]
        return found

    def _asymmetries(self, figures: list[Figure], named: set[tuple[int, int]]) -> list[Finding]:
        """Links that are slower one way than the other; latency is there and back anyway."""
        if self._metric != "bandwidth":
            return []
        logs = {(figure.source, figure.target): figure.log for figure in figures}
        usual = [abs(log - back) for ends, log in logs.items() if (back := logs.get(ends[::-1])) is not None]
        # The deviation of a difference of two is larger than that of one; of two workers there is only the difference.
        noise = NOISE * statistics.median(usual) if len(usual) > 2 else 0.0
        limit = max(self._factor, NOISE * LEAST_DEVIATION, noise)
        found = []
        for (source, target), log in logs.items():
            back = logs.get((target, source))
            if back is None or log - back <= limit:
                continue
            factor = math.exp(log - back)
            text = (
                f"the link between {self._workers[source]} and {self._workers[target]} is asymmetric: "
                f"{self._text(log)} from {self._workers[source]}, {self._text(back)} back ({_times(factor)})"
            )
            if (source, target) in named:
                text += ": one direction of a cable, port or interface is at fault"
            names = [self._workers[source], self._workers[target]]
            pair = (source, target)
            found.append(
                Finding(kind="asymmetry", names=names, metric=self._metric, factor=factor, pair=pair, text=text)
            )
        return sorted(found, key=lambda finding: -finding.factor)[:LISTED]

    def _text(self, log: float) -> str:
        return bandwidth_text(math.exp(-log)) if self._metric == "bandwidth" else time_text(math.exp(log))


class _Reference:
    """Links to compare with."""

    def __init__(self, judging: _Judge, figures: list[Figure]) -> None:
        excesses = [figure.excess for figure in figures]
        self.middle = statistics.median(excesses) if excesses else math.inf
        self.limit = self.middle + judging.margin(excesses, SURELY_HOST) if excesses else math.inf

    def slower(self, mine: list[Figure]) -> bool:
        """Whether these links are slow: their median, and most of them."""
        if not mine:
            return False
        excesses = [figure.excess for figure in mine]
        return statistics.median(excesses) > self.limit and sum(
            excess > self.limit for excess in excesses
        ) >= MOST * len(mine)


def _suspect(
    name: str, sends: list[Figure], receives: list[Figure], others: _Reference, is_named: bool
) -> _Suspect | None:
    """`is_named`: for one direction, whose links are left out since then."""
    slow_sends, slow_receives = others.slower(sends), others.slower(receives)
    # One that is mute in one direction is judged by the other.
    if not is_named and (slow_sends or not sends) and (slow_receives or not receives):
        direction, mine = "both", sends + receives
    elif slow_sends:
        direction, mine = "sending", sends
    elif slow_receives:
        direction, mine = "receiving", receives
    else:
        return None
    if not mine:
        return None
    excess = statistics.median(figure.excess for figure in mine) - others.middle
    return _Suspect(name, direction, excess, statistics.median(figure.log for figure in mine))


def _listed(hosts: list[str]) -> str:
    rest = f" and {len(hosts) - GROUP_NAMES} more" if len(hosts) > GROUP_NAMES else ""
    return ", ".join(hosts[:GROUP_NAMES]) + rest


def _times(factor: float) -> str:
    return f"{factor:.3g} x"
