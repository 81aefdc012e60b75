"""A loop that looks for the next message turns on for a moment, and then sleeps."""

from __future__ import annotations

import asyncio
import time

import pytest

from zmqtasks.nodes.lookout import Lookout


async def _turns(lookout: Lookout, messages: int, pause_s: float = 0.0) -> tuple[int, float]:
    """How often the loop turned after the messages until it slept, and the processor time it took."""
    loop = asyncio.get_running_loop()
    for number in range(messages):
        if number and pause_s:
            await asyncio.sleep(pause_s)
        lookout.heard(time.perf_counter())
    turns = 0
    began = time.process_time()
    while lookout._turning:
        turns += 1
        again = loop.create_future()
        loop.call_soon(again.set_result, None)
        await again
    return turns, time.process_time() - began


@pytest.mark.parametrize(
    ("messages", "pause_s", "spin_s", "turns"),
    [(1, 0, 0.05, False), (2, 0, 0.5, True), (2, 0.06, 0.05, False), (2, 0, 0.0, False)],
    ids=["the first", "one upon the other", "far apart", "switched off"],
)
def test_it_turns_where_messages_come_soon(messages: int, pause_s: float, spin_s: float, turns: bool) -> None:
    async def test() -> None:
        turned, took_s = await _turns(Lookout(asyncio.get_running_loop(), spin_s, lambda: True), messages, pause_s)
        assert bool(turned) is turns
        assert took_s < 5  # it has ended

    asyncio.run(test())


def test_it_sleeps_when_all_have_work() -> None:
    async def test() -> None:
        looks = iter([True] * 20)
        lookout = Lookout(asyncio.get_running_loop(), 60.0, lambda: next(looks, False))
        turns, _ = await _turns(lookout, 2)
        assert 10 <= turns <= 22
        assert (await _turns(lookout, 1))[0] <= 1

    asyncio.run(test())
