"""Where both ends of a link compute while round trips are measured: each on processors of its own.

Left to itself the kernel puts two processes that wake each other now on one processor, now on two, and moves them after some
tenths of a second. A round trip takes a multiple on two, which says nothing about what is between the ends; and nodes that
have work are on two. So each end has half of the processors meanwhile: of those that share a cache, as a way through the memory
of another socket is longer, and whole cores, as two threads of one core slow each other down.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_SYSTEM = Path("/sys/devices/system/cpu")


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Meanwhile this process and those that it has started never share a processor; as before where the system cannot do it."""
    others = [child.pid for child in psutil.Process().children()]
    if not hasattr(os, "sched_setaffinity") or not others:
        yield
        return
    allowed = os.sched_getaffinity(0)
    here, there = halves(allowed)
    _put([os.getpid()], here)
    _put(others, there)
    try:
        yield
    finally:
        _put([os.getpid(), *others], allowed)


def halves(processors: set[int], system: Path = _SYSTEM) -> tuple[set[int], set[int]]:
    """Two disjoint sets of these processors, near to each other; twice the same one when there is no other."""
    first = min(processors)
    caches = [_listed(file) for file in system.glob(f"cpu{first}/cache/index*/shared_cpu_list")]
    near = max(caches, key=len, default=set()) & processors
    if len(near) < 2:
        near = processors
    cores = {
        frozenset(_listed(system / f"cpu{number}/topology/thread_siblings_list") & near or {number}) for number in near
    }
    parts = sorted(sorted(core) for core in cores)
    if len(parts) < 2:
        parts = [[number] for number in sorted(near)]
    half = len(parts) // 2
    return set().union(*parts[:half] or parts), set().union(*parts[half:])


def _listed(file: Path) -> set[int]:
    """Of a file with a list of processors, like `0-3,8`; empty when there is none."""
    try:
        ranges = [part.split("-") for part in file.read_text().strip().split(",")]
        return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}
    except (OSError, ValueError):
        return set()


def _put(pids: list[int], processors: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), processors)
