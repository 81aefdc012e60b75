"""What a channel has received, and when it tells the peer so, which then forgets it.

Acknowledgements ride on batches that go the other way. A receiver that has nothing to send acknowledges for its own sake
after `ACK_BYTES`, or at the latest `ACK_DELAY_S` after a batch has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zmqtasks.protocol.frames import KIB

ACK_BYTES = 64 * KIB
ACK_MESSAGE_BYTES = 1 * KIB
"""What a batch counts for at least: an idle receiver acknowledges every 64 small ones."""
ACK_DELAY_S = 0.1


class Receipts:
    """Counts the batches that have come; calls `tell` when something has to go out for them alone."""

    __slots__ = ("_loop", "_soon", "_tell", "_timer", "_untold_bytes", "seq", "told_seq")

    def __init__(self, loop: asyncio.AbstractEventLoop, tell: Callable[[], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._untold_bytes = 0
        self.seq = 0
        """Number of the last batch received."""
        self.told_seq = 0
        """Number of the last batch that the peer was told of."""

    def received(self, size_bytes: int) -> None:
        """The next batch is here."""
        self.seq += 1
        self._untold_bytes += size_bytes + ACK_MESSAGE_BYTES
        if self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY_S, self._due)
        if self._untold_bytes > ACK_BYTES and not self._soon:
            # Not here: the handler's answer, which would carry it, is probably sent in this turn of the loop.
            self._soon = True
            self._loop.call_soon(self._tell_soon)

    def told(self, seq: int) -> None:
        """A message that goes out now says that `seq` was the last; any thread, under the channel's lock."""
        self.told_seq, self._untold_bytes = seq, 0

    def stop(self) -> None:
        """There is no link to tell it by."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._tell_soon()

    def _tell_soon(self) -> None:
        self._soon = False
        if self.told_seq != self.seq:  # no batch has told it meanwhile
            self._tell()
