"""The baselines of the zmq transport: raw pyzmq over loopback TCP between two processes.

- *Bandwidth and rates* (`bandwidth`): PUSH to PULL, blocking, a message in parts of `PART_BYTES` that are sent without a
  copy; the receiver copies each part to its place in one warm buffer, as whoever wants the message in one piece must. This is
  the best of the patterns that `python -m bench.network.baselines_zmq` tries.
- *Round trips* (`round_trips_evented`): DEALER to DEALER; both ends wait in uvloop's epoll for libzmq's descriptor and read
  until there is no more: the same wake-ups as a node has, and nothing else. `round_trips_blocking`, where the thread sleeps
  in `recv`, is in the settings as `blocking_round_trip_us`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvloop
import zmq

from .figures import KIB, MIB, SMALL_BYTES, Burst, Figures, Plan, Quantiles, Trips
from .gil import holding_gil
from .placement import apart
from .processes import START_TIMEOUT_S, Child, live_with_parent, read_first_line
from .traffic import WAIT_S
from .turns import BANDWIDTH, LATENCY, each_in_turn

PART_BYTES = MIB
_WAITING_PARTS = 64


def measure(plan: Plan) -> Figures:
    """One round of the baseline."""
    figures = Figures("raw pyzmq")
    with holding_gil(plan.hold_gil):
        for size in each_in_turn(LATENCY, plan.latency_sizes):
            with _ends("evented", plan.hold_gil) as (sock, _), apart():
                figures.latency_us[size] = round_trips_evented(sock, size, plan.round_trips, plan.latency_s(size))
        for size in each_in_turn(BANDWIDTH, plan.sizes):
            with _ends("sink", plan.hold_gil, size) as (send, receive):
                figures.bandwidth[size] = bandwidth(send, receive, size, plan.time_s).bandwidth
        if "messages_per_s" in plan.rates:
            with _ends("sink", plan.hold_gil, SMALL_BYTES) as (send, receive):
                burst = bandwidth(send, receive, SMALL_BYTES, plan.time_s)
                figures.rates["messages_per_s"] = burst.messages_per_s
        with _ends("echo", plan.hold_gil) as (sock, _), apart():
            blocking = round_trips_blocking(sock, plan.latency_sizes[0], plan.round_trips, plan.time_s)
            figures.settings["blocking_round_trip_us"] = blocking.p50
    return figures


def bandwidth(
    send: zmq.Socket[bytes],
    receive: zmq.Socket[bytes],
    size: int,
    time_s: float,
    part_bytes: int = PART_BYTES,
    copy: bool = False,
) -> Burst:
    """Bursts of messages of `size` bytes from one buffer, to a `sink` for messages of that size."""
    message = memoryview(bytearray(b"\xa5") * size)
    parts = [message[start : start + part_bytes] for start in range(0, size, part_bytes)]
    copy = copy or size < PART_BYTES // 4
    burst = Burst(size, time_s)
    while burst.going:
        burst.began()
        send.send(burst.count.to_bytes(8, "little"))
        for _ in range(burst.count):
            for part in parts:
                send.send(part, 0, copy)
        receive.recv()
        burst.ended()
    return burst


def round_trips_blocking(sock: zmq.Socket[bytes], size: int, count: int, time_s: float) -> Quantiles:
    """Round trips with an `echo`: both threads sleep in `recv`."""
    message = b"\xa5" * size
    trips = Trips(count, time_s)
    while trips.going:
        trips.began()
        sock.send(message)
        sock.recv()
        trips.ended()
    return trips.quantiles


def round_trips_evented(sock: zmq.Socket[bytes], size: int, count: int, time_s: float) -> Quantiles:
    """Round trips with an `evented` echo: both ends wait in uvloop's epoll."""
    return uvloop.run(_ping(sock, size, Trips(count, time_s))).quantiles


async def _ping(sock: zmq.Socket[bytes], size: int, trips: Trips) -> Trips:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    message = b"\xa5" * size

    def came(answer: bytes) -> None:
        trips.ended()
        if trips.going:
            trips.began()
            sock.send(message, zmq.DONTWAIT)
        elif not done.done():
            done.set_result(None)

    with _reading(sock, came):
        trips.began()
        sock.send(message)
        async with asyncio.timeout(WAIT_S):
            await done
    return trips


@contextlib.contextmanager
def _reading(sock: zmq.Socket[bytes], came: Callable[[bytes], None]) -> Iterator[None]:
    """Calls `came` with each message. The descriptor tells of changes only, and a send may swallow one: look again."""
    loop = asyncio.get_running_loop()
    descriptor: Any = sock.get(zmq.FD)

    def look() -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                came(sock.recv(zmq.DONTWAIT))

    loop.add_reader(descriptor, look)
    loop.call_soon(look)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


