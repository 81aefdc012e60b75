"""What a channel has sent and its peer has not acknowledged: kept, as the bytes that were sent, to go out again later."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator

from zmqtasks.errors import RemoteProtocolError


class Replay:
    """Batches in the order of their numbers, which begin at 1; any thread may `append`, under its channel's lock."""

    __slots__ = ("_batches", "_drainers", "_loop", "_low_water_bytes", "_over", "acked", "nbytes", "seq")

    def __init__(self, loop: asyncio.AbstractEventLoop, low_water_bytes: int) -> None:
        self._loop = loop
        self._low_water_bytes = low_water_bytes
        self._batches: deque[bytes] = deque()  # acked + 1 .. seq
        self._drainers: list[asyncio.Future[None]] = []
        self._over = False
        self.seq = 0
        """Number of the last batch."""
        self.acked = 0
        """Number of the last batch that the peer has."""
        self.nbytes = 0
        """Size of those that it has not acknowledged."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._batches)

    def append(self, data: bytes) -> None:
        """Keeps the next batch."""
        self.seq += 1
        self._batches.append(data)
        self.nbytes += len(data)

    def check(self, ack: int) -> None:
        """Raises RemoteProtocolError when the peer cannot have acknowledged that batch now."""
        if ack > self.seq or ack < self.acked:
            raise RemoteProtocolError(
                f"the peer acknowledges batch {ack}; sent are {self.seq}, acknowledged {self.acked}"
            )

    def acknowledged(self, ack: int) -> None:
        """Forgets batches that the peer has; under the channel's lock."""
        batches = self._batches
        if self._over:
            return
        for _ in range(ack - self.acked):
            self.nbytes -= len(batches.popleft())
        self.acked = ack
        if self._drainers and self.nbytes <= self._low_water_bytes:
            self._wake_drainers()

    async def drain(self) -> None:
        """Waits until little is left, or the end."""
        while self.nbytes > self._low_water_bytes and not self._over:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._drainers.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._drainers:
                    self._drainers.remove(waiter)

    def end(self) -> None:
        """Nothing goes out any more."""
        self._over = True
        self._batches.clear()
        self._wake_drainers()

    def _wake_drainers(self) -> None:
        drainers, self._drainers = self._drainers, []
        for waiter in drainers:
            if not waiter.done():
                waiter.set_result(None)
