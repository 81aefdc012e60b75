"""What runs on the workers of a live cluster: makes values and times how they are fetched.

Nothing here imports from this package: workers may not have it, so these functions travel by value. Fetches go through
the worker's own pool of data links, in its own event loop, as those of tasks do, and are timed there: what a scheduler,
a client or a thread costs is not in the figures.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from typing import Any

Source = dict[str, Any]
"""A worker to fetch from: "address", "small" (a key), "large" (a list of (size, key), ascending)."""
Plan = dict[str, float]
"""`time_s` for one figure, `round_trips` at most, `limit_s` for a pair."""
FEWEST_FETCHES = 3
"""The median of fewer is whatever came between."""
PAGE_BYTES = 4096
"""Of memory that the kernel hands out, or a divisor of it."""


def make_bytes(size: int) -> Any:
    """An array that does not compress, and of which each fetch costs what the first one does.

    It runs backwards: its memory is sent as it lies, but as a new payload for each fetch. Of an array that runs forwards a
    worker keeps the payload, and with it the copy in shared memory: whoever fetches it next reads that, and waits for nothing.
    """
    import numpy

    return numpy.frombuffer(numpy.random.default_rng().bytes(size), numpy.uint8)[::-1]


def about_host() -> dict[str, Any]:
    """A task: what the host says of itself and of the interface that has the worker's address."""
    import os
    import socket

    import psutil

    from zmqtasks import get_worker

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"host": socket.gethostname(), "processors": processors}
    host = get_worker().address.partition("://")[2].rpartition(":")[0].strip("[]")
    stats = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if host and any(address.address.partition("%")[0] == host.partition("%")[0] for address in addresses):
            facts["interface"] = name
            if name in stats:
                facts["mtu"], facts["mbit_per_s"] = stats[name].mtu, stats[name].speed
    return facts


def measure_each(sources: list[Source], plan: Plan) -> list[dict[str, Any]] | None:
    """A task: figures of the links from each source to the worker that runs it, one source after the other."""
    found: list[dict[str, Any]] | None = _in_loop(_each, sources, plan)
    return found


def measure_together(sources: list[Source], plan: Plan) -> list[dict[str, Any]] | None:
    """A task: the same with all sources at the same time: bandwidth for `time_s`, and latency meanwhile."""
    found: list[dict[str, Any]] | None = _in_loop(_together, sources, plan)
    return found


def _in_loop(measure: Any, sources: list[Source], plan: Plan) -> Any:
    """Runs it in the worker's loop, until it is done or this task is cancelled; then the answer is None."""
    from zmqtasks import get_worker, is_cancelled

    worker = get_worker()
    future = asyncio.run_coroutine_threadsafe(measure(worker.data_pool, sources, plan), worker.loop)
    while not concurrent.futures.wait([future], timeout=0.1).done:
        if is_cancelled():
            future.cancel()
            return None
    return future.result()


async def _each(pool: Any, sources: list[Source], plan: Plan) -> list[dict[str, Any]]:
    return [await _one(pool, source, plan) for source in sources]


async def _one(pool: Any, source: Source, plan: Plan) -> dict[str, Any]:
    figures: dict[str, Any] = {"error": ""}
    try:
        async with asyncio.timeout(plan["limit_s"]):
            await _open(pool, source, figures)
            figures["latency_s"] = await _round_trips(pool, source, plan)
            before = _compressed_frames(pool, source)
            figures["bandwidth"] = await _bandwidth(pool, source, plan)
            figures["about"]["compressed"] = _compressed_frames(pool, source) > before
    except TimeoutError:
        figures["error"] = f"not done within {plan['limit_s']:g} s"
    except Exception as exc:
        figures["error"] = f"{type(exc).__name__}: {exc}"
    return figures


async def _open(pool: Any, source: Source, figures: dict[str, Any]) -> None:
    """The first fetch makes the link, unless there is one."""
    is_new = source["address"] not in pool.addresses
    began = time.perf_counter()
    await _get(pool, source["address"], source["small"])
    if is_new:
        figures["first_s"] = time.perf_counter() - began
    about = pool.about(source["address"])
    figures["about"] = {
        "transport": about.transport,
        "same_host": about.same_host,
        "encrypted": about.encrypted,
        "peer": about.peer_address,
    }


