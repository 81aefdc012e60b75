"""The baseline of the ucx transport: raw ucxx between two processes, with the settings and transports that ours has.

- *Bandwidth and rates* (`bandwidth`): both ends ask UCX, and sleep when it has nothing to do: where processors are few, ends
  that poll only, as those of UCX's perftest do, take the time from each other. A message goes in the chunks of our transport,
  into one warm buffer of the message's size.
- *Round trips* (`round_trips_evented`): both ends wait in uvloop's epoll for the worker's descriptor: the same wake-ups as a
  node has, and nothing else. Those of ends that poll (`round_trips_polling`) are in the settings as `polling_round_trip_us`.

`python -m bench.network.baselines_ucx` measures ucx and this baseline in turn, and prints ratios; set UCX_TLS before.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import uvloop

from zmqtasks.transports.ucx import library
from zmqtasks.transports.ucx.wire import chunks

from .figures import SMALL_BYTES, Burst, Figures, Plan, Quantiles, Trips
from .gil import holding_gil
from .placement import apart
from .processes import START_TIMEOUT_S, Child, MeasuringError, live_with_parent, read_first_line
from .traffic import WAIT_S
from .turns import BANDWIDTH, LATENCY, each_in_turn

_COMMAND = struct.Struct("<QQ")  # size of a message, how many; none: echo messages of that size
_THERE, _BACK = 1, 2
_IN_FLIGHT = 4
_SMALL_IN_FLIGHT = 64
_LOOK_MS = 100
"""The longest sleep, in case a wake-up of UCX does not come."""


class _End:
    """A worker of UCX and its endpoint to the other process."""

    def __init__(self) -> None:
        context = library.load()
        from ucxx._lib import arr, libucxx

        self._array = arr.Array
        self._lib = libucxx
        with library.environment():
            self.worker = libucxx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self.worker.init_blocking_progress_mode()
        self.address = bytes(libucxx.UCXAddress.create_from_worker(self.worker))
        self._endpoint: Any = None
        self.sleeps = True
        self._poll = select.poll()
        self._poll.register(self.worker.epoll_file_descriptor, select.POLLIN)

    def connect(self, address: bytes) -> None:
        """To the worker of that address."""
        made = self._lib.UCXAddress.create_from_buffer(address)
        self._endpoint = self._lib.UCXEndpoint.create_from_worker_address(self.worker, made, True)

    def send(self, data: Any, tag: int) -> Any:
        """The request of a send."""
        return self._endpoint.tag_send(self._array(data), self._lib.UCXXTag(tag))

    def receive(self, memory: Any, tag: int) -> Any:
        """The request of a receive into `memory`."""
        return self._endpoint.tag_recv(self._array(memory), self._lib.UCXXTag(tag))

    def wait(self, request: Any, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when `request` is done; MeasuringError when it never is. Polls, or (`sleeps`) waits for the descriptor."""
        end = time.perf_counter() + timeout_s
        while not request.completed:
            moved = self.worker.progress_once()  # `progress` is done when all that is under way is: slower
            if self.sleeps and not moved and not request.completed and self.worker.arm():
                self._poll.poll(_LOOK_MS)
            if time.perf_counter() > end:
                raise MeasuringError(f"raw ucxx: nothing came for {timeout_s:.0f} s")
        request.check_error()

    def close(self) -> None:
        """Ends endpoint and worker."""
        if self._endpoint is not None:
            self._endpoint.close_blocking()
        self._endpoint = self.worker = None
        gc.collect()


def measure(plan: Plan) -> Figures:
    """One round of the baseline."""
    figures = Figures("raw ucxx")
    with holding_gil(plan.hold_gil):
        for size in each_in_turn(LATENCY, plan.latency_sizes):
            with _ends("evented", plan.hold_gil, size) as end, apart():
                figures.latency_us[size] = round_trips_evented(end, size, plan.round_trips, plan.latency_s(size))
        with _ends("blocking", plan.hold_gil) as end:
            figures.settings["transports"] = ",".join(sorted(library.active_transports()))
            for size in each_in_turn(BANDWIDTH, plan.sizes):
                figures.bandwidth[size] = bandwidth(end, size, plan.time_s).bandwidth
            if "messages_per_s" in plan.rates:
                figures.rates["messages_per_s"] = bandwidth(end, SMALL_BYTES, plan.time_s).messages_per_s
            with apart():
                polling = round_trips_polling(end, plan.latency_sizes[0], plan.round_trips, plan.time_s)
            figures.settings["polling_round_trip_us"] = polling.p50
    return figures


def bandwidth(end: _End, size: int, time_s: float) -> Burst:
    """Bursts of messages of `size` bytes from one buffer."""
    parts = chunks(memoryview(bytearray(b"\xa5") * size))
    burst = Burst(size, time_s)
    answer = bytearray(1)
    while burst.going:
        burst.began()
        end.wait(end.send(_COMMAND.pack(size, burst.count), _THERE))
        answered = end.receive(answer, _BACK)
        _flow(end, lambda part: end.send(part, _THERE), parts, burst.count, size)
        end.wait(answered)
        burst.ended()
    return burst


