"""What tests of dask graphs run, in a module that workers can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def fail_with(text: str) -> None:
    raise ValueError(text)


def pid(*_: object) -> int:
    return os.getpid()


def kill_once(marker: str, x: int) -> int:
    """Kills the first process that runs it."""
    path = Path(marker)
    if not path.exists():
        path.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def fail_until(marker: str, times: int) -> int:
    """Raises so many times."""
    path = Path(marker)
    n = int(path.read_text()) if path.exists() else 0
    path.write_text(str(n + 1))
    if n < times:
        raise RuntimeError(f"attempt {n}")
    return n


def note(path: str, name: str, *_: object) -> str:
    """Adds a line to a file: that it ran, after those of the lines before."""
    with open(path, "a") as file:
        file.write(f"{name}\n")
    return name


def wait_for_file(path: str) -> None:
    """Returns when the file is there."""
    deadline = time.monotonic() + 20
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)
