"""What both ends of a ZeroMQ link do alike: queue, credits, delivery, closing.

A comm sends a part only while the peer's window has room for it beside what is unconsumed, and keeps the rest in a queue
of its own; while it waits small messages gather there and go out together. What arrives is parsed at once while it is wanted, and
kept as it came (at most a window) while it is not.
"""

from __future__ import annotations

import asyncio
import dataclasses
from abc import abstractmethod
from collections import deque

import zmq

from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    LimitExceededError,
    RemoteProtocolError,
)
from zmqtasks.protocol.frames import KIB, Frames, Limits
from zmqtasks.transports.base import CommStatistics, LinkSettings
from zmqtasks.transports.lifecycle import LoopComm
from zmqtasks.transports.stream import StreamReader, pack_message
from zmqtasks.transports.zeromq.control import (
    UNIT_BYTES,
    Abort,
    Accept,
    Control,
    Credit,
    Fin,
    FinAck,
    Hello,
    Refuse,
    decode_control_untrusted,
    encode_control,
    largest_part,
    units,
)

LENT_BYTES = 128 * KIB
"""Parts of this size are not copied into ZeroMQ, which uses the memory until it has written it: its thread then tells one of
pyzmq's, so it does not pay for small ones."""
_LEAST_WINDOW = 4
_TELLS_PER_WINDOW = 4
_FIN = encode_control(Fin())
_FIN_ACK = encode_control(FinAck())


