"""Quantiles and bursts: what all subjects have in common."""

from __future__ import annotations

import time

import pytest

from bench.network.figures import MIB, Burst, Quantiles


def test_quantiles_that_few_times_cannot_tell_are_none():
    one = Quantiles.of([0.001])
    assert (one.count, one.p50, one.p99, one.p999, one.mean) == (1, 1000, None, None, 1000)
    hundred = Quantiles.of([number / 1e6 for number in range(1, 101)])
    assert (hundred.minimum, hundred.p50, hundred.p99, hundred.p999) == (1, 50, 99, None)
    thousand = Quantiles.of([number / 1e6 for number in range(1000, 0, -1)])
    assert (thousand.p50, thousand.p99, thousand.p999) == pytest.approx((500, 990, 999))


def spent(size: int, time_s: float, per_message_s: float) -> tuple[Burst, list[int]]:
    """A burst over a link that takes so long for each message, and the counts of messages it asked for."""
    burst, counts = Burst(size, time_s), []
    while burst.going:
        burst.began()
        counts.append(burst.count)
        time.sleep(burst.count * per_message_s)
        burst.ended()
    return burst, counts


def test_bursts_grow_until_they_take_long_enough():
    burst, counts = spent(100, 0.05, 0.00001)
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] * 0.00001 >= 0.02
    assert 0 < burst.bandwidth <= 100 / 0.00001
    assert burst.messages_per_s == pytest.approx(burst.bandwidth / 100)


def test_several_messages_count_however_large():
    burst, counts = spent(64 * MIB, 0.01, 0.02)
    assert counts == [1] * 10, "the first two while the link warms up"
    assert burst.messages_per_s <= 50


def test_a_slow_phase_is_part_of_the_figure():
    burst, number = Burst(64 * MIB, 0.01), 0
    while burst.going:
        number += 1
        burst.began()
        time.sleep(0.08 if number % 2 else 0.02)
        burst.ended()
    assert burst.messages_per_s <= 20


def test_slow_links_end_early(monkeypatch):
    monkeypatch.setattr(Burst, "_LONGEST_S", 0.25)
    _, counts = spent(64 * MIB, 0.01, 0.1)
    assert len(counts) <= 3, "three are over the time, and a busy machine makes it fewer"
    monkeypatch.setattr(Burst, "_LONGEST_S", 0.09)
    burst, counts = spent(64 * MIB, 0.01, 0.1)
    assert counts == [1]
    assert burst.messages_per_s <= 10