@contextlib.contextmanager
def _ends(
    mode: str, hold_gil: bool, size: int = 0, buffer_bytes: int = -1
) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """The socket to send by, and that by which answers come, of a process of its own that does what `mode` says.

    `buffer_bytes`: of the kernel's buffers; -1 leaves their size to the kernel.
    """
    with zmq.Context() as context:
        kinds = (zmq.PUSH, zmq.PULL) if mode == "sink" else (zmq.DEALER,)
        socks = [_socket(context, kind, buffer_bytes) for kind in kinds]
        ports = [sock.bind_to_random_port("tcp://127.0.0.1") for sock in socks]
        call = json.dumps({"ports": ports, "mode": mode, "hold_gil": hold_gil, "size": size, "buffer": buffer_bytes})
        try:
            with Child(
                "bench.network.baselines_zmq" if __name__ == "__main__" else __name__, "answer", first_line=call
            ):
                socks[-1].recv()  # it has started, and computes no more while others are measured
                yield socks[0], socks[-1]
        finally:
            for sock in socks:
                sock.close(linger=0)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, buffer_bytes: int) -> zmq.Socket[bytes]:
    sock = context.socket(kind)
    sock.set(zmq.SNDBUF, buffer_bytes)
    sock.set(zmq.RCVBUF, buffer_bytes)
    sock.set(zmq.SNDHWM, _WAITING_PARTS)
    sock.set(zmq.RCVHWM, _WAITING_PARTS)
    sock.set(zmq.RCVTIMEO, int(START_TIMEOUT_S * 1000))
    sock.set(zmq.SNDTIMEO, int(START_TIMEOUT_S * 1000))
    return sock


def _sink(receive: zmq.Socket[bytes], send: zmq.Socket[bytes], size: int) -> None:
    memory = memoryview(bytearray(size))
    while True:
        for _ in range(int.from_bytes(receive.recv(), "little")):
            filled = 0
            while filled < size:
                part = receive.recv(copy=False).buffer if size > KIB else receive.recv()
                memory[filled : filled + len(part)] = part
                filled += len(part)
        send.send(b"!")


async def _echo_evented(sock: zmq.Socket[bytes]) -> None:
    with _reading(sock, lambda message: sock.send(message, zmq.DONTWAIT)):
        await asyncio.get_running_loop().create_future()  # until the parent ends this process


def _answer() -> None:
    call = json.loads(read_first_line())
    live_with_parent()
    with holding_gil(call["hold_gil"]), zmq.Context() as context:
        kinds = (zmq.PULL, zmq.PUSH) if call["mode"] == "sink" else (zmq.DEALER,)
        socks = [_socket(context, kind, call["buffer"]) for kind in kinds]
        for sock, port in zip(socks, call["ports"], strict=True):
            sock.set(zmq.RCVTIMEO, -1)
            sock.connect(f"tcp://127.0.0.1:{port}")
        socks[-1].send(b"!")
        if call["mode"] == "sink":
            _sink(socks[0], socks[1], call["size"])
        elif call["mode"] == "echo":
            while True:
                socks[0].send(socks[0].recv())
        else:
            uvloop.run(_echo_evented(socks[0]))


def _compare() -> None:
    from .against import compare_with_raw

    size = 64 * MIB
    for part_bytes in (64 * KIB, 256 * KIB, MIB, 4 * MIB):
        with _ends("sink", False, size) as (send, receive):
            rates = [bandwidth(send, receive, size, 0.3, part_bytes, copy).bandwidth / 1e9 for copy in (True, False)]
        print(f"raw, parts of {part_bytes >> 10:5d} KiB: copied {rates[0]:.2f} GB/s, lent {rates[1]:.2f} GB/s")
    rates = []
    for buffer_bytes in (-1, 2 * MIB, -1, 2 * MIB, -1, 2 * MIB):
        with _ends("sink", False, size, buffer_bytes) as (send, receive):
            rates.append(bandwidth(send, receive, size, 0.3).bandwidth / 1e9)
    usual, wide = (" ".join(f"{rate:.2f}" for rate in rates[first::2]) for first in (0, 1))
    print(f"raw, the kernel's buffers as it likes, three times: {usual} GB/s; of 2 MiB: {wide} GB/s")
    compare_with_raw("zmq", "baselines_zmq")


if __name__ == "__main__":
    _answer() if sys.argv[1:] == ["answer"] else _compare()
