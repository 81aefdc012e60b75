"""How much memory a process has to itself, and how often the kernel has killed for want of memory: from /proc and cgroups."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_ARENA_LINK = "/memfd:zmqtasks-arena"  # as `transports.shm.arena` names it
_BLOCK_BYTES = 512  # stat(2)

FILL_BYTES_PER_S = 4 << 30
"""Fresh memory is filled at about 3.3 GB/s by one thread: decides how soon to look again."""
SHORTEST_LOOK_S = 0.05
LONGEST_LOOK_S = 1.0

KILL_SHARE = 0.95
"""Of the limit: what is above is not left to the kernel's killer, which may choose another process."""


def private_bytes(pid: int) -> int:
    """Memory that a process takes: its own pages, and what it lends; not what peers lend to it. 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
        return (int(resident) - int(shared)) * _PAGE_BYTES + _arena_bytes(pid)
    except FileNotFoundError:
        return _portable_bytes(pid) if not os.path.isdir("/proc/self") else 0
    except (OSError, ValueError):
        return 0


def _arena_bytes(pid: int) -> int:
    """Memory of the files from which a process lends: it alone has them open for writing; peers' look the same else.

    A file is counted once however often it is open, and whatever of it is mapped.
    """
    folder = f"/proc/{pid}/fd"
    found: dict[int, int] = {}
    for number in os.listdir(folder):
        path = f"{folder}/{number}"
        try:
            if os.readlink(path).startswith(_ARENA_LINK) and os.lstat(path).st_mode & stat.S_IWUSR:
                status = os.stat(path)
                found[status.st_ino] = status.st_blocks * _BLOCK_BYTES
        except OSError:  # closed meanwhile
            continue
    return sum(found.values())


def _portable_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def next_look_s(used_bytes: int, limit_bytes: int) -> float:
    """When a process may be over its limit at the earliest."""
    left_s = (KILL_SHARE * limit_bytes - used_bytes) / FILL_BYTES_PER_S
    return min(max(left_s, SHORTEST_LOOK_S), LONGEST_LOOK_S)


def is_stopped(pid: int) -> bool:
    """Whether the process is frozen by SIGSTOP or a debugger."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")


def out_of_memory_kills() -> int:
    """How many processes of this control group the kernel has killed for want of memory; 0 where nobody counts."""
    count = 0
    for path in _counter_files():
        try:
            text = path.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                count += int(value)
    return count


def _counter_files() -> list[Path]:
    """`memory.events` (version 2) and `memory.oom_control` (version 1) of this process's control group."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if number == "0" and not controllers:
            found.append(Path("/sys/fs/cgroup") / inside / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(Path("/sys/fs/cgroup/memory") / inside / "memory.oom_control")
    return found


def format_bytes(size: float) -> str:
    """`1.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
