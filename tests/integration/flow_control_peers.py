"""Processes that stop: `python flow_control_peers.py ROLE SCHEDULER_OR_WORKER_ADDRESS KEY_HEX`, see each role.

A role prints one line, stops itself by SIGSTOP when it has much to come, and goes on when it gets SIGCONT.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import numpy as np

from zmqtasks import Client, Config, wait
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import DataPool
from zmqtasks.protocol.serialize import deserialize
from zmqtasks.security import ClusterKey, Security


async def fetch(address: str, security: Security, keys: list[str]) -> int:
    """Asks for many large values at once, and stops with the answers on their way; gives the bytes that came."""
    pool = DataPool(security=security, config=Config(), instance_id=new_instance_id(), name="stopped")
    answers = [asyncio.create_task(pool.get(address, [key])) for key in keys]
    while pool.received_bytes < 100_000:
        await asyncio.sleep(0.001)
    os.kill(os.getpid(), signal.SIGSTOP)
    total = 0
    for answer in answers:
        fetched = await answer
        total += sum(len(deserialize(payload)) for payload in fetched.values.values())
    await pool.close()
    return total


def make_bytes(number: int, size: int) -> bytes:
    """A result that travels with the notice of its end."""
    return number.to_bytes(8, "big") * (size // 8)


def submit(address: str, security: Security, count: int, size: int) -> int:
    """Submits many tasks with small results, stops, and asks for all the results later; gives how many were right."""
    with Client(address, security=security) as client:
        futures = client.map(make_bytes, range(count), [size] * count)
        while client.scheduler_info()["counters"]["submitted"] < count:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
        return sum(value == make_bytes(i, size) for i, value in enumerate(client.gather(futures)))


def scatter(address: str, security: Security, worker: str, count: int, size: int) -> int:
    """Gives a worker that is stopped many arrays; prints the memory that took beyond theirs, then waits for the end."""
    arrays = [np.full(size, number, np.uint8) for number in range(count)]
    with Client(address, security=security) as client:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        base = peak_bytes()
        print("scattering", flush=True)
        futures = client.scatter(arrays, workers=[worker], timeout=60)
        wait(futures)
        return peak_bytes() - base


def peak_bytes() -> int:
    """The most memory that this process had."""
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


if __name__ == "__main__":
    role, where, key, *rest = sys.argv[1:]
    secured = Security(ClusterKey.from_hex(key))
    if role == "fetch":
        print(asyncio.run(fetch(where, secured, rest)), flush=True)
    elif role == "submit":
        print(submit(where, secured, int(rest[0]), int(rest[1])), flush=True)
    else:
        print(scatter(where, secured, rest[0], int(rest[1]), int(rest[2])), flush=True)
