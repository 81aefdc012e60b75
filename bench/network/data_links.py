"""Measures data links: values of keys, asked for and given as between workers, compressed or not.

One layer above `links.py`: handshake, requests, payloads, and whatever `Config.compression` does. The values are
`measurements`: 64-bit numbers with some noise, which lz4 makes about half as large; or noise only, which nothing makes
smaller. Started as a module it is the side that holds the values.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import numpy as np
import uvloop

from zmqtasks.config import Config
from zmqtasks.ids import Key, new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, DataPool, DataServer, PeerInfo
from zmqtasks.protocol.ops import Introduction
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import serialize
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports import get_transport

from .figures import Burst, Figures, Plan, Quantiles, Trips
from .gil import holding_gil
from .placement import apart
from .processes import Child, live_with_parent, read_first_line
from .traffic import WAIT_S

_MODULE = f"{__package__}.data_links"
IN_FLIGHT = 4
"""Requests under way at the same time, as a worker with some tasks has them."""
CONTENTS = ("measurements", "noise")


class Holder(msgspec.Struct, kw_only=True):
    """What the process that holds the values is told."""

    address: str
    key: str
    """Of the cluster, in hexadecimal digits."""
    encryption: str
    compression: str
    sizes: tuple[int, ...]
    content: str
    hold_gil: bool


def can_compress() -> bool:
    """Whether data links of this version know compression."""
    return any(field.name == "compression" for field in dataclasses.fields(Config))


def measure_data(scheme: str, encrypted: bool, compression: str, content: str, plan: Plan) -> Figures:
    """One round: round trips of small values, and bandwidth in bytes of the values, however few travel."""
    settings = {"encryption": "on" if encrypted else "off", "compression": compression, "content": content}
    figures = Figures(f"{scheme} data links", dict(settings))
    with holding_gil(plan.hold_gil):
        uvloop.run(_measure(scheme, settings, plan, figures))
    return figures


def _config(compression: str) -> Config:
    changes: dict[str, Any] = {"compression": compression} if can_compress() else {}
    return dataclasses.replace(Config(), **changes)


async def _measure(scheme: str, settings: dict[str, str], plan: Plan, figures: Figures) -> None:
    key = ClusterKey.generate()
    holder = Holder(
        address=f"{scheme}://127.0.0.1:0" if get_transport(scheme).capabilities.uses_ip else f"{scheme}://",
        key=key.hex(),
        encryption=settings["encryption"],
        compression=settings["compression"],
        sizes=(*plan.latency_sizes, *plan.sizes),
        content=settings["content"],
        hold_gil=plan.hold_gil,
    )
    with Child(_MODULE, first_line=msgspec.json.encode(holder).decode()) as child:
        address = await asyncio.to_thread(child.read_line)
        security = Security(key, holder.encryption)
        config = _config(holder.compression)
        pool = DataPool(security=security, config=config, instance_id=new_instance_id(), name="asks")
        try:
            with apart():
                for size in plan.latency_sizes:
                    figures.latency_us[size] = await _round_trips(pool, address, size, plan)
            for size in plan.sizes:
                figures.bandwidth[size] = (await _bandwidth(pool, address, size, plan.time_s)).bandwidth
        finally:
            await pool.close()


async def _get(pool: DataPool, address: str, size: int) -> None:
    async with asyncio.timeout(WAIT_S):
        fetched = await pool.get(address, [size])
    if size not in fetched.values:
        raise RuntimeError(f"a value of {size} bytes did not come: {fetched.failed or fetched.missing}")


async def _get_each(pool: DataPool, address: str, size: int, turns: Iterator[int]) -> None:
    for _ in turns:
        await _get(pool, address, size)


async def _round_trips(pool: DataPool, address: str, size: int, plan: Plan) -> Quantiles:
    trips = Trips(plan.round_trips, plan.latency_s(size))
    while trips.going:
        trips.began()
        await _get(pool, address, size)
        trips.ended()
    return trips.quantiles


async def _bandwidth(pool: DataPool, address: str, size: int, time_s: float) -> Burst:
    burst = Burst(size, time_s)
    while burst.going:
        left = iter(range(burst.count))

        burst.began()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(IN_FLIGHT, burst.count)):
                group.create_task(_get_each(pool, address, size, left))
        burst.ended()
    return burst


def value(size: int, content: str) -> Payload:
    """A value of about `size` bytes."""
    random = np.random.default_rng(size)
    if content == "noise" or size < 8:
        return serialize(random.integers(0, 256, size, np.uint8))
    count = size // 8
    made = np.arange(count, dtype=np.int64)
    made += random.integers(0, 1 << 16, min(count, 1 << 20)).repeat(-(-count // (1 << 20)))[:count]
    return serialize(made)


@contextlib.asynccontextmanager
async def _listening(holder: Holder) -> AsyncIterator[str]:
    values: dict[Key, Payload] = {size: value(size, holder.content) for size in holder.sizes}
    server = DataServer(lambda keys: ((key, values.get(key)) for key in keys), lambda items: None)

    def admit(introduction: Introduction, peer: PeerInfo) -> Admission:
        return Admission(data_handler=server)

    security = Security(ClusterKey.from_hex(holder.key), holder.encryption)
    acceptor = Acceptor(
        security=security, config=_config(holder.compression), epoch=1, instance_id=new_instance_id(), admit=admit
    )
    try:
        yield await acceptor.listen(holder.address)
    finally:
        await acceptor.close()
        await server.close()


async def _hold(holder: Holder) -> None:
    async with _listening(holder) as address:
        print(address, flush=True)
        await asyncio.get_running_loop().create_future()  # until the parent goes


def main() -> None:
    """Holds values until standard input ends."""
    holder = msgspec.json.decode(read_first_line(), type=Holder)
    live_with_parent()
    with holding_gil(holder.hold_gil):
        uvloop.run(_hold(holder))


if __name__ == "__main__":
    main()
