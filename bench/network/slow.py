"""Which hosts, workers and links of a matrix are slow, said in a sentence each.

Theory of operation
-------------------
Figures are compared as logarithms: half and twice the bandwidth are equally far off. There is no table of what a network
should give; links are compared with other links of the same matrix, those inside of hosts and those between hosts apart.

*A host* (or, where hosts have several workers, a worker) is suspected when the median of its links is slower by `FACTORS`,
and clearly beyond the noise, than the median of the links that it has no part in. Leaving its own links out of the
comparison is what makes this work in small clusters: with four hosts, half of all links are those of a slow one. The worst
suspect is named if most of its links are slow, its links are left out of everything that follows, and the others are looked
at again. Sending and receiving are looked at apart: a host may be slow in one direction only.

*A link* is named when it is slow and neither of its ends has been. With two workers there is nothing to compare with but
the way back.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .pairs import Link
from .wording import bandwidth_text, time_text

FACTORS = {"bandwidth": 1.5, "latency": 2.0}
"""What is slower by less is not named: 1.5 is more than processors and placement explain, and the way through one more
switch may double a latency of 2 us, never one of 100."""
NOISE = 4.0
"""How many standard deviations (by the median absolute deviation, MAD) it must be off too."""
LEAST_DEVIATION = 0.1
"""Of logarithms: figures of a calm network agree within 10 %, by chance even better."""
MOST = 2 / 3
"""Of a host's links must be slow for the host to be named."""
MANY = 32
"""With more hosts than this, one host's links do not shift the median of all, and leaving them out costs time."""
LISTED = 10
"""Links named one by one; the rest is counted."""
MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution."""


class Finding(msgspec.Struct, kw_only=True):
    """One thing that was found."""

    kind: str
    """"host", "worker", "link", "asymmetry", "failed" or "note"."""
    names: list[str]
    """The host, the worker, or source and target of the link."""
    metric: str = ""
    """"bandwidth" or "latency"."""
    direction: str = ""
    """"sending", "receiving" or "both", of hosts and workers."""
    factor: float = 0.0
    """How many times slower."""
    pair: tuple[int, int] | None = None
    """Of a link: the indices of source and target."""
    text: str


@dataclass(frozen=True, slots=True)
class _Figure:
    """One metric of a link as a logarithm of slowness: larger is slower."""

    source: int
    target: int
    log: float


@dataclass(frozen=True, slots=True)
class _Suspect:
    name: str
    direction: str
    excess: float
    """Logarithm of the factor."""
    mine: float
    others: float


def judge(
    workers: Sequence[str], hosts: Sequence[str], links: Sequence[Link], gone: Mapping[int, str] | None = None
) -> list[Finding]:
    """What the figures say, the worst first: failures, hosts, workers, links, asymmetries, remarks.

    `gone`: workers that were given up in the middle, and why.
    """
    findings = _failures(workers, hosts, links, gone or {})
    slow: list[Finding] = []
    odd: list[Finding] = []
    for inside in (False, True):
        chosen = [each for each in links if (hosts[each.source] == hosts[each.target]) == inside]
        for metric in FACTORS:
            more, asymmetric = _Judge(workers, hosts, metric, inside).findings(chosen)
            slow += more
            odd += asymmetric
    order = ("host", "worker", "link")
    slow.sort(key=lambda finding: (order.index(finding.kind), -finding.factor))
    return [*findings, *slow, *odd, *_remarks(workers, hosts, links)]


class _Judge:
    """Of one metric, among links inside of hosts or between them."""

    def __init__(self, workers: Sequence[str], hosts: Sequence[str], metric: str, inside: bool) -> None:
        self._workers = workers
        self._hosts = hosts
        self._metric = metric
        self._factor = math.log(FACTORS[metric])
        self._inside = inside

    def findings(self, links: Iterable[Link]) -> tuple[list[Finding], list[Finding]]:
        """Slow hosts, workers and links; asymmetries of what has not been named."""
        figures = [figure for link in links if (figure := self._figure(link)) is not None]
        found: list[Finding] = []
        if not self._inside:
            more, figures = self._name_ends("host", lambda worker: self._hosts[worker], figures)
            found += more
        if self._inside or len(set(self._hosts)) < len(self._hosts):
            more, figures = self._name_ends("worker", lambda worker: self._workers[worker], figures)
            found += more
        slow = self._slow_links(figures)
        found += self._links_text(slow, figures)
        named = {(figure.source, figure.target) for figure in slow}
        return found, self._asymmetries(figures, named)

    def _figure(self, link: Link) -> _Figure | None:
        value = link.bandwidth if self._metric == "bandwidth" else link.latency_us
        if not value:
            return None
        return _Figure(link.source, link.target, -math.log(value) if self._metric == "bandwidth" else math.log(value))

    # Hosts and workers

    def _name_ends(
        self, kind: str, name_of: Callable[[int], str], figures: list[_Figure]
    ) -> tuple[list[Finding], list[_Figure]]:
        """Names the slow ones, the worst first; what is left is the links that none of them has a part in."""
        found: list[Finding] = []
        while True:
            suspects = self._suspects(name_of, figures)
            worst = max(suspects, key=lambda suspect: suspect.excess, default=None)
            if worst is None:
                return found, figures
            found.append(self._end_text(kind, worst))
            figures = [
                figure
                for figure in figures
                if not (
                    (worst.direction != "receiving" and name_of(figure.source) == worst.name)
                    or (worst.direction != "sending" and name_of(figure.target) == worst.name)
                )
            ]

    def _suspects(self, name_of: Callable[[int], str], figures: list[_Figure]) -> list[_Suspect]:
        sends: dict[str, list[float]] = {}
        receives: dict[str, list[float]] = {}
        ends = [(name_of(figure.source), name_of(figure.target), figure.log) for figure in figures]
        for source, target, log in ends:
            if source != target:
                sends.setdefault(source, []).append(log)
                receives.setdefault(target, []).append(log)
        names = sorted({name for source, target, _ in ends for name in (source, target)})
        if len(names) < 3:
            return []  # nobody to compare with
        everyone = _Reference(self, [log for _, _, log in ends]) if len(names) > MANY else None
        found = []
        for name in names:
            reference = everyone or _Reference(
                self, [log for source, target, log in ends if name not in (source, target)]
            )
            suspect = _suspect(name, sends.get(name, []), receives.get(name, []), reference)
            if suspect is not None:
                found.append(suspect)
        return found

    def margin(self, logs: list[float]) -> float:
        """How much slower than their median is slow."""
        middle = statistics.median(logs)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(log - middle) for log in logs)
        return max(self._factor, NOISE * max(deviation, LEAST_DEVIATION))

    def _end_text(self, kind: str, suspect: _Suspect) -> Finding:
        factor = math.exp(suspect.excess)
        what = {"sending": "what it sends", "receiving": "what it receives", "both": "what it sends and receives"}
        way = what[suspect.direction] + (" within the host" if self._inside else "")
        text = (
            f"{kind} {suspect.name}{self._more(kind, suspect.name)} is slow: {self._metric} {self._text(suspect.mine)} in {way}, "
            f"{self._text(suspect.others)} between the others ({_times(factor)} slower)"
        )
        return Finding(
            kind=kind,
            names=[suspect.name],
            metric=self._metric,
            direction=suspect.direction,
            factor=factor,
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

    def _slow_links(self, figures: list[_Figure]) -> list[_Figure]:
        if len({frozenset((figure.source, figure.target)) for figure in figures}) < 3:
            return []  # which of two would be the slow one?
        logs = [figure.log for figure in figures]
        limit = statistics.median(logs) + self.margin(logs)
        return sorted((figure for figure in figures if figure.log > limit), key=lambda figure: -figure.log)

    def _links_text(self, slow: list[_Figure], figures: list[_Figure]) -> list[Finding]:
        if not slow:
            return []
        middle = statistics.median(figure.log for figure in figures)
        by_pair = {(figure.source, figure.target): figure for figure in slow}
        found: list[Finding] = []
        for figure in slow:
            if by_pair.pop((figure.source, figure.target), None) is None:
                continue  # named with its way back
            back = by_pair.pop((figure.target, figure.source), None)
            ends = [self._workers[figure.source], self._workers[figure.target]]
            ways = f"between {ends[0]} and {ends[1]}" if back else f"from {ends[0]} to {ends[1]}"
            factor = math.exp(figure.log - middle)
            text = (
                f"the link {ways} is slow: {self._metric} {self._text(figure.log)}"
                + (f" and {self._text(back.log)}" if back else "")
                + f", {self._text(middle)} in the middle of all ({_times(factor)} slower)"
            )
            pair = (figure.source, figure.target)
            found.append(Finding(kind="link", names=ends, metric=self._metric, factor=factor, pair=pair, text=text))
        if len(found) > LISTED:
            rest = len(found) - LISTED
            text = f"{rest} more links are slow ({self._metric}); the JSON has all figures"
            last = Finding(kind="link", names=[], metric=self._metric, factor=found[LISTED].factor, text=text)
            found[LISTED:] = [last]
        return found

    def _asymmetries(self, figures: list[_Figure], named: set[tuple[int, int]]) -> list[Finding]:
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

    def __init__(self, judging: _Judge, logs: list[float]) -> None:
        self.middle = statistics.median(logs) if logs else math.inf
        self.limit = self.middle + judging.margin(logs) if logs else math.inf

    def slower(self, mine: list[float]) -> bool:
        """Whether these links are slow: their median, and most of them."""
        if not mine:
            return False
        return statistics.median(mine) > self.limit and sum(log > self.limit for log in mine) >= MOST * len(mine)


def _suspect(name: str, sends: list[float], receives: list[float], others: _Reference) -> _Suspect | None:
    slow_sends, slow_receives = others.slower(sends), others.slower(receives)
    # One that is mute in one direction is judged by the other.
    if (slow_sends or not sends) and (slow_receives or not receives):
        direction, mine = "both", sends + receives
    elif slow_sends:
        direction, mine = "sending", sends
    elif slow_receives:
        direction, mine = "receiving", receives
    else:
        return None
    if not mine:
        return None
    middle = statistics.median(mine)
    return _Suspect(name, direction, middle - others.middle, middle, others.middle)


def _failures(
    workers: Sequence[str], hosts: Sequence[str], links: Sequence[Link], gone: Mapping[int, str]
) -> list[Finding]:
    """Workers with which nothing worked, then pairs that failed."""
    failed = [link for link in links if link.error]
    tried: dict[int, list[Link]] = {}
    for link in links:
        for end in (link.source, link.target):
            tried.setdefault(end, []).append(link)
    dead = {worker: mine[0].error for worker, mine in tried.items() if all(link.error for link in mine)}
    if len(dead) == len(tried):
        dead = {}  # of two that only ever met each other, neither is to blame for sure
    dead = dict(sorted({**dead, **gone}.items()))
    found: list[Finding] = []
    for worker, why in dead.items():
        at_host = f" on {hosts[worker]}" if hosts[worker] != workers[worker] else ""
        text = f"worker {workers[worker]}{at_host} could not be measured: {why}"
        found.append(Finding(kind="failed", names=[workers[worker]], text=text))
    left = [link for link in failed if not {link.source, link.target} & dead.keys()]
    for link in left[:LISTED]:
        names = [workers[link.source], workers[link.target]]
        text = f"from {names[0]} to {names[1]} failed: {link.error}"
        found.append(Finding(kind="failed", names=names, text=text))
    if len(left) > LISTED:
        found.append(Finding(kind="failed", names=[], text=f"{len(left) - LISTED} more pairs failed"))
    return found


def _remarks(workers: Sequence[str], hosts: Sequence[str], links: Sequence[Link]) -> list[Finding]:
    """Links between hosts that are not made as the others."""
    crossing = [link for link in links if link.transport and hosts[link.source] != hosts[link.target]]
    kinds: dict[tuple[str, bool], list[Link]] = {}
    for link in crossing:
        kinds.setdefault((link.transport, link.encrypted), []).append(link)
    if len(kinds) < 2:
        return []
    counts = sorted(kinds.items(), key=lambda item: -len(item[1]))
    said = []
    for (transport, encrypted), mine in counts:
        name = transport + (", encrypted" if encrypted else "")
        example = (
            f" (as from {workers[mine[0].source]} to {workers[mine[0].target]})" if mine is not counts[0][1] else ""
        )
        said.append(f"{len(mine)} x {name}{example}")
    text = f"links between hosts are not all of one kind, so compare with care: {'; '.join(said)}"
    return [Finding(kind="note", names=[], text=text)]


def compare_hosts(hosts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Remarks on hosts whose interface is not as those of most others: another MTU, another speed."""
    found: list[Finding] = []
    for name, what in (("mtu", "an MTU of {}"), ("mbit_per_s", "a speed of {} Mbit/s")):
        values = Counter(facts[name] for facts in hosts.values() if facts.get(name))
        if len(values) < 2:
            continue
        usual, _ = values.most_common(1)[0]
        for host, facts in hosts.items():
            if facts.get(name) and facts[name] != usual:
                text = (
                    f"interface {facts.get('interface')} of host {host} has {what.format(facts[name])}, "
                    f"those of most hosts {what.format(usual)}: is it the right interface (--interface)?"
                )
                found.append(Finding(kind="note", names=[host], text=text))
    return found[:LISTED]


def _times(factor: float) -> str:
    return f"{factor:.3g} x"