def _flow(end: _End, start: Callable[[Any], Any], parts: list[memoryview], count: int, size: int) -> None:
    """Transfers `parts` so many times, some at the same time."""
    in_flight = _IN_FLIGHT if size > SMALL_BYTES else _SMALL_IN_FLIGHT
    waiting: deque[Any] = deque()
    for _ in range(count):
        for part in parts:
            if len(waiting) == in_flight:
                end.wait(waiting.popleft())
            waiting.append(start(part))
    while waiting:
        end.wait(waiting.popleft())


def round_trips_polling(end: _End, size: int, count: int, time_s: float) -> Quantiles:
    """Round trips of two ends that poll."""
    end.sleeps = False
    message, answer = bytearray(b"\xa5") * size, bytearray(size)
    end.wait(end.send(_COMMAND.pack(size, 0), _THERE))
    trips = Trips(count, time_s, takes_turns=False)  # the other end would poll while others are measured
    while trips.going:
        trips.began()
        answered = end.receive(answer, _BACK)
        sent = end.send(message, _THERE)
        end.wait(answered)
        end.wait(sent)
        trips.ended()
    return trips.quantiles


def round_trips_evented(end: _End, size: int, count: int, time_s: float) -> Quantiles:
    """Round trips with an `evented` end: both wait in uvloop's epoll."""
    return uvloop.run(_ping(end, size, Trips(count, time_s))).quantiles


async def _ping(end: _End, size: int, trips: Trips) -> Trips:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    message = bytearray(b"\xa5") * size
    sent: Any = None

    def came() -> None:
        nonlocal sent
        if sent is not None:  # else the other end has said that it is ready
            trips.ended()
        if trips.going:
            trips.began()
            sent = end.send(message, _THERE)
        elif not done.done():
            done.set_result(None)

    with _reading(end, size, _BACK, came):
        async with asyncio.timeout(WAIT_S):
            await done
    return trips


@contextlib.contextmanager
def _reading(end: _End, size: int, tag: int, came: Callable[[], None]) -> Iterator[None]:
    """Calls `came` for each message."""
    loop = asyncio.get_running_loop()
    memory = bytearray(size)
    request = end.receive(memory, tag)

    def look() -> None:
        nonlocal request
        while True:
            end.worker.progress()
            while request.completed:
                request.check_error()
                request = end.receive(memory, tag)
                came()
            if end.worker.arm():
                return

    loop.add_reader(end.worker.epoll_file_descriptor, look)
    loop.call_soon(look)
    try:
        yield
    finally:
        loop.remove_reader(end.worker.epoll_file_descriptor)


@contextlib.contextmanager
def _ends(mode: str, hold_gil: bool, size: int = 0) -> Iterator[_End]:
    """This end of a link to a process of its own that does what `mode` says."""
    end = _End()
    call = json.dumps({"address": end.address.hex(), "mode": mode, "hold_gil": hold_gil, "size": size})
    module = "bench.network.baselines_ucx" if __name__ == "__main__" else __name__
    try:
        with Child(module, "answer", first_line=call) as child:
            line = ""
            while not line.startswith("address "):  # UCX logs to standard output too
                line = child.read_line()
            end.connect(bytes.fromhex(line.split()[1]))
            yield end
    finally:
        end.close()


def _swallow(end: _End) -> None:
    """Swallows bursts, and then echoes."""
    memory = bytearray(0)
    while True:
        command = bytearray(_COMMAND.size)
        end.wait(end.receive(command, _THERE), 600)
        size, count = _COMMAND.unpack(command)
        if len(memory) != size:
            memory = bytearray(size)
        if count:
            _flow(end, lambda part: end.receive(part, _THERE), chunks(memoryview(memory)), count, size)
            end.wait(end.send(b"!", _BACK))
        end.sleeps = count > 0
        while not count:
            end.wait(end.receive(memory, _THERE), 600)
            end.wait(end.send(memory, _BACK))


async def _echo(end: _End, size: int) -> None:
    message = bytearray(b"\xa5") * size
    sent: deque[Any] = deque(maxlen=2)
    sent.append(end.send(message, _BACK))  # this end is there
    with _reading(end, size, _THERE, lambda: sent.append(end.send(message, _BACK))):
        await asyncio.get_running_loop().create_future()  # until the parent ends this process


def _answer() -> None:
    call = json.loads(read_first_line())
    live_with_parent()
    end = _End()
    end.connect(bytes.fromhex(call["address"]))
    print("address", end.address.hex(), flush=True)
    with holding_gil(call["hold_gil"]):
        if call["mode"] == "blocking":
            _swallow(end)
        else:
            uvloop.run(_echo(end, call["size"]))


def _compare() -> None:
    from .against import compare_with_raw

    library.load()
    print("UCX has", ", ".join(sorted(library.active_transports())))
    compare_with_raw("ucx", "baselines_ucx")


if __name__ == "__main__":
    _answer() if sys.argv[1:] == ["answer"] else _compare()
