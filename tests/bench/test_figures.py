"""Quantiles and bursts: what all subjects have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from bench.network import turns
from bench.network.document import Series
from bench.network.figures import MIB, Burst, Quantiles, Trips


def test_quantiles_that_few_times_cannot_tell_are_none():
    one = Quantiles.of([0.001])
    assert (one.count, one.p50, one.p99, one.p999, one.mean) == (1, 1000, None, None, 1000)
    hundred = Quantiles.of([number / 1e6 for number in range(1, 101)])
    assert (hundred.minimum, hundred.p50, hundred.p99, hundred.p999) == (1, 50, 99, None)
    thousand = Quantiles.of([number / 1e6 for number in range(1000, 0, -1)])
    assert (thousand.p50, thousand.p99, thousand.p999) == pytest.approx((500, 990, 999))


def test_the_tail_is_of_all_rounds_or_not_known():
    """Slow rounds have fewer round trips: what only the fast ones can tell would be too good."""
    fast, slow = Quantiles(2000, 10, 20, 30, 90, 20), Quantiles(80, 900, 1000, None, None, 1000)
    assert (Series(latency_us={1: [fast]}).latency_p99(1), Series(latency_us={1: [fast]}).latency_p999(1)) == (30, 90)
    mixed = Series(latency_us={1: [fast, slow]})
    assert (mixed.latency_p99(1), mixed.latency_p999(1), mixed.latency_p50(1)) == (None, None, 510)


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
    burst, counts = spent(256 * MIB, 0.1, lambda number: 0.07 if number <= 1 + 4 else 0.06)
    assert counts == [1] * (1 + 4 + 9), (
        "the first, a GiB in which the link gets warm, and what counts for 5 times 0.1 s"
    )
    assert burst.messages_per_s == pytest.approx(1 / 0.06)
    _, counts = spent(64 * MIB, 0.05, lambda number: 0.06)
    assert counts == [1] * (1 + 7 + 5), "a slow link is warm after 8 times 50 ms, and measured for 5 times that"
    burst, counts = spent(64 * MIB, 0.05, lambda number: 0.6 if number <= 1 + 4 else 0.3)
    assert counts == [1] * (1 + 4 + 1), "but not before some messages have come"
    assert burst.messages_per_s == pytest.approx(1 / 0.3)


def test_a_stall_while_bursts_grow_does_not_keep_them_short():
    now = 0.0
    burst = Burst(1024, 0.05, clock=lambda: now)
    bursts = 0
    while burst.going:
        burst.began()
        bursts += 1
        now += burst.count * 1e-6 + 1e-4 + (0.03 if bursts == 2 else 0)
        burst.ended()
    assert burst.messages_per_s == pytest.approx(1e6, rel=0.02)


def test_long_times_leave_time_to_measure_slow_links():
    for time_s in (0.4, 0.7, 1.0):
        burst, counts = spent(64 * MIB, time_s, lambda number: 0.67)
        assert burst._counted >= 4 * time_s / 0.67
        assert burst.messages_per_s == pytest.approx(1 / 0.67)
        assert len(counts) < 14 * 0.7 / 0.67 + 30


def test_a_slow_phase_is_part_of_the_figure():
    burst, _ = spent(64 * MIB, 0.1, lambda number: 0.08 if number % 2 else 0.02)
    assert burst.messages_per_s == pytest.approx(20, rel=0.2)


def test_slow_links_end_early():
    assert spent(64 * MIB, 0.01, lambda number: 2.0)[1] == [1, 1, 1, 1]
    burst, counts = spent(64 * MIB, 0.01, lambda number: 6.0)
    assert counts == [1]
    assert burst.messages_per_s == pytest.approx(1 / 6)


def took(count: int, time_s: float, trip_s: Callable[[int], float]) -> tuple[int, Quantiles]:
    """How many round trips there were, each of which takes so long, and what counts."""
    now, number = 0.0, 0
    trips = Trips(count, time_s, clock=lambda: now)
    while trips.going:
        trips.began()
        number += 1
        now += trip_s(number)
        trips.ended()
    return number, trips.quantiles


def test_the_first_round_trips_warm_up():
    number, quantiles = took(1000, 10.0, lambda number: 0.0003 if number <= 26 else 0.001)
    assert number == pytest.approx(1 + 0.01 / 0.0003 + 1000, rel=0.01)
    assert quantiles.count == 1000
    assert quantiles.mean == pytest.approx(1000)


def test_slow_round_trips_end_when_the_time_is_over():
    number, quantiles = took(1000, 0.35, lambda number: 3.0 if number == 1 else 0.1)
    assert (number, quantiles.count) == (1 + 1 + 3, 3), "what the first takes is not of the time"
    assert quantiles.p50 == pytest.approx(1e5)
    assert took(1000, 0.5, lambda number: 2.0)[0] == 3


@pytest.fixture
def asked() -> Iterator[list[turns.Place]]:
    """Where this process has waited for its turn: a tenth of a second each time."""
    places: list[turns.Place] = []

    def wait(place: turns.Place) -> None:
        places.append(place)
        time.sleep(0.1)

    turns.wait_by(wait)
    yield places
    turns.wait_by(None)


def test_bursts_wait_for_their_turns(asked: list[turns.Place]):
    for size in turns.each_in_turn(turns.BANDWIDTH, [1, 64]):
        began, began_all = turns.clock(), time.perf_counter()
        burst = Burst(size, 1e-9)
        burst.began()
        burst.ended()
        assert time.perf_counter() - began_all - (turns.clock() - began) >= 0.1, "waiting is not of the time"
    assert asked == [(turns.BANDWIDTH, 1)] * 2 + [(turns.BANDWIDTH, 64)] * 2
    Burst(100, 0.1).began()
    assert asked[-1].kind == turns.REST


@pytest.mark.parametrize(
    ("trip_s", "time_s", "number", "counted", "turns_taken"),
    [(0.001, 0.2, 1 + 10 + 50 + 2 * (10 + 50) + 10 + 20, 170, 4), (0.1, 0.35, 2 + 1 + 1 + 1, 2, 2)],
    ids=["fast", "slower than a turn"],
)
def test_round_trips_wait_for_their_turns(asked, trip_s, time_s, number, counted, turns_taken):
    for _ in turns.each_in_turn(turns.LATENCY, [1]):
        trips, quantiles = took(1000, time_s, lambda number: trip_s)
    assert trips == pytest.approx(number, abs=turns_taken)
    assert quantiles.count == pytest.approx(counted, abs=turns_taken - 2)
    assert asked == [(turns.LATENCY, 1)] * turns_taken
