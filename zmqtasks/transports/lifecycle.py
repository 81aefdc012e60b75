"""What comms of one event loop have in common: who is told what, once, and how waiting senders are woken."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable

from zmqtasks.errors import CommBrokenError, CommClosedError, CommError
from zmqtasks.transports.base import Comm, CommHandler, CommStatistics, LinkSettings
from zmqtasks.transports.memory import allocate_aligned

_log = logging.getLogger(__name__)


class LoopComm(Comm):
    """Base of comms that live in one event loop: handler, end, drain and counters; subclasses move the bytes.

    A subclass sees to it that what comes is handed to `_hand_over` only while `_delivering`, and tells of every end by
    `_end`; it implements `_drop` (free everything at once) and `_delivery_changed` (delivery may go on or must stop).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: LinkSettings) -> None:
        self._loop = loop
        self._settings = settings
        self._handler: CommHandler | None = None
        self._on_message: Callable[[list[memoryview]], None] = _no_handler
        self._delivering = False  # started, not paused, not ended
        self._closing = False  # close() is at work: abort() cuts it short
        self._ended: Exception | None = None
        self._end_told = False
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._messages_sent = 0
        self._messages_received = 0
        self._bytes_sent = 0
        self._bytes_received = 0

    def start(self, handler: CommHandler) -> None:
        self.set_handler(handler)
        self.resume_receiving()
        if self._ended is not None:
            self._tell_end_soon()

    def set_handler(self, handler: CommHandler) -> None:
        self._handler = handler
        self._on_message = handler.message_received

    def pause_receiving(self) -> None:
        self._delivering = False
        self._delivery_changed()

    def resume_receiving(self) -> None:
        if self._handler is not None and not self._delivering and self._ended is None:
            self._delivering = True
            self._delivery_changed()

    def allocate(self, size_bytes: int) -> memoryview:
        return allocate_aligned(size_bytes)

    @property
    def ended(self) -> Exception | None:
        return self._ended

    def abort(self, reason: str = "aborted") -> None:
        if self._ended is None:
            self._end(
                CommClosedError(f"the link to {self.peer_address} was {reason} by this side", by="local"), hard=True
            )
        else:
            self._drop(hard=True)

    def statistics(self) -> CommStatistics:
        return CommStatistics(
            messages_sent=self._messages_sent,
            messages_received=self._messages_received,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            queued_bytes=self.queued_bytes,
        )

    @abstractmethod
    def _drop(self, *, hard: bool) -> None:
        """Closes the link and drops what is queued, here and (`hard`) as far down as possible; idempotent."""

    @abstractmethod
    def _delivery_changed(self) -> None:
        """`_delivering` was set or cleared: begin or stop to take what comes, but deliver nothing right now."""

    def _end(self, error: Exception, *, hard: bool = False) -> None:
        """Ends a living comm and drops the link; a comm that has ended keeps its first reason."""
        if self._ended is None:
            self._mark_ended(error)
            self._tell_end_soon()
        self._drop(hard=hard)

    def _mark_ended(self, error: Exception) -> None:
        self._ended = error
        self._delivering = False
        self._wake_drainers(self._sending_error())

    def _sending_error(self) -> CommError:
        """What senders are told of the end: who only sends need not know of the faults that end what comes in."""
        error = self._ended
        if isinstance(error, CommError):
            return error.with_traceback(None)
        broken = CommBrokenError(f"the link to {self.peer_address} broke: {error}")
        broken.__cause__ = error
        return broken

    def _tell_end_soon(self) -> None:
        # When the loop is closed there is nobody to tell, and what the comm holds is freed all the same.
        if not self._end_told and self._handler is not None and not self._loop.is_closed():
            self._loop.call_soon(self._tell_end)

    def _tell_end(self) -> None:
        if self._end_told or self._handler is None or self._ended is None:
            return
        self._end_told = True
        handler, self._handler = self._handler, None
        self._on_message = _no_handler
        try:
            handler.comm_ended(self._ended)
        except Exception:
            _log.exception("the handler of the link to %s failed in comm_ended", self.peer_address)

    def _hand_over(self, frames: list[memoryview]) -> None:
        """Gives one message to the handler; a handler that fails ends the comm."""
        self._messages_received += 1
        try:
            self._on_message(frames)
        except Exception as exc:
            self._handler_failed(exc)

    def _handler_failed(self, exc: Exception) -> None:
        _log.error("the handler of the link to %s failed: the link is aborted", self.peer_address, exc_info=exc)
        error = CommClosedError(f"the link to {self.peer_address} was aborted: its handler failed: {exc!r}", by="local")
        error.__cause__ = exc
        self._end(error, hard=True)

    async def _wait_drained(self) -> None:
        """Waits for `_wake_drainers`."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._drain_waiters:
                self._drain_waiters.remove(waiter)

    def _wake_drainers(self, error: Exception | None) -> None:
        waiters, self._drain_waiters = self._drain_waiters, []
        for waiter in waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


def _no_handler(frames: list[memoryview]) -> None:
    """Takes the place of a handler that must not be called any more."""