def _compressed_frames(pool: Any, source: Source) -> int:
    counters = getattr(pool.about(source["address"]), "compression", {})
    return int(counters.get("decompressed", 0))


async def _get(pool: Any, address: str, key: str) -> Any:
    fetched = await pool.get(address, [key])
    if key not in fetched.values:
        raise LookupError(f"{address} no longer has {key}" + "".join(f": {why}" for why in fetched.failed.values()))
    return fetched.values[key]


async def _get_and_touch(pool: Any, address: str, key: str) -> None:
    """Fetches a large value and reads a byte of each page: shared memory is mapped, a socket's bytes are there anyway."""
    for frame in (await _get(pool, address, key)).frames:
        bytes(frame[::PAGE_BYTES])


async def _round_trips(pool: Any, source: Source, plan: Plan) -> list[float]:
    clock, address, key = time.perf_counter, source["address"], source["small"]
    times: list[float] = []
    end = clock() + plan["time_s"]
    while len(times) < plan["round_trips"]:
        began = clock()
        await _get(pool, address, key)
        done = clock()
        times.append(done - began)
        if done > end:
            break
    return sorted(times)


async def _bandwidth(pool: Any, source: Source, plan: Plan) -> list[tuple[int, float]]:
    """Bytes/s by size, from the median time of some fetches; sizes that would take too long are left out."""
    clock, address = time.perf_counter, source["address"]
    found: list[tuple[int, float]] = []
    for size, key in source["large"]:
        if found and size / found[-1][1] > 2 * plan["time_s"]:
            break
        await _get_and_touch(pool, address, key)  # windows open, memory of this size is made
        times: list[float] = []
        end = clock() + plan["time_s"] / len(source["large"])
        while len(times) < 100:
            began = clock()
            await _get_and_touch(pool, address, key)
            done = clock()
            times.append(done - began)
            if done > end and len(times) >= FEWEST_FETCHES:
                break
        found.append((size, size / sorted(times)[len(times) // 2]))
    return found


async def _together(pool: Any, sources: list[Source], plan: Plan) -> list[dict[str, Any]]:
    all_figures: list[dict[str, Any]] = [{"error": ""} for _ in sources]

    async def guarded(step: Any, source: Source, figures: dict[str, Any], limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await step(pool, source, figures)
        except TimeoutError:
            figures["error"] = f"not done within {limit_s:g} s"
        except Exception as exc:
            figures["error"] = f"{type(exc).__name__}: {exc}"

    pairs = list(zip(sources, all_figures, strict=True))
    # All links first: whoever has its link early would have the network to itself.
    await asyncio.gather(*(guarded(_open, source, figures, plan["limit_s"]) for source, figures in pairs))
    there = [(source, figures) for source, figures in pairs if not figures["error"]]
    await asyncio.gather(*(guarded(_warm_up, source, figures, plan["limit_s"]) for source, figures in there))
    end = time.perf_counter() + plan["time_s"]

    async def load(pool: Any, source: Source, figures: dict[str, Any]) -> None:
        await asyncio.gather(_bulk_until(end, pool, source, figures), _small_until(end, pool, source, figures))

    there = [(source, figures) for source, figures in pairs if not figures["error"]]
    await asyncio.gather(*(guarded(load, source, figures, plan["limit_s"]) for source, figures in there))
    return all_figures


async def _warm_up(pool: Any, source: Source, figures: dict[str, Any]) -> None:
    """One large fetch that does not count: memory for all links at once is new at first."""
    await _get_and_touch(pool, source["address"], source["large"][0][1])


async def _bulk_until(end: float, pool: Any, source: Source, figures: dict[str, Any]) -> None:
    clock = time.perf_counter
    size, key = source["large"][0]
    began, count = clock(), 0
    while clock() < end:
        await _get_and_touch(pool, source["address"], key)
        count += 1
    figures["bandwidth"] = [(size, count * size / (clock() - began))]


async def _small_until(end: float, pool: Any, source: Source, figures: dict[str, Any]) -> None:
    clock = time.perf_counter
    times: list[float] = []
    while clock() < end:
        began = clock()
        await _get(pool, source["address"], source["small"])
        times.append(clock() - began)
    figures["latency_s"] = sorted(times)
