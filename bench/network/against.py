"""A transport beside its raw baseline, in alternating rounds of one run: `python -m bench.network.baselines_socket` and the like.

The machine's speed changes from second to second, so the ratio is taken within each round; shown is the median, and the
lowest and highest ratio of all rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from .figures import MIB, Figures, Plan
from .links import measure_link

ROUNDS = 7


def compare_with_raw(
    scheme: str, measure: Callable[[Plan], Figures], sizes: tuple[int, ...] = (64 * MIB, 256 * MIB)
) -> None:
    """Prints bandwidth, round trip and message rates of `scheme` and of the baseline."""
    plan = Plan(sizes=sizes, rates=("messages_per_s", "batched_messages_per_s"), time_s=0.4)
    rounds = [(measure_link(scheme, False, plan), measure(plan)) for _ in range(ROUNDS)]
    for size in plan.sizes:
        _show(
            f"{size >> 20} MiB",
            "GB/s",
            [(ours.bandwidth[size] / 1e9, raw.bandwidth[size] / 1e9) for ours, raw in rounds],
        )
    _show("round trip", "us", [(ours.latency_us[1].p50, raw.latency_us[1].p50) for ours, raw in rounds])
    for name in plan.rates:
        _show(name, "", [(ours.rates.get(name, 0.0), raw.rates.get(name, 0.0)) for ours, raw in rounds])


def _show(what: str, unit: str, pairs: list[tuple[float, float]]) -> None:
    ours, raw = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    line = f"{what}: {ours:,.2f} {unit}"
    if raw:
        ratios = sorted(pair[0] / pair[1] for pair in pairs)
        line += f", raw {raw:,.2f} {unit}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(line, flush=True)
