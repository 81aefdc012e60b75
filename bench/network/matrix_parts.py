"""Parts of the matrix without the measuring: its workers, what a probe's answer means, of two figures the better one."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .figures import MIB, Quantiles
from .pairs import Link, Pair, choose_workers, host_labels, unique_labels

if TYPE_CHECKING:
    from zmqtasks import Future

MEMORY_SHARE = 8
"""Values take at most 1/8 of the smallest worker's memory."""
AT_ONCE_BYTES = 512 * MIB
"""At most so much is on its way to a worker when all pairs run at once: 1 GbE takes 5 s for it, of the 30 that a pair has."""


@dataclass(slots=True)
class Measured:
    """One worker of the matrix."""

    address: str
    label: str
    host: str
    values: list[Future[Any]] = field(default_factory=list)
    """The small one, then the large ones."""
    gone: str = ""
    """Why it is not tried any more."""
    worked: int = 0
    failed: int = 0


def describe_workers(info: dict[str, dict[str, Any]]) -> list[Measured]:
    """From the scheduler's answer: the workers to measure, sorted by host and name."""
    addresses = sorted(info, key=lambda address: (_natural(info[address]["host"], info[address]["name"]), address))
    hosts = host_labels([info[address]["host"] for address in addresses], [_ip(address) for address in addresses])
    # A worker that nobody has named has its address for a name: that of its host says more.
    names = [
        host if (name := info[each]["name"]) == each else name for each, host in zip(addresses, hosts, strict=True)
    ]
    labels = unique_labels(names, addresses)
    return [Measured(addresses[i], labels[i], hosts[i]) for i in choose_workers(hosts)]


def _natural(*texts: str) -> list[list[tuple[int, str]]]:
    """A sort key by which n2 comes before n10."""
    return [[(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", text)] for text in texts]


def _ip(address: str) -> str:
    """The IP address in a worker's address, empty where there is none or it is loopback."""
    host = address.partition("://")[2].rpartition(":")[0].strip("[]")
    try:
        return "" if ipaddress.ip_address(host.partition("%")[0]).is_loopback else host
    except ValueError:
        return ""


def sizes_that_fit(sizes: tuple[int, ...], info: dict[str, dict[str, Any]]) -> tuple[int, ...]:
    """Those for which each worker has memory; at least the smallest."""
    limits = [worker["memory_limit"] for worker in info.values() if worker.get("memory_limit")]
    most = min(limits, default=0) / MEMORY_SHARE
    fitting = tuple(size for size in sizes if not limits or size <= most)
    return fitting or sizes[:1]


def size_of_all_at_once(sizes: tuple[int, ...], info: dict[str, dict[str, Any]], pairs: Iterable[Pair]) -> int:
    """The largest that fits when a worker receives a value from, and sends one to, each of its partners at once."""
    busiest = max(Counter(target for _, target in pairs).values(), default=1)
    fitting = sizes_that_fit(tuple(size * busiest for size in sizes if size * busiest <= AT_ONCE_BYTES), info)
    return max(fitting) // busiest if fitting else sizes[0]


def link_of(pair: Pair, answer: dict[str, Any]) -> Link:
    """From what the probe has found."""
    link = Link(source=pair[0], target=pair[1], error=answer["error"])
    if about := answer.get("about"):
        link.transport, link.same_host, link.encrypted = about["transport"], about["same_host"], about["encrypted"]
        link.compressed = about.get("compressed", False)
    if first_s := answer.get("first_s"):
        link.first_ms = first_s * 1e3
    if times := answer.get("latency_s"):
        quantiles = Quantiles.of(times)
        link.latency_us, link.latency_p99_us = quantiles.p50, quantiles.p99
    if by_size := dict(answer.get("bandwidth", ())):
        link.by_size = by_size
        link.bandwidth = max(by_size.values()) or None
    return link


def better(first: Link, second: Link) -> Link:
    """The second one, with the better figures of both."""
    if first is second or second.error:
        return first
    latencies = [link for link in (first, second) if link.latency_us]
    quick = min(latencies, key=lambda link: link.latency_us or 0.0, default=second)
    fast = max((first, second), key=lambda link: link.bandwidth or 0.0)
    second.latency_us, second.latency_p99_us = quick.latency_us, quick.latency_p99_us
    second.bandwidth, second.by_size = fast.bandwidth, fast.by_size
    second.first_ms, second.compressed = first.first_ms, first.compressed or second.compressed
    return second


def nothing_found(links: list[Link]) -> list[str]:
    """What is said when nothing is slow beside the rest."""
    measured = [link for link in links if not link.error]
    if not measured:
        return []
    workers = {end for link in measured for end in (link.source, link.target)}
    if len(workers) == 2:
        return ["two workers: there is nothing to compare their link with"]
    pairs = len({frozenset((link.source, link.target)) for link in measured})
    if pairs < 3:
        return [f"{len(workers)} workers, but only {pairs} pairs of them were measured: too few to compare"]
    return ["no host and no link is slow beside the others"]
