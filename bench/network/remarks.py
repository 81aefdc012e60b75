"""What a matrix says beside its figures: workers and pairs that failed, links and interfaces unlike the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .finding import Finding
from .pairs import Link

LISTED = 10
"""Findings of a kind that are said one by one; the rest is counted."""


def failures(
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


def remarks(workers: Sequence[str], hosts: Sequence[str], links: Sequence[Link]) -> list[Finding]:
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
