"""How fast a link is: `python -m bench.links [--json FILE]`, for each built-in transport, between two processes of this host.

Round trip: a message of 100 bytes that the other process sends back, one at a time. Bandwidth: messages of 64 MiB, each
acknowledged by a small one. Medians of all rounds. Transports that encrypt are measured both ways (`tcp-encrypted`).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import time

import uvloop
from rich.console import Console
from rich.table import Table

from bench.tasks.machine import facts
from zmqtasks.protocol.frames import DATA_LIMITS, MIB
from zmqtasks.testing.conformance_base import ENCRYPTED
from zmqtasks.transports import Comm, LinkSettings, connect, get_transport, listen

TRANSPORTS = ("tcp", "tcp-encrypted", "unix", "zmq", "zmq-encrypted")
"""Not inproc, which does not leave the process."""

SETTINGS = LinkSettings(limits=DATA_LIMITS)
SMALL, ROUND_TRIPS, WARM_UP = 100, 5000, 500
LARGE, LARGE_MESSAGES = 64 * MIB, 12


class Caller:
    """Sends one message after the other, the next when the answer has come, and notes how long each took."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        comm.start(self)

    async def times_s(self, size: int, count: int) -> list[float]:
        """Seconds from sending to the answer, for each of `count` messages."""
        self.message, self.left, self.times = bytearray(size), count, list[float]()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._send()
        async with asyncio.timeout(120):
            await self.done
        return self.times

    def _send(self) -> None:
        self.began = time.perf_counter()
        self.comm.send([self.message])

    def message_received(self, frames: list[memoryview]) -> None:
        self.times.append(time.perf_counter() - self.began)
        self.left -= 1
        if self.left:
            self._send()
        else:
            self.done.set_result(None)

    def comm_ended(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Answerer:
    """Sends small messages back, and answers large ones by a small one, until the link ends."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        self.comm.send(frames if frames[0].nbytes <= SMALL else [b"got it"])

    def comm_ended(self, error: Exception) -> None:
        self.ended.set_result(None)


async def answer(address: str, settings: LinkSettings) -> None:
    """The other process."""
    comm = await connect(address, settings)
    await Answerer(comm).ended
    await comm.close()


async def measure(name: str) -> dict[str, object]:
    """One row of the table."""
    scheme, _, encrypted = name.partition("-")
    settings = dataclasses.replace(SETTINGS, encryption=ENCRYPTED) if encrypted else SETTINGS
    arrivals: asyncio.Queue[Comm] = asyncio.Queue()
    uses_ip = get_transport(scheme).capabilities.uses_ip
    listener = await listen(f"{scheme}://127.0.0.1:0" if uses_ip else f"{scheme}://", arrivals.put_nowait, settings)
    command = [sys.executable, "-m", "bench.links", "--answer", listener.address, "--transports", name]
    other = await asyncio.create_subprocess_exec(*command)
    async with asyncio.timeout(30):
        caller = Caller(await arrivals.get())
    trips = (await caller.times_s(SMALL, WARM_UP + ROUND_TRIPS))[WARM_UP:]
    loads = (await caller.times_s(LARGE, LARGE_MESSAGES + 2))[2:]
    await caller.comm.close()
    await other.wait()
    await listener.close()
    return {
        "transport": name,
        "round_trip_us": round(statistics.median(trips) * 1e6, 1),
        "round_trip_p99_us": round(statistics.quantiles(trips, n=100)[98] * 1e6, 1),
        "bandwidth_gb_per_s": round(LARGE / statistics.median(loads) / 1e9, 2),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write machine facts and rows")
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        encrypted = options.transports[0].endswith("-encrypted")
        uvloop.run(
            answer(options.answer, dataclasses.replace(SETTINGS, encryption=ENCRYPTED) if encrypted else SETTINGS)
        )
        return
    rows = [uvloop.run(measure(scheme)) for scheme in options.transports]
    table = Table("transport", "round trip, 100 B", "99 % within", "bandwidth, 64 MiB")
    for row in rows:
        trip, tail = row["round_trip_us"], row["round_trip_p99_us"]
        table.add_row(str(row["transport"]), f"{trip} us", f"{tail} us", f"{row['bandwidth_gb_per_s']} GB/s")
    Console().print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({"machine": facts(), "rows": rows}, stream, indent=1)


if __name__ == "__main__":
    main()
