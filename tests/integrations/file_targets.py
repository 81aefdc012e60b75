"""Things to store into that notice when two write at the same time, in a module that workers can import."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class WatchedFile:
    """An array in a file. Who writes makes a second file meanwhile; who finds it there is noted in a third."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setitem__(self, region: Any, value: Any) -> None:
        busy, overlaps = self.path.with_suffix(".busy"), self.path.with_suffix(".overlaps")
        try:
            os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with overlaps.open("a") as file:
                file.write(f"{os.getpid()}\n")
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {region[0].start} {float(value.sum())}\n")
        time.sleep(0.01)  # how long writing takes
        busy.unlink(missing_ok=True)

    def overlaps(self) -> bool:
        return self.path.with_suffix(".overlaps").exists()

    def written(self) -> dict[int, float]:
        return {int(start): float(total) for _, start, total in self._lines()}

    def writers(self) -> set[str]:
        return {pid for pid, _, _ in self._lines()}

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]


def take_both(inside: Any, outside: Any) -> int:
    """What HDF5 code does: takes a lock of the process, then one for the file."""
    with inside, outside:
        return os.getpid()


def hold(lock: Any, begun: str, until: str) -> None:
    """Holds a lock until a file is there."""
    with lock:
        Path(begun).touch()
        deadline = time.monotonic() + 20
        while not Path(until).exists() and time.monotonic() < deadline:
            time.sleep(0.005)


def identity(lock: Any) -> tuple[int, int]:
    """The process, and the lock as it has come there."""
    return os.getpid(), id(lock)
