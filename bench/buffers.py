"""Memory for large frames: what filling it costs, new and warm, and what lending takes: `python -m bench.buffers`."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

import numpy as np

from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.transports.buffer_pool import BufferPool

_SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
_ROUNDS_BYTES = 1024 * MIB


def _gigabytes_per_s(fill: Callable[[], object], size: int) -> float:
    """The best of some rounds: others use this machine too."""
    fill()
    best = float("inf")
    for _ in range(max(3, min(200, _ROUNDS_BYTES // size))):
        began = time.perf_counter()
        fill()
        best = min(best, time.perf_counter() - began)
    return size / best / 1e9


def _kinds(size: int) -> dict[str, Callable[[], object]]:
    source = np.ones(size, np.uint8).data
    pool = BufferPool()

    def fill_pooled() -> None:
        view = pool.allocate(size)
        assert view is not None
        view[:] = source

    def fill_numpy() -> None:
        np.empty(size, np.uint8).data[:] = source

    def fill_mapping(huge: bool) -> None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        memoryview(memory)[:] = source

    return {
        "new, small pages": lambda: fill_mapping(False),
        "new, huge pages": lambda: fill_mapping(True),
        "numpy.empty": fill_numpy,
        "pool": fill_pooled,
    }


def main() -> None:
    """Prints the tables."""
    print("GB/s of filling memory, from warm memory")
    for size in _SIZES:
        rates = (f"{name} {_gigabytes_per_s(fill, size):5.1f}" for name, fill in _kinds(size).items())
        print(f"{size >> 10:7d} KiB: {', '.join(rates)}")
    pool, count = BufferPool(), 20_000
    pool.allocate(MIB)
    began = time.perf_counter()
    for _ in range(count):
        pool.allocate(MIB)
    print(f"lending and taking back: {(time.perf_counter() - began) / count * 1e6:.1f} us")


if __name__ == "__main__":
    main()
