"""What both ends of a measured link of ours say to each other: the first byte of a message tells what to do with it."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

from zmqtasks.transports.base import Comm

from .figures import MIB, Burst, Quantiles, Trips

SWALLOW, LAST, ECHO, SOURCE, ANSWER, SOURCED, READ = range(7)
"""Let go of it; the last of a burst, answer it; send it back; send a burst yourself; that answer; the end of that burst;
copy it and answer."""

_SOURCE = struct.Struct("<BQQ")
WAIT_S = 120.0
"""For an answer; far more than any takes, so that nothing hangs."""
_DRAIN_EVERY_BYTES = 64 << 10


def filled(size_bytes: int, first: int) -> bytearray:
    """Memory whose pages are all there and whose content does not compress; the first byte says what to do with it."""
    memory = bytearray(size_bytes)
    block = os.urandom(min(size_bytes, MIB))
    for start in range(0, size_bytes, MIB):
        part = min(MIB, size_bytes - start)
        memory[start : start + part] = block[:part]
    memory[0] = first
    return memory


def messages(size_bytes: int, frames: int = 1) -> tuple[list[bytearray], list[bytearray]]:
    """A message to swallow, of `frames` frames of `size_bytes`, and one like it that ends a burst."""
    message = [filled(size_bytes, SWALLOW)] * frames
    return message, [filled(size_bytes, LAST), *message[1:]]


async def send_burst(comm: Comm, message: list[bytearray], last: list[bytearray], count: int) -> None:
    """Sends `count` messages, the last of them `last`, as fast as they drain."""
    every = max(1, _DRAIN_EVERY_BYTES // sum(len(frame) for frame in message))
    for number in range(1, count):
        comm.send(message)
        if number % every == 0:
            await comm.drain()
    comm.send(last)
    await comm.drain()


class Answerer:
    """The other end: does what each message says, until the link ends."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._sources: set[asyncio.Task[None]] = set()
        self._copy: Any = None
        self._messages: dict[int, tuple[list[bytearray], list[bytearray]]] = {}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        kind = frames[0][0]
        if kind == SWALLOW:
            return
        if kind == ECHO:
            self.comm.send(frames)
        elif kind == LAST:
            self.comm.send([bytes([ANSWER])])
        elif kind == READ:
            self._read(frames[0])
        elif kind == SOURCE:
            _, size, count = _SOURCE.unpack(frames[0])
            task = asyncio.get_running_loop().create_task(self._send(size, count))
            self._sources.add(task)
            task.add_done_callback(self._sources.discard)

    def _read(self, frame: memoryview) -> None:
        import numpy as np

        if self._copy is None or len(self._copy) != len(frame):
            self._copy = np.zeros(len(frame), np.uint8)
        np.copyto(self._copy, np.frombuffer(frame, np.uint8))
        self.comm.send([bytes([ANSWER])])

    def comm_ended(self, error: Exception) -> None:
        for task in self._sources:
            task.cancel()
        self.ended.set_result(None)

    async def _send(self, size: int, count: int) -> None:
        if size not in self._messages:  # made once: it takes longer than sending some
            self._messages[size] = ([filled(size, SWALLOW)], [filled(size, SOURCED)])
        message, last = self._messages[size]
        await send_burst(self.comm, message, last, count)


class Caller:
    """This end: measures one thing at a time."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._expected: dict[int, asyncio.Future[None]] = {}
        self._trips = Trips(0, 0.0)
        self._message: list[bytearray] = []
        comm.start(self)

    async def round_trips(self, size: int, count: int, time_s: float) -> Quantiles:
        """Round trips as `Trips` has it."""
        self._message = [filled(size, ECHO)]
        self._trips = Trips(count, time_s)
        done = self._expect(ECHO)
        self._trips.began()
        self.comm.send(self._message)
        await _in_time(done)
        return self._trips.quantiles

    async def bandwidth(self, size: int, time_s: float, frames: int = 1) -> Burst:
        """Bursts of messages of `frames` frames of `size` bytes each."""
        message, last = messages(size, frames)
        burst = Burst(size * frames, time_s)
        while burst.going:
            burst.began()
            await self.send(message, last, burst.count)
            burst.ended()
        return burst

    async def read(self, size: int, time_s: float) -> Burst:
        """Messages in memory of the transport, one at a time: the other end answers each when it has copied it."""
        memory = self.comm.allocate(size)
        memory[:] = filled(size, READ)
        burst = Burst(size, time_s)
        while burst.going:
            burst.began()
            for _ in range(burst.count):
                answered = self._expect(ANSWER)
                self.comm.send([memory])
                await _in_time(answered)
            burst.ended()
        return burst

    async def send(self, message: list[bytearray], last: list[bytearray], count: int) -> None:
        """Sends a burst and waits for its answer."""
        answered = self._expect(ANSWER)
        await asyncio.wait_for(send_burst(self.comm, message, last, count), WAIT_S)
        await _in_time(answered)

    async def receive(self, size: int, count: int) -> None:
        """Has the other end send a burst and waits for its last message."""
        sourced = self._expect(SOURCED)
        self.comm.send([_SOURCE.pack(SOURCE, size, count)])
        await _in_time(sourced)

    def message_received(self, frames: list[memoryview]) -> None:
        kind = frames[0][0]
        if kind == SWALLOW:
            return
        if kind == ECHO:
            self._trips.ended()
            if self._trips.going:
                self._trips.began()
                self.comm.send(self._message)
                return
        expected = self._expected.pop(kind, None)
        if expected is not None and not expected.done():
            expected.set_result(None)

    def comm_ended(self, error: Exception) -> None:
        for expected in self._expected.values():
            if not expected.done():
                expected.set_exception(error)
        self._expected.clear()

    def _expect(self, kind: int) -> asyncio.Future[None]:
        if self.comm.ended is not None:
            raise self.comm.ended
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._expected[kind] = made
        return made


async def _in_time(answer: asyncio.Future[None]) -> None:
    async with asyncio.timeout(WAIT_S):
        await answer
