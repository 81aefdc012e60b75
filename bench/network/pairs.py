"""Which pairs of workers of a live cluster are measured, and which of them at the same time."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

MOST_WORKERS = 256
"""Of larger clusters so many are taken, evenly from all hosts (one of each at least): a matrix grows as their square."""
DEFAULT_PAIRS = 1000
"""Ordered pairs measured when nobody says how many; at about a second each, and half as many at a time as there are hosts."""

Pair = tuple[int, int]
"""Indices of two workers: the bytes go from the first to the second."""


class Link(msgspec.Struct, kw_only=True):
    """What was found about an ordered pair of workers (indices into the matrix's `workers`)."""

    source: int
    target: int
    latency_us: float | None = None
    """Median time of a small fetch over the open link, there and back."""
    latency_p99_us: float | None = None
    bandwidth: float | None = None
    """Bytes/s, the best of `by_size`."""
    by_size: dict[int, float] = {}
    first_ms: float | None = None
    """Connecting, shaking hands and the first small fetch; None: there was a link already."""
    transport: str = ""
    same_host: bool = False
    """The link cannot leave the host."""
    encrypted: bool = False
    compressed: bool = False
    """The values came compressed, though they do not shrink: compression is forced."""
    error: str = ""
    """Why figures are missing."""


def choose_workers(hosts: Sequence[str], most: int = MOST_WORKERS) -> list[int]:
    """Indices of the workers to measure, ascending: all of them, or about `most`, one of each host at least."""
    by_host: dict[str, list[int]] = {}
    for index, host in enumerate(hosts):
        by_host.setdefault(host, []).append(index)
    if len(hosts) <= most:
        return list(range(len(hosts)))
    chosen: list[int] = []
    for layer in itertools.zip_longest(*by_host.values()):
        there = [index for index in layer if index is not None]
        if chosen and len(chosen) + len(there) > most:
            break
        chosen += there
    return sorted(chosen)


def choose_pairs(workers: int, count: int | None = None, seed: int = 0) -> list[Pair]:
    """Ordered pairs, each next to its reverse: all of them, or about `count`.

    A sample has every worker in it, each about as often as any other: it is made of rings through all of them (in random
    order), and a ring has each worker twice. Neighbours of neighbours are rarely neighbours in it, so that groups of workers
    hang together. It is never smaller than one pair for each worker.
    """
    total = workers * (workers - 1)
    wanted = min(total, DEFAULT_PAIRS if count is None else count)
    both_ways = max((wanted + 1) // 2, (workers + 1) // 2) if workers > 1 else 0
    numbers = list(range(workers))
    steps = list(range(1, workers // 2 + 1))
    if wanted < total:
        chance = random.Random(seed)
        chance.shuffle(numbers)
        steps[1:] = chance.sample(steps[1:], len(steps[1:]))  # the first ring has every worker in one piece
    found: dict[Pair, None] = {}
    for first, second in itertools.islice(_rings(workers, steps), both_ways):
        found[numbers[first], numbers[second]] = None
        found[numbers[second], numbers[first]] = None
    return list(found)


def _rings(workers: int, steps: Iterable[int]) -> Iterator[Pair]:
    """Unordered pairs, ring after ring; a step of 2 makes the ring of every second. Of each ring first what is disjoint."""
    for step in steps:
        starts = range(workers // 2) if 2 * step == workers else range(workers)
        used: set[int] = set()
        later: list[Pair] = []
        for start in starts:
            pair = (start, (start + step) % workers)
            if used.isdisjoint(pair):
                used.update(pair)
                yield pair
            else:
                later.append(pair)
        # A worker that is left over comes next, for whoever takes no more.
        later.sort(key=lambda pair: used.issuperset(pair))
        yield from later


def next_free(pending: Collection[Pair], hosts: Sequence[str], busy: Collection[str], bad: Counter[int]) -> Pair | None:
    """The pair to start now: its hosts are in no other one; those whose workers have failed before come last."""
    free = (pair for pair in pending if hosts[pair[0]] not in busy and hosts[pair[1]] not in busy)
    if not bad:
        return next(free, None)
    return min(free, key=lambda pair: bad[pair[0]] + bad[pair[1]], default=None)


def unique_labels(names: Iterable[str], addresses: Sequence[str]) -> list[str]:
    """The workers' names, or their addresses where names are missing or not unique."""
    given = list(names)
    counts = Counter(given)
    return [name if name and counts[name] == 1 else addresses[i] for i, name in enumerate(given)]


def host_labels(hosts: Sequence[str], ips: Sequence[str]) -> list[str]:
    """Names of hosts, with the address where one name has several: containers, or more than one interface."""
    seen: dict[str, set[str]] = {}
    for host, ip in zip(hosts, ips, strict=True):
        seen.setdefault(host, set()).add(ip)
    return [f"{host} ({ip})" if len(seen[host]) > 1 and ip else host for host, ip in zip(hosts, ips, strict=True)]
