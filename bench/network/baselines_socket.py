"""The baselines of links by sockets: a raw connection between two processes, in Python: TCP over loopback, or a unix socket.

- *Bandwidth and rates* (`bandwidth`): blocking sockets. The sender calls `sendall` for each message, the receiver
  `recv_into` one warm buffer of the message's size: no allocation, no framing, no event loop.
- *Round trips* (`round_trips_evented`): both ends wait in uvloop's epoll, and a protocol answers what comes by
  `transport.write`: the same wake-ups as a node has, and nothing else. `round_trips_blocking`, where the thread sleeps in
  `recv`, is in the settings as `blocking_round_trip_us`: what the kernel alone takes.
- *Fan-in, fan-out, both directions at once, connecting*: `baselines_fans`.

`python -m bench.network.baselines_socket` measures tcp and this baseline in turns, and prints ratios.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections.abc import Iterator
from typing import cast

import uvloop

from . import baselines_fans
from .figures import KIB, MIB, SMALL_BYTES, Burst, Figures, Plan, Quantiles, Trips
from .gil import holding_gil
from .placement import apart
from .processes import Child, live_with_parent, read_first_line
from .raw_sockets import accept, address_of, connect, receive, serve
from .traffic import WAIT_S
from .turns import BANDWIDTH, LATENCY, each_in_turn

_COMMAND = struct.Struct("<QQ")  # size of a message, how many; none: echo messages of that size
_PIECE_BYTES = 256 * KIB
"""Messages from this on go by themselves; smaller ones too, but the receiver takes what has come of them."""


def measure(plan: Plan) -> Figures:
    """One round of the baseline of tcp."""
    return _measure("tcp", plan)


def measure_unix(plan: Plan) -> Figures:
    """One round of the baseline of unix."""
    return _measure("unix", plan)


def _measure(scheme: str, plan: Plan) -> Figures:
    figures = Figures(f"raw {scheme} socket")
    with holding_gil(plan.hold_gil):
        for size in each_in_turn(LATENCY, plan.latency_sizes):
            with _connection(scheme, "evented", plan.hold_gil, size) as sock, apart():
                figures.latency_us[size] = round_trips_evented(sock, size, plan.round_trips, plan.latency_s(size))
        with _connection(scheme, "blocking", plan.hold_gil) as sock:
            for size in each_in_turn(BANDWIDTH, plan.sizes):
                figures.bandwidth[size] = bandwidth(sock, size, plan.time_s).bandwidth
            if "messages_per_s" in plan.rates:
                figures.rates["messages_per_s"] = bandwidth(sock, SMALL_BYTES, plan.time_s).messages_per_s
            with apart():
                blocking = round_trips_blocking(sock, plan.latency_sizes[0], plan.round_trips, plan.time_s)
            figures.settings["blocking_round_trip_us"] = blocking.p50
        figures.rates.update(baselines_fans.rates(scheme, plan))
    return figures


def bandwidth(sock: socket.socket, size: int, time_s: float) -> Burst:
    """Bursts of messages of `size` bytes from one buffer, to the other end of a `blocking` connection."""
    message = bytearray(b"\xa5") * size
    burst = Burst(size, time_s)
    while burst.going:
        burst.began()
        sock.sendall(_COMMAND.pack(size, burst.count))
        for _ in range(burst.count):
            sock.sendall(message)
        if sock.recv(1) != b"!":
            raise ConnectionError("the other end of the raw socket is gone")
        burst.ended()
    return burst


def round_trips_blocking(sock: socket.socket, size: int, count: int, time_s: float) -> Quantiles:
    """Round trips on a `blocking` connection: both threads sleep in `recv`."""
    message = bytearray(b"\xa5") * size
    answer = memoryview(bytearray(size))
    trips = Trips(count, time_s)
    sock.sendall(_COMMAND.pack(size, 0))
    while trips.going:
        trips.began()
        sock.sendall(message)
        receive(sock, answer)
        trips.ended()
    sock.shutdown(socket.SHUT_WR)  # the other end echoes for as long as it lasts
    return trips.quantiles


def round_trips_evented(sock: socket.socket, size: int, count: int, time_s: float) -> Quantiles:
    """Round trips on an `evented` connection: both ends wait in uvloop's epoll."""
    return uvloop.run(_ping(sock, size, Trips(count, time_s))).quantiles


class _Ping(asyncio.Protocol):
    def __init__(self, size: int, trips: Trips) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trips = trips
        self._message = b"\xa5" * size
        self._missing = size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._trips.began()
        self._transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing:
            return
        self._trips.ended()
        if self._trips.going:
            self._missing = len(self._message)
            self._trips.began()
            self._transport.write(self._message)
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the other end of the raw socket is gone"))


async def _ping(sock: socket.socket, size: int, trips: Trips) -> Trips:
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, ping = await loop.connect_accepted_socket(lambda: _Ping(size, trips), sock.dup())
    try:
        async with asyncio.timeout(WAIT_S):
            await ping.done
            return trips
    finally:
        transport.close()


class _Pong(asyncio.Protocol):
    """Sends whole messages back."""

    def __init__(self, size: int) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._size = size
        self._parts: list[bytes] = []
        self._missing = size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        self._parts.append(data)
        if not self._missing:
            self._transport.write(b"".join(self._parts) if len(self._parts) > 1 else data)
            self._parts.clear()
            self._missing = self._size

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


@contextlib.contextmanager
def _connection(scheme: str, mode: str, hold_gil: bool, size: int = 0) -> Iterator[socket.socket]:
    """A connection to a process of its own that answers in the way of `mode`."""
    with serve(scheme) as server:
        call = json.dumps({"address": address_of(server), "mode": mode, "hold_gil": hold_gil, "size": size})
        with (
            Child("bench.network.baselines_socket" if __name__ == "__main__" else __name__, "answer", first_line=call),
            accept(server) as sock,
        ):
            yield sock


def _answer_blocking(sock: socket.socket) -> None:
    command = memoryview(bytearray(_COMMAND.size))
    memory = memoryview(b"")
    while receive(sock, command):
        size, count = _COMMAND.unpack(command)
        room = size if size >= _PIECE_BYTES or not count else _PIECE_BYTES
        if len(memory) != room:
            memory = memoryview(bytearray(room))
        if not count:
            while receive(sock, memory):
                sock.sendall(memory)
            return
        left = size * count
        while left:
            received = sock.recv_into(memory[: min(left, room)])
            if not received:
                return
            left -= received
        sock.sendall(b"!")


async def _answer_evented(sock: socket.socket, size: int) -> None:
    sock.setblocking(False)
    _, pong = await asyncio.get_running_loop().connect_accepted_socket(lambda: _Pong(size), sock)
    await pong.lost


def _answer() -> None:
    call = json.loads(read_first_line())
    live_with_parent()
    with holding_gil(call["hold_gil"]), connect(call["address"]) as sock:
        if call["mode"] == "blocking":
            _answer_blocking(sock)
        else:
            uvloop.run(_answer_evented(sock, call["size"]))


def _compare() -> None:
    from .against import compare_with_raw

    compare_with_raw("tcp", "baselines_socket", (MIB, 64 * MIB, 256 * MIB))


if __name__ == "__main__":
    _answer() if sys.argv[1:] == ["answer"] else _compare()
