"""Quantiles and bursts: what all subjects have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.network.figures import MIB, Burst, Quantiles


def test_quantiles_that_few_times_cannot_tell_are_none():
    one = Quantiles.of([0.001])
    assert (one.count, one.p50, one.p99, one.p999, one.mean) == (1, 1000, None, None, 1000)
    hundred = Quantiles.of([number / 1e6 for number in range(1, 101)])
    assert (hundred.minimum, hundred.p50, hundred.p99, hundred.p999) == (1, 50, 99, None)
    thousand = Quantiles.of([number / 1e6 for number in range(1000, 0, -1)])
    assert (thousand.p50, thousand.p99, thousand.p999) == pytest.approx((500, 990, 999))


def spent(size: int, time_s: float, message_s: Callable[[int], float]) -> tuple[Burst, list[int]]:
    """A burst over a link that takes so long for each message, and the counts of messages it asked for."""
    now, counts = 0.0, []
    burst = Burst(size, time_s, clock=lambda: now)
    while burst.going:
        burst.began()
        counts.append(burst.count)
        now += burst.count * message_s(len(counts))
        burst.ended()
    return burst, counts


def test_bursts_grow_until_they_take_long_enough():
    burst, counts = spent(100, 0.05, lambda number: 0.00001)
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] * 0.00001 >= 0.025
    assert burst.bandwidth == pytest.approx(100 / 0.00001)
    assert burst.messages_per_s == pytest.approx(1 / 0.00001)


def test_several_large_messages_count_once_the_link_is_warm():
    burst, counts = spent(64 * MIB, 0.1, lambda number: 0.05 if number <= 1 + 16 else 0.04)
    assert counts == [1] * (1 + 16 + 8), "the first, a GiB in which the link gets warm, and what counts"
    assert burst.messages_per_s == pytest.approx(1 / 0.04)
    _, counts = spent(64 * MIB, 0.05, lambda number: 0.06)
    assert counts == [1] * (1 + 7 + 5), "a slow link is warm after 8 times 50 ms, and measured for 5 times that"


def test_a_slow_phase_is_part_of_the_figure():
    burst, _ = spent(64 * MIB, 0.1, lambda number: 0.08 if number % 2 else 0.02)
    assert burst.messages_per_s == pytest.approx(20)


def test_slow_links_end_early():
    assert spent(64 * MIB, 0.01, lambda number: 2.0)[1] == [1, 1, 1]
    burst, counts = spent(64 * MIB, 0.01, lambda number: 6.0)
    assert counts == [1]
    assert burst.messages_per_s == pytest.approx(1 / 6)
