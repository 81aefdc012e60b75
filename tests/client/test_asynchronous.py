"""Clients in an event loop of the user's, plain asyncio and uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import client_tasks as tasks
import numpy as np
import pytest
import uvloop

from zmqtasks import Client, LocalCluster, TaskTimeoutError, as_completed, wait
from zmqtasks.errors import ConfigError

Runner = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a coroutine in one kind of loop."""
    runner: Runner = request.param
    return runner


def test_an_asynchronous_client(run: Runner, cluster: LocalCluster, tmp_path: Path) -> None:
    async def main() -> None:
        async with Client(cluster, asynchronous=True) as client:
            assert await client.submit(tasks.inc, 1) == 2
            assert await client.submit(tasks.inc, 1).result() == 2
            futures = client.map(tasks.inc, range(100))
            assert await client.gather(futures) == list(range(1, 101))
            assert await client.gather({"x": futures[0]}) == {"x": 1}
            bad = client.submit(tasks.fail)
            with pytest.raises(ValueError, match="no"):
                await bad
            assert isinstance(await bad.exception(), ValueError)
            assert await bad.traceback() is not None
            data = await client.scatter(np.ones(100_000))
            assert await client.submit(tasks.sum_array, data) == 100_000
            assert len(await client.submit(tasks.blob, 200_000)) == 200_000
            assert len(await client.nthreads()) == 2
            seen = [future.result() async for future in as_completed(futures)]
            assert sorted([await value for value in seen]) == list(range(1, 101))
            batches = [batch async for batch in as_completed(futures, with_results=True).batches()]
            assert sorted(value for batch in batches for _, value in batch) == list(range(1, 101))
            done, not_done = await wait(futures)
            assert (len(done), len(not_done)) == (100, 0)
            slow = client.submit(tasks.wait_for, str(tmp_path / "go"))
            with pytest.raises(TaskTimeoutError):
                await slow.result(timeout=0.05)
            done, not_done = await wait([slow, futures[0]], return_when="FIRST_COMPLETED")
            assert (done, not_done) == ({futures[0]}, {slow})
            called = asyncio.Event()
            slow.add_done_callback(lambda future: called.set())
            await slow.cancel()
            await asyncio.wait_for(called.wait(), 10)
            (tmp_path / "go").touch()
            assert await client.get({"a": 1, "b": (tasks.inc, "a")}, "b") == 2
            assert len(await client.run(int)) == 2
            await client.wait_for_workers(2, timeout=5)

    run(main())


def test_await_makes_a_client(run: Runner, cluster: LocalCluster) -> None:
    async def main() -> None:
        client = await Client(cluster, asynchronous=True)
        assert await client.submit(tasks.inc, 1) == 2
        await client.close()
        await client.close()
        early = Client(cluster, asynchronous=True)
        with pytest.raises(ConfigError, match="not connected yet"):
            early.submit(tasks.inc, 1)
        with pytest.raises(TypeError, match="async with"), early:
            pass

    run(main())


def test_futures_of_a_synchronous_client_can_be_awaited(run: Runner, client: Client) -> None:
    async def main() -> list[int]:
        futures = client.map(tasks.inc, range(5))
        return await asyncio.gather(*[asyncio.ensure_future(_awaited(future)) for future in futures])

    assert run(main()) == [1, 2, 3, 4, 5]


async def _awaited(future: Any) -> Any:
    return await future


def test_a_synchronous_client_is_not_awaited(run: Runner, client: Client) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="synchronous"):
            await client
        with pytest.raises(TypeError, match="synchronous"):
            async with client:
                pass

    run(main())


def test_a_cluster_of_its_own() -> None:
    async def main() -> int:
        async with Client(asynchronous=True, processes=False, threads_per_worker=1) as client:
            result: int = await client.submit(tasks.inc, 1)
            return result

    assert asyncio.run(main()) == 2
