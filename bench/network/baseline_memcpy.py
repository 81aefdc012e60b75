"""The baseline of links within one host: copying from one warm buffer of a process into another."""

from __future__ import annotations

import numpy as np

from .figures import READ_BYTES, Burst, Figures, Plan
from .gil import holding_gil
from .turns import BANDWIDTH, each_in_turn


def measure(plan: Plan) -> Figures:
    """Bandwidth of `memcpy` by size; both buffers are the same all the time, so small ones stay in the cache."""
    figures = Figures("memcpy")
    with holding_gil(plan.hold_gil):
        for size in each_in_turn(BANDWIDTH, plan.sizes):
            figures.bandwidth[size] = _bandwidth(size, plan.time_s)
        if "read_bytes_per_s" in plan.rates:
            figures.rates["read_bytes_per_s"] = _bandwidth(min(READ_BYTES, max(plan.sizes)), plan.time_s)
    return figures


def _bandwidth(size: int, time_s: float) -> float:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    burst = Burst(size, time_s)
    while burst.going:
        burst.began()
        for _ in range(burst.count):
            np.copyto(target, source)
        burst.ended()
    return burst.bandwidth
