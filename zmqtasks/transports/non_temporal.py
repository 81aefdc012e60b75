"""Copies that go past the caches, in processes that were started for them.

`memcpy` writes through the caches, which read each line of the target before it is written. From a size on the C library
writes past them (non-temporal stores): then two threads together copy 64 MiB in 65 to 90 % of the time
(`python -m bench.shm --non-temporal`). glibc takes that size from what it knows of the caches. In a virtual machine it may be far
off: 240 MiB where the last cache has 32. It can be set only for a process that starts (`GLIBC_TUNABLES`), which a nanny does
for its workers: to what glibc would use, or to half of the last cache where that is larger than the cache. So what fits into the
cache, and is often read next, is written there; and the worker knows from which size on its pieces go past it.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import MutableMapping
from pathlib import Path

from zmqtasks.protocol.frames import KIB

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"


def set_for_child(environment: MutableMapping[str, str]) -> None:
    """Fixes from which size on a process that starts with this environment copies so, unless its user has."""
    tunables = environment.get(_VARIABLE, "")
    if _TUNABLE in tunables or (size_bytes := _chosen()) is None:
        return
    environment[_VARIABLE] = ":".join(filter(None, [tunables, f"{_TUNABLE}={size_bytes:#x}"]))


def threshold() -> int | None:
    """From how many bytes on this process copies past the caches; None: it was not started so that it knows."""
    for tunable in os.environ.get(_VARIABLE, "").split(":"):
        name, _, value = tunable.partition("=")
        if name == _TUNABLE:
            try:
                return int(value, 0)
            except ValueError:
                return None
    return None


@functools.cache
def _chosen() -> int | None:
    """What a child is told; None: nothing, as this is another C library or processor."""
    usual = _threshold_of_glibc()
    cache = _last_cache()
    return cache // 2 if usual and cache and usual > cache else usual


def _threshold_of_glibc() -> int | None:
    """As its loader tells (from glibc 2.33 on)."""
    try:
        maps = Path("/proc/self/maps").read_text()
        loader = re.search(r"/\S*/ld-linux\S*$", maps, re.MULTILINE)
        if loader is None:
            return None
        command = [loader[0], "--list-tunables"]
        told = subprocess.run(
            command, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rf"^{re.escape(_TUNABLE)}: (0x[0-9a-f]+)", told, re.MULTILINE)
    return int(found[1], 16) if found else None


def _last_cache() -> int | None:
    """Bytes of the largest cache of a processor, as the kernel tells; None where it does not."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            found = re.fullmatch(r"(\d+)K", file.read_text().strip())
        except OSError:
            continue
        if found:
            sizes.append(int(found[1]) * KIB)
    return max(sizes, default=None)
