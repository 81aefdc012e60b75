"""Tests that dask.distributed would have of itself, by its own `gen_cluster`; run with zmq as the default scheme.

That decorator fails a test which leaves comms, clients, workers or threads open.
"""

from __future__ import annotations

import asyncio
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Nanny
from distributed.utils_test import gen_cluster, inc

from zmqtasks.integrations.distributed_comm import start_threads

start_threads()


@gen_cluster(client=True)
async def test_array(c: Any, s: Any, a: Any, b: Any) -> None:
    assert {node.address[:6] for node in (s, a, b)} == {"zmq://"}
    x = da.ones((400, 400), chunks=(50, 50))
    assert await c.compute((x + x.T).sum()) == 320_000


@gen_cluster(client=True)
async def test_p2p(c: Any, s: Any, a: Any, b: Any) -> None:
    data = pd.DataFrame({"a": np.arange(1000) % 17, "b": np.arange(1000)})
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        out = await c.compute(dd.from_pandas(data, npartitions=8).shuffle("a"))
    assert sorted(out.b) == list(range(1000))


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 3)
async def test_a_worker_that_closes(c: Any, s: Any, a: Any, b: Any, w: Any) -> None:
    futures = c.map(inc, range(60))
    await c.gather(futures)
    await a.close()
    assert sum(await c.gather(futures)) == 1830


@gen_cluster(client=True, nthreads=[])
async def test_big_data_between_workers(c: Any, s: Any) -> None:
    from distributed import Worker

    async with Worker(s.address, name="one") as one, Worker(s.address, name="two") as two:
        assert one.address != two.address
        big = c.submit(np.ones, 4_000_000, workers=["one"])
        total = await c.submit(np.sum, big, workers=["two"])
        assert total == 4_000_000
        await asyncio.gather(*(c.submit(inc, number, pure=False) for number in range(20)))


@gen_cluster(client=True, Worker=Nanny, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_restart_and_kill(c: Any, s: Any, a: Any) -> None:
    assert await c.submit(inc, 1) == 2
    await c.restart()
    assert await c.submit(inc, 1) == 2
    await a.kill()
    assert await c.submit(inc, 2) == 3
