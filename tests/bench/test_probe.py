"""What runs on workers, with a pool of values that are there at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from bench.network.probe import FEWEST_FETCHES, _bandwidth, _together, make_bytes
from zmqtasks.nodes.data_asking import Fetched
from zmqtasks.nodes.worker.store import Entry

NO_TIME = {"time_s": 0.0, "round_trips": 1, "limit_s": 30.0}
SOURCE = {"address": "tcp://there:1", "small": "small", "large": [(1 << 20, "large")]}


class Pool:
    """Answers each request from memory, and remembers it."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked: list[str] = []
        self.payload = Entry(make_bytes(1 << 20), 1 << 20).payload()

    async def get(self, address: str, keys: list[str]) -> Fetched:
        self.asked += keys
        return Fetched(dict.fromkeys(keys, self.payload), [], {})

    def about(self, address: str) -> SimpleNamespace:
        return SimpleNamespace(transport="tcp", same_host=False, encrypted=True, peer_address=address)


def test_a_fetch_that_does_not_count_comes_first():
    pool = Pool()
    asyncio.run(_bandwidth(pool, SOURCE, NO_TIME))
    assert pool.asked == ["large"] * (1 + FEWEST_FETCHES)


def test_all_links_are_open_and_warm_before_any_of_them_counts():
    pool = Pool()
    asyncio.run(_together(pool, [SOURCE, SOURCE], NO_TIME))
    assert pool.asked[:4] == ["small", "small", "large", "large"]


def test_a_value_is_sent_anew_for_each_fetch_and_never_copied_for_it():
    entry = Entry(make_bytes(1 << 20), 1 << 20)
    first, second = entry.payload().frames[0], entry.payload().frames[0]
    assert first is not second  # or shared memory would lend what the reader before has paid for
    assert np.shares_memory(np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8))
