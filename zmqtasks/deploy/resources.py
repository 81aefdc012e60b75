"""What this machine has for workers, and how users say how much of it they may take."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from zmqtasks.errors import ConfigError
from zmqtasks.transports.host_memory import available_memory_bytes

__all__ = ["available_cpus", "available_memory_bytes", "parse_memory_limit", "parse_resources", "split_threads"]

UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
}
CGROUP_CPU_FILE = "/sys/fs/cgroup/cpu.max"


def available_cpus() -> int:
    """Processors that this process may use: affinity and the cgroup's quota are taken into account."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(CGROUP_CPU_FILE).read_text().split()[:2]
        count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or `max`
        pass
    return max(1, count)


def parse_memory_limit(limit: str | float | None, nthreads: int = 1, n_workers: int = 1) -> int:
    """The memory limit of one worker in bytes; 0 for none.

    Args:
        limit: `auto` (the worker's share of the machine), a number up to 1.0 (that part of the machine), a number of
            bytes, a text like `4GiB` or `500MB`, or 0 or None for no limit.
        nthreads: Threads of the worker.
        n_workers: Workers like it on this machine.

    Raises:
        ConfigError: it is none of these.
    """
    if limit is None:
        return 0
    if isinstance(limit, str):
        if limit.strip().lower() == "auto":
            share = min(1.0, max(nthreads / available_cpus(), 1e-9), 1 / max(1, n_workers))
            return int(available_memory_bytes() * share)
        limit = _parse_size(limit)
    if not math.isfinite(limit) or limit < 0:
        raise ConfigError(
            f"memory limit {limit!r}: give bytes, `4GiB`, a part of the machine like 0.5, `auto`, or 0 for none"
        )
    if isinstance(limit, float) and 0 < limit <= 1:
        return int(available_memory_bytes() * limit)
    return int(limit)


def parse_resources(text: str) -> dict[str, float]:
    """`GPU=2,foo=1` as a mapping; ConfigError when it is not of that form."""
    resources: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.replace(",", " ").split())):
        name, _, amount = part.partition("=")
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        if not name or not math.isfinite(value) or value < 0:
            raise ConfigError(f"resources {text!r}: write them as NAME=AMOUNT,NAME=AMOUNT, as in GPU=2,disk=0.5")
        resources[name] = value
    return resources


def split_threads(cpus: int) -> tuple[int, int]:
    """Worker processes and threads of each for a machine: one thread each on small ones, about sqrt(cpus) processes on
    others."""
    if cpus <= 4:
        return cpus, 1
    processes = min(count for count in range(1, cpus + 1) if cpus % count == 0 and count >= math.sqrt(cpus))
    return processes, cpus // processes


def _parse_size(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS:
        raise ConfigError(f"memory limit {text!r}: write it like 4GiB, 500MB, 0.5 (of the machine), auto or 0")
    number = float(match[1])
    if match[2]:
        return int(number * UNITS[match[2].upper()])
    return number if "." in match[1] else int(number)  # 1.0 is a part of the machine, 1 is a byte
