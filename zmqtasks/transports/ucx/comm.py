"""Comms of `ucx`: a comm of `tcp` whose large frames take another way.

The stream keeps the order: a message with large frames is announced on it, and is handed on when UCX has brought them, before
what comes behind it. Before a side has raised its limits (that is, before the peer has authenticated) it makes no use of UCX and
does not tell its address; until a peer has told its own, large frames go on the stream.

While UCX brings the frames of one message, the stream is read on up to the end of the next, so that UCX goes on with its frames.
Then it is not read, so that its end would not be noticed: the state of the connection is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from zmqtasks.errors import CommBrokenError, CommClosedError, CommError, RemoteProtocolError
from zmqtasks.protocol.frames import HELLO_LIMITS, MIB, Frames, Limits
from zmqtasks.transports.base import LinkSettings
from zmqtasks.transports.lifecycle import _no_handler
from zmqtasks.transports.stream import pack_message
from zmqtasks.transports.tcp import TcpComm
from zmqtasks.transports.ucx.library import UcxWorker, UnreachableError, take_worker
from zmqtasks.transports.ucx.wire import LARGE_BYTES, UcxReader, chunks, large_of, pack_large, pack_offer

_log = logging.getLogger(__name__)

_SENDS = 4
"""Chunks that UCX has at the same time."""

_ASK_S = 0.1
_QUIET = 10
"""After the peer's end, so many times nothing may come before the rest is given up: what it sent before is under way."""

_TCP_ESTABLISHED = 1

_AHEAD = 2
"""Messages that are read of the stream before the first of them is whole."""
_AHEAD_BYTES = 64 * MIB
"""Behind a larger one none is: it would have memory of its own, and be there a few per cent sooner."""


@dataclass(slots=True)
class _Incoming:
    """A message that waits for large frames, its own or those of one before it."""

    frames: list[memoryview]
    missing: int
    """Its chunks that have not come."""
    size: int
    """Bytes of all its chunks."""