def full_window(settings: LinkSettings) -> int:
    """How many units may be on their way to one comm, at most."""
    return max(_LEAST_WINDOW, settings.high_water_bytes // UNIT_BYTES)


def window_for(limits: Limits, settings: LinkSettings) -> int:
    """How many units may be on their way to a comm with `limits`: little, before the peer has authenticated."""
    return min(full_window(settings), max(_LEAST_WINDOW, 2 * units(limits.message_bytes)))


class ZmqComm(LoopComm):
    """A comm over ZeroMQ; subclasses own or share the socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: LinkSettings) -> None:
        super().__init__(loop, settings)
        self._reader = StreamReader(settings.limits)
        self._held: deque[memoryview | None] = deque()  # parts that are not wanted yet; None: FIN
        self._caught_up = False  # nothing is held, and what comes is parsed at once
        self._queue: deque[bytes | memoryview] = deque()
        self._queued_bytes = 0
        self._flushing = False  # what was taken out of the queue may not be with ZeroMQ yet
        self._congested = False  # over the high-water mark, and not under the low one since
        self._units_sent = 0
        self._units_acked = 0
        self._peer_window = 0  # until HELLO or ACCEPT
        self._peer_part_bytes = 0  # the largest part that it takes
        self._units_received = 0
        self._units_consumed = 0
        self._units_told = 0  # consumed, as last told to the peer
        self._window = window_for(settings.limits, settings)
        self._fin_sent = False
        self._fin_received = False
        self._released = False
        self._gone: asyncio.Future[None] = loop.create_future()  # done when nothing of the link is left here

    # -- what subclasses do

    @abstractmethod
    def _push(self, part: bytes | memoryview) -> None:
        """Hands a part of data to ZeroMQ."""

    @abstractmethod
    def _push_control(self, data: bytes) -> None:
        """Hands a control part to ZeroMQ."""

    @abstractmethod
    def _release(self, *, hard: bool) -> None:
        """Lets go of the socket; `hard`: the peer shall see a break."""

    @abstractmethod
    def _greeted(self, control: Hello | Accept | Refuse) -> None:
        """A part of the opening has come; raises `RemoteProtocolError` when it is out of place."""

    # -- sending

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._sending_error()
        pieces, size = pack_message(frames)
        self._messages_sent += 1
        self._bytes_sent += size
        # Most messages, with as few calls as can be: after a wait all code is cold, and costs some times what it does in a loop.
        cost = -(-size // UNIT_BYTES)  # `units`, of more than nothing
        credit = self._peer_window - self._units_sent + self._units_acked
        if cost <= credit and size <= self._peer_part_bytes and len(pieces) == 1 and not self._queue:
            self._units_sent += cost
            try:
                self._push(pieces[0])
            except zmq.ZMQError as exc:
                self._break(f"{exc}", exc)
        else:
            self._enqueue(pieces, size)
        if self._ended is not None:
            raise self._sending_error()

    def _enqueue(self, pieces: list[bytes | memoryview], size: int) -> None:
        self._queue.extend(pieces)
        self._queued_bytes += size
        self._flush()
        if self._queued_bytes > self._settings.high_water_bytes:
            self._congested = True

    async def drain(self) -> None:
        while self._ended is None and self._congested:
            await self._wait_drained()
        if self._ended is not None:
            raise self._sending_error()

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def statistics(self) -> CommStatistics:
        granted = 0 if self._ended is not None else self._credit() * UNIT_BYTES  # small messages use up units as well
        return dataclasses.replace(super().statistics(), credit_bytes=max(0, granted))

    def _credit(self) -> int:
        return self._peer_window - (self._units_sent - self._units_acked)

    def _put(self, part: bytes | memoryview) -> None:
        self._units_sent += units(len(part))
        try:
            self._push(part)
        except zmq.ZMQError as exc:
            self._break(f"{exc}", exc)

    def _put_control(self, control: bytes) -> None:
        if self._released:
            return
        try:
            self._push_control(control)
        except zmq.ZMQError as exc:
            self._break(f"{exc}", exc)

    def _flush(self) -> None:
        """Sends as much of the queue as there is credit for, and the FIN after its end."""
        self._flushing = True
        try:
            while self._queue and (part := self._next_part()) is not None:
                self._queued_bytes -= len(part)
                self._put(part)
        finally:
            self._flushing = False
        if self._released:
            return
        if self._congested and self._queued_bytes <= self._settings.low_water_bytes:
            self._congested = False
            self._wake_drainers(None)
        if self._closing and not self._queue and not self._fin_sent:
            self._fin_sent = True
            self._put_control(_FIN)

    def _next_part(self) -> bytes | memoryview | None:
        """Takes the next part out of the queue: a slice of a large piece, or many small pieces joined.

        None while there is no credit for the first piece, as large as parts may be: slices do not shrink with the credit.
        """
        queue = self._queue
        first = queue[0]
        most = self._peer_part_bytes
        credit = self._credit()
        if credit < units(min(len(first), most)):
            return None
        if len(first) > most:
            view = memoryview(first)
            queue[0] = view[most:]
            return view[:most]
        most = min(most, credit * UNIT_BYTES)
        run = [queue.popleft()]
        size = len(first)
        while queue and size + len(queue[0]) <= most:
            size += len(queue[0])
            run.append(queue.popleft())
        return first if len(run) == 1 else b"".join(run)

    # -- receiving

    def set_limits(self, limits: Limits) -> None:
        self._reader.set_limits(limits)
        window = window_for(limits, self._settings)
        if window > self._window:  # what was granted cannot be taken back
            self._window = window
            self._tell_credit()

    def part_received_untrusted(self, part: memoryview) -> None:
        """Takes a part of data; every fault of it ends the comm."""
        size = len(part)
        cost = -(-size // UNIT_BYTES) or 1  # `units`, without the call
        self._units_received += cost
        self._bytes_received += size
        if self._units_received - self._units_consumed > self._window:
            self._end(
                LimitExceededError(
                    f"{self.peer_address} sent more than it has credit for: {self._window} times {UNIT_BYTES} bytes"
                ),
                hard=True,
            )
        elif self._ended is not None:  # close() was called: the peer shall come to its end
            self._consumed(cost)
        elif self._caught_up and self._delivering:
            frames = self._reader.whole_message_untrusted(size, part)
            if frames is None:
                self._feed(part)
                return
            self._messages_received += 1
            try:
                self._on_message(frames)
            except Exception as exc:
                self._handler_failed(exc)
            self._consumed(cost)
        else:
            self._held.append(part)

    def control_received_untrusted(self, data: bytes | None) -> None:
        """Takes a control part, None for a message that is neither that nor data; every fault of it ends the comm."""
        try:
            if data is None:
                raise RemoteProtocolError(
                    f"{self.peer_address} sent a message of several parts that is not for control"
                )
            self._on_control(decode_control_untrusted(data))
        except RemoteProtocolError as exc:
            self._end(exc, hard=True)

    def link_lost(self) -> None:
        """The connection is gone, and all that came by it has been received."""
        self._break("the connection was lost: the peer is gone, or no packet has come through")

    def _break(self, reason: str, cause: BaseException | None = None) -> None:
        if self._fin_received and self._ended is None:
            return  # the peer has closed, which is told when what it sent before has been delivered
        error = CommBrokenError(f"the link to {self.peer_address} broke: {reason}")
        error.__cause__ = cause
        self._end(error, hard=True)

    def _on_control(self, control: Control) -> None:
        match control:
            case Credit(consumed, window):
                if not self._units_acked <= consumed <= self._units_sent:
                    raise RemoteProtocolError(
                        f"{self.peer_address} has consumed {consumed} units, of {self._units_sent} that were sent"
                    )
                self._units_acked = consumed
                self._set_peer_window(window)
                self._flush()
            case Fin():
                self._fin_received = True
                self._put_control(_FIN_ACK)
                self._held.append(None)
                self._take_held()
                if self._closing:
                    self._drop(hard=False)
            case FinAck():
                if not self._fin_sent:
                    raise RemoteProtocolError(f"{self.peer_address} acknowledged a close that was not asked for")
                self._drop(hard=False)
            case Abort(reason):
                self._break(f"the peer broke it: {reason}")
            case Hello() | Accept() | Refuse():
                self._greeted(control)

    def _set_peer_window(self, window: int) -> None:
        # What is unconsumed is held here too, by ZeroMQ: our own mark bounds it.
        self._peer_window = min(window, full_window(self._settings))
        self._peer_part_bytes = largest_part(self._peer_window)

    def _consumed(self, part_units: int) -> None:
        self._units_consumed += part_units
        if (self._units_consumed - self._units_told) * _TELLS_PER_WINDOW >= self._window:
            self._tell_credit()

    def _tell_credit(self) -> None:
        self._units_told = self._units_consumed
        self._put_control(encode_control(Credit(self._units_consumed, self._window)))

    def _delivery_changed(self) -> None:
        self._caught_up = False
        if self._delivering:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Delivers what has come before the start, or during a pause."""
        if self._delivering and not self._caught_up:
            self._caught_up = True
            self._reader.take_rest()
            self._deliver()
            self._take_held()

    def _take_held(self) -> None:
        while self._held and self._delivering and self._caught_up:
            part = self._held.popleft()
            if part is None:
                self._end(CommClosedError(f"{self.peer_address} closed the link", by="peer"))
            else:
                self._feed(part)

    def _feed(self, part: memoryview) -> None:
        """Parses a part and delivers what is complete; holds back the rest when the handler pauses."""
        reader = self._reader
        cost = units(len(part))
        while part:
            buffer = reader.get_buffer()
            size = min(len(buffer), len(part))
            buffer[:size] = part[:size]
            reader.received(size)
            part = part[size:]
            self._deliver()
            if part and not (self._delivering and self._caught_up):
                if self._ended is None:
                    self._held.appendleft(part)
                    self._consumed(cost - units(len(part)))
                return
        self._consumed(cost)

    def _deliver(self) -> None:
        reader = self._reader
        try:
            while self._delivering:
                frames = reader.next_message_untrusted()
                if frames is None:
                    break
                if not frames:
                    raise RemoteProtocolError(
                        f"{self.peer_address} said goodbye in its data, which is not done over zmq"
                    )
                self._hand_over(frames)
        except RemoteProtocolError as exc:
            self._end(exc, hard=True)
        except Exception as exc:  # no memory, or what else the system refuses: what came by half is lost
            self._break(f"what came could not be taken: {exc!r}", exc)
        finally:
            reader.keep_rest()

    # -- the end

    async def close(self) -> None:
        if self._ended is None:
            self._mark_closed()
            self._closing = True
            if self._fin_received:
                self._drop(hard=False)
            else:
                self._discard_held()
                self._flush()
        try:
            if not self._released:
                await asyncio.wait((self._gone,), timeout=self._settings.heartbeat_s)
        finally:
            self._drop(hard=not self._released)
            self._tell_end_soon()
        if self._handler is not None:
            await asyncio.sleep(0)  # the handler is told before this returns

    def _mark_closed(self) -> None:
        """This side closes the link: nothing is accepted for sending any more."""
        self._mark_ended(CommClosedError(f"the link to {self.peer_address} was closed by this side", by="local"))

    def _discard_held(self) -> None:
        """Counts as consumed what nobody will take any more."""
        held, self._held = self._held, deque()
        self._units_consumed += sum(units(len(part)) for part in held if part is not None)
        self._tell_credit()

    def _drop(self, *, hard: bool) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self._held.clear()
        if not self._released:
            self._released = True
            self._release(hard=hard)
            self._gone.set_result(None)
