"""What a worker tells about itself: memory and processor time of its process, and what has been executing for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from zmqtasks.nodes.worker.state import Run

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_bytes() -> int:
    """Memory that this process occupies: its own, and what it lends; not what peers have lent to it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:  # not Linux
        import psutil

        return int(psutil.Process().memory_info().rss)
    from zmqtasks.transports.shm.own_arena import lent_bytes

    return (int(resident) - int(shared)) * _PAGE_BYTES + lent_bytes()


class CpuMeter:
    """Share of a processor that this process has used between two looks."""

    def __init__(self) -> None:
        self._wall = time.monotonic()
        self._cpu = time.process_time()

    def percent(self) -> float:
        """Since the last call: 100 for one processor in full."""
        wall, cpu = time.monotonic(), time.process_time()
        elapsed, used = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return 100 * used / elapsed if elapsed > 0 else 0.0


class LongRuns:
    """Finds runs that were executing at two looks in a row, and have not been told yet."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._told: set[int] = set()

    def look(self, executing: Iterable[Run]) -> tuple[list[Run], bool]:
        """Runs to tell now, and whether another look is worth while: something runs that has not been told."""
        now = {run.run_id: run for run in executing}
        self._told &= now.keys()
        long = [run for run_id, run in now.items() if run_id in self._seen and run_id not in self._told]
        self._told.update(run.run_id for run in long)
        self._seen = set(now)
        return long, len(self._told) < len(now)

    def told(self, executing: Iterable[Run]) -> list[Run]:
        """Those that have been told and still execute."""
        return [run for run in executing if run.run_id in self._told]