class UcxComm(TcpComm):
    """A comm over one TCP connection and UCX; made by `UcxTransport`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        settings: LinkSettings,
        local_address: str,
        peer_address: str,
    ) -> None:
        super().__init__(loop, sock, settings, local_address, peer_address)
        self._reader: UcxReader = UcxReader(settings.limits)
        self._limits = settings.limits
        self._worker: UcxWorker | None = None
        self._released = False
        self._endpoint: Any = None
        self._unreachable = False
        self._tag = secrets.randbits(64)
        self._wanted = False  # messages: started and not paused
        self._incoming: deque[_Incoming] = deque()
        self._last: CommError | None = None  # the end that comes behind these
        self._quiet = 0
        self._asking: asyncio.TimerHandle | None = None
        self._large: deque[memoryview] = deque()
        self._large_bytes = 0  # queued, with what UCX has
        self._large_paused = False
        self._sending = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._offer()

    def set_limits(self, limits: Limits) -> None:
        super().set_limits(limits)
        self._limits = limits
        self._offer()

    def _offer(self) -> None:
        raised = self._limits.message_bytes > HELLO_LIMITS.message_bytes
        if not raised or self._worker is not None or self._ended is not None or self._transport is None:
            return
        try:
            self._worker = take_worker(self._loop)
        except Exception as exc:  # no descriptors, most likely; whatever ucxx raises
            _log.warning("UCX is not used for %s, so large frames go by TCP: %s", self.peer_address, exc)
            return
        data = pack_offer(self._tag, self._worker.address)
        self._put_out([data], len(data))

    # -- sending

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._sending_error()
        packed, size = pack_message(frames)
        if size >= LARGE_BYTES and self._worker is not None and self._reader.offer is not None:
            large = large_of(frames)
            if large and self._has_endpoint():
                self._send_with_large(frames, large)
                return
        self._messages_sent += 1
        self._bytes_sent += size
        self._put_out(packed, size)

    def _send_with_large(self, frames: Frames, large: list[memoryview]) -> None:
        packed = pack_large(frames)
        large_bytes = sum(frame.nbytes for frame in large)
        self._messages_sent += 1
        self._bytes_sent += len(packed) + large_bytes
        self._large_bytes += large_bytes
        self._large_paused = self._large_paused or self._large_bytes > self._settings.high_water_bytes
        self._put_out([packed], len(packed))
        for frame in large:
            self._large += chunks(frame)
        self._send_large()

    def _has_endpoint(self) -> bool:
        assert self._worker is not None
        assert self._reader.offer is not None
        if self._endpoint is None and not self._unreachable:
            try:
                self._endpoint = self._worker.endpoint(self._reader.offer[1])
            except UnreachableError as exc:
                self._unreachable = True
                _log.warning("UCX has no way to %s, so large frames go by TCP: %s", self.peer_address, exc)
            except Exception as exc:  # a lack of something here, or an address that is none
                self._unreachable = True
                _log.warning("UCX makes no way to %s, so large frames go by TCP: %s", self.peer_address, exc)
        return self._endpoint is not None

    def _send_large(self) -> None:
        assert self._worker is not None
        assert self._reader.offer is not None
        while self._large and self._sending < _SENDS:
            chunk = self._large.popleft()
            self._sending += 1
            self._worker.send(self._endpoint, self._reader.offer[0], chunk, partial(self._sent, chunk.nbytes))

    def _sent(self, size: int, error: Exception | None) -> None:
        if self._dropped:
            return
        self._sending -= 1
        self._large_bytes -= size
        if error is not None:
            self._break(error)
            return
        self._send_large()
        if self._large_bytes <= self._settings.low_water_bytes:
            self._large_paused = False
            if not self._write_paused:
                self._wake_drainers(None)

    def _break(self, cause: Exception) -> None:
        error = CommBrokenError(f"the link to {self.peer_address} broke: UCX says {cause}")
        error.__cause__ = cause
        self._end(error, hard=True)

    @property
    def queued_bytes(self) -> int:
        return super().queued_bytes + self._large_bytes

    @property
    def ready_for_direct(self) -> bool:
        return not self._large and super().ready_for_direct

    async def drain(self) -> None:
        if self._ended is not None:
            raise self._sending_error()
        while self._write_paused or self._large_paused:
            await self._wait_drained()

    # -- receiving

    def pause_receiving(self) -> None:
        self._wanted = False
        super().pause_receiving()

    def resume_receiving(self) -> None:
        self._wanted = self._handler is not None
        if self._incoming or self._last is not None:
            self._loop.call_soon(self._hand_over_whole)
        else:
            super().resume_receiving()

    def _hand_over(self, frames: list[memoryview]) -> None:
        large, self._reader.large = self._reader.large, []
        if not large and not self._incoming:
            super()._hand_over(frames)
            return
        missing = [chunk for frame in large for chunk in chunks(frame)]
        message = _Incoming(frames, len(missing), sum(chunk.nbytes for chunk in missing))
        if missing:
            if self._worker is None:
                self._end(RemoteProtocolError(f"{self.peer_address} sent frames by UCX, which was not offered"))
                return
            self._worker.receive(self._tag, missing, partial(self._received, message))
        self._incoming.append(message)
        if len(self._incoming) == 1:
            self._quiet = 0
            self._asking = self._loop.call_later(_ASK_S, self._ask)
        if not self._reads_ahead:
            self._delivering = False
            self._pause_reading()

    @property
    def _reads_ahead(self) -> bool:
        return len(self._incoming) < _AHEAD and all(message.size <= _AHEAD_BYTES for message in self._incoming)

    def _received(self, message: _Incoming, size: int, error: Exception | None) -> None:
        if self._dropped:
            return
        if isinstance(error, ValueError):
            self._end(RemoteProtocolError(f"{self.peer_address} does not keep to the protocol: {error}"))
            return
        if error is not None:
            self._break(error)
            return
        self._quiet = 0
        self._bytes_received += size  # as it comes: who waits for a message looks whether anything does
        message.missing -= 1
        if not message.missing:
            self._hand_over_whole()

    def _hand_over_whole(self) -> None:
        """Hands on what has come, for as long as it is wanted, and goes on with the stream."""
        while self._wanted and self._incoming and not self._incoming[0].missing:
            super()._hand_over(self._incoming.popleft().frames)
        if not self._incoming and self._asking is not None:
            self._asking.cancel()
        if self._dropped or not self._wanted:
            return
        if self._last is not None:
            if not self._incoming:
                self._end(self._last)
        elif not self._delivering and self._reads_ahead:
            self._delivering = True
            self._delivery_changed()

    def _nothing_follows(self, end: CommError) -> None:
        if not self._incoming:
            super()._nothing_follows(end)
            return
        self._last = self._last or end
        self._delivering = False
        self._pause_reading()

    def eof_received(self) -> bool:
        super().eof_received()
        return self._last is not None  # the socket stays for as long as there are messages before its end

    def _ask(self) -> None:
        """Whether the peer is still there: nobody may be reading the stream now."""
        state = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] if self._sock.fileno() >= 0 else 0
        waits = any(message.missing for message in self._incoming)  # not only for whoever has paused this comm
        self._quiet = self._quiet + 1 if waits and state != _TCP_ESTABLISHED else 0
        if self._quiet > _QUIET:
            self._end(CommBrokenError(f"the link to {self.peer_address} broke: the peer is gone within a message"))
        elif not self._dropped:
            self._asking = self._loop.call_later(_ASK_S, self._ask)

    # -- ending

    async def close(self) -> None:
        if self._ended is None:
            self._on_message = _no_handler  # for what UCX still brings
            if self._large_bytes:
                await self._flush_large()
        await super().close()

    async def _flush_large(self) -> None:
        """Like `_wait_flushed`; what the peer sends meanwhile is read and dropped, as it may be about to close too."""
        self._mark_ended(CommClosedError(f"the link to {self.peer_address} was closed by this side", by="local"))
        self._closing = self._large_paused = True
        self._wanted = True
        self._hand_over_whole()
        deadline = self._loop.time() + self._settings.heartbeat_s
        try:
            while self._large_bytes and not self._lost.done() and not self._dropped:
                if self._loop.time() > deadline:
                    self._drop(hard=True)
                    return
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self._tell_end_soon()
            self._drop(hard=True)
            raise
        self._delivering = False
        if not self._dropped and not self._lost.done():
            self._say_goodbye()

    def _drop(self, *, hard: bool) -> None:
        super()._drop(hard=hard)
        self._large.clear()
        self._incoming.clear()
        self._large_bytes = 0
        if self._asking is not None:
            self._asking.cancel()
        if self._worker is not None and not self._released:
            self._released = True
            self._worker.forget(self._tag)
            if self._endpoint is not None:
                self._worker.close_endpoint(self._endpoint)
                self._endpoint = None
            self._worker.release()
