"""Facts about the machine without which a figure says little: no names of users or hosts, no addresses, no secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import zmq

PACKAGES = (
    "zmqtasks",
    "msgspec",
    "numpy",
    "pyzmq",
    "uvloop",
    "lz4",
    "zstandard",
    "ucxx-cu12",
    "ucxx-cu13",
    "distributed",
    "cryptography",
)
_UCX_TIMEOUT_S = 30.0
_UCX_ANSWER = "active transports:"
"""UCX logs to standard output as well, with the name of the host."""
_ASK_UCX = f"import ucxx; ucxx.init(); print({_UCX_ANSWER!r}, *sorted(ucxx.get_active_transports()))"


def facts() -> dict[str, Any]:
    """Processor, memory, kernel, interfaces and versions; JSON."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "interfaces": _interfaces(),
        "infiniband": _infiniband(),
        "sysctl": _sysctl(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libzmq": zmq.zmq_version(),
        "packages": _packages(),
        "ucx_transports": _ucx_transports(),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Sentences on what differs between two machines; empty for the same one with the same software."""
    said = []
    for name in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get(name), theirs.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            inner = (key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key))
            said += [f"{name} {key}: {_short(first.get(key))} → {_short(second.get(key))}" for key in inner]
        elif first != second:
            said.append(f"{name}: {_short(first)} → {_short(second)}")
    return said


def _short(value: object) -> str:
    return "nothing" if value in (None, "", [], {}) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _interfaces() -> dict[str, dict[str, int]]:
    """Those that are up."""
    found = psutil.net_if_stats().items()
    return {name: {"mtu": stats.mtu, "mbit_per_s": stats.speed} for name, stats in sorted(found) if stats.isup}


def _infiniband() -> dict[str, str]:
    """The rate of each port, as the kernel words it."""
    found = {}
    for path in sorted(Path("/sys/class/infiniband").glob("*/ports/*/rate")):
        try:
            found[f"{path.parts[-4]}:{path.parts[-2]}"] = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue
    return found


def _sysctl() -> dict[str, str]:
    found = {}
    for name in ("net/core/rmem_max", "net/core/wmem_max", "net/ipv4/tcp_congestion_control"):
        try:
            found[name.replace("/", ".")] = Path("/proc/sys", name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
    return found


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _ucx_transports() -> list[str]:
    """What UCX would use; asked in another process, since it stays in the one that loads it."""
    if not any(name.startswith("ucxx") for name in _packages()):
        return []
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_UCX],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_UCX_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = (line.removeprefix(_UCX_ANSWER) for line in asked.stdout.splitlines() if line.startswith(_UCX_ANSWER))
    return next(lines, "").split()
