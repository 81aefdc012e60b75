"""Messages between nodes of one process: references to frames go through a queue.

The two comms of a link may live in different event loops, each in its own thread. What crosses threads is kept to three
things, none of which needs a lock under the memory model of CPython:

- the receiver's inbox, a deque: the sender appends, the receiver pops;
- two counters of bytes that only grow, `_bytes_sent` of the sender and `_bytes_consumed` of the receiver: their
  difference is what is queued;
- flags that are set *after* the data they announce and cleared *before* it is looked at: one wake-up for a whole batch.

Everything else runs in the comm's own loop, called by `call_soon_threadsafe` where the peer asks for it. Frames may be
read-only, and are the sender's own objects: inside one process neither side may write into them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable

from zmqtasks.errors import (
    AddressError,
    CommBrokenError,
    CommClosedError,
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    LimitExceededError,
    LocalProtocolError,
)
from zmqtasks.protocol.frames import Buffer, Frames, Limits, as_bytes_view
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Capabilities, Comm, LinkSettings, Listener, Transport
from zmqtasks.transports.lifecycle import LoopComm
from zmqtasks.transports.liveness import unwatch, watch

_log = logging.getLogger(__name__)

_FLAT = (bytes, bytearray)
_Message = tuple[list[Buffer], int]  # frames (those that are memoryviews are flat), and the sum of their sizes
_numbers = itertools.count(1)


class InprocComm(LoopComm):
    """One end of a link inside this process; made in pairs by `InprocTransport`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: LinkSettings, local: str, peer: str) -> None:
        super().__init__(loop, settings)
        self.local_address = local
        self.peer_address = peer
        self.heartbeat_s = settings.heartbeat_s
        self._limits = settings.limits
        self._peer: InprocComm = self  # until `pair`
        self._inbox: deque[_Message | None] = deque()  # None: the peer closed
        self._wake_pending = False  # the peer has seen to it that _take_inbox will run
        self._bytes_consumed = 0
        self._congested = False  # over the high-water mark, and not under the low one since
        self._wants_drained = False  # somebody waits in drain()

    def pair(self, peer: InprocComm) -> None:
        """Links two comms with each other."""
        self._peer = peer
        peer._peer = self

    def send(self, frames: Frames) -> None:
        if self._ended is not None:
            raise self._sending_error()
        if not frames:
            raise LocalProtocolError("a message has at least one frame (which may be empty)")
        # Views of bytes are made where they are read: thousands in the queue are work for the garbage collector, and
        # three times the rate of small messages.
        kept = [frame if type(frame) in _FLAT else as_bytes_view(frame) for frame in frames]
        size = sum(map(len, kept))
        self._messages_sent += 1
        self._bytes_sent += size
        self._put((kept, size))
        if self._ended is not None:
            raise self._sending_error()
        if not self._congested and self.queued_bytes > self._settings.high_water_bytes:
            self._congested = True

    async def drain(self) -> None:
        while self._ended is None and self._congested:
            self._wants_drained = True
            if self.queued_bytes <= self._settings.low_water_bytes:
                self._congested = False
            else:
                await self._wait_drained()
        if self._ended is not None:
            raise self._sending_error()

    @property
    def queued_bytes(self) -> int:
        return 0 if self._ended is not None else self._bytes_sent - self._peer._bytes_consumed

    def set_limits(self, limits: Limits) -> None:
        self._limits = limits

    async def close(self) -> None:
        # Nothing to flush: what was sent is in the peer's inbox, and outlives this comm there.
        if self._ended is None:
            self._put(None)
            self._end(CommClosedError(f"the link to {self.peer_address} was closed by this side", by="local"))

    def look(self, now: float) -> None:
        """Called from time to time: a loop that was closed without its comms tells nobody."""
        if self._peer._loop.is_closed():
            self._peer_gone()

    def attach(self) -> None:
        """Begins to live in its loop; called there."""
        watch(self._loop, self)

    def _put(self, message: _Message | None) -> None:
        """Appends to the peer's inbox and wakes the peer, unless it has been woken already."""
        peer = self._peer
        peer._inbox.append(message)
        if not peer._wake_pending:
            peer._wake_pending = True
            self._call_peer(peer._take_inbox)

    def _call_peer(self, callback: Callable[[], None]) -> None:
        peer_loop = self._peer._loop
        try:
            if peer_loop is self._loop:
                peer_loop.call_soon(callback)
            else:
                peer_loop.call_soon_threadsafe(callback)
        except RuntimeError:  # "Event loop is closed"
            self._peer_gone()

    def _take_inbox(self) -> None:
        """Delivers what has come, for as long as it is wanted."""
        self._wake_pending = False
        inbox = self._inbox
        for _ in range(len(inbox)):  # what comes meanwhile has its own wake-up: other comms get their turn
            if not self._delivering:
                break
            message = inbox.popleft()
            if message is None:
                self._end(CommClosedError(f"{self.peer_address} closed the link", by="peer"))
                break
            frames, size = message
            self._bytes_consumed += size
            self._bytes_received += size
            if self._within_limits(frames, size):
                self._hand_over([frame if type(frame) is memoryview else memoryview(frame) for frame in frames])
        if self._ended is not None:
            inbox.clear()
        peer = self._peer
        if peer._wants_drained and peer._bytes_sent - self._bytes_consumed <= peer._settings.low_water_bytes:
            peer._wants_drained = False
            self._call_peer(peer._drained)

    def _within_limits(self, frames: list[Buffer], size: int) -> bool:
        limits = self._limits
        few = len(frames) <= limits.frames and size <= limits.message_bytes
        if few and (size <= limits.frame_bytes or max(map(len, frames)) <= limits.frame_bytes):
            return True
        largest = max(map(len, frames))
        self._end(
            LimitExceededError(
                f"{self.peer_address} sent {len(frames)} frames of {size} bytes in all, the largest of {largest}: the "
                f"limits are {limits.frames} frames, {limits.message_bytes} bytes in all, {limits.frame_bytes} in one"
            ),
            hard=True,
        )
        return False

    def _drained(self) -> None:
        self._wake_drainers(None)

    def _delivery_changed(self) -> None:
        if self._delivering:
            self._loop.call_soon(self._take_inbox)

    def _drop(self, *, hard: bool) -> None:
        unwatch(self._loop, self)
        self._inbox.clear()
        if hard and self._peer._ended is None:
            self._call_peer(self._peer._peer_aborted)

    def _peer_aborted(self) -> None:
        self._end(CommBrokenError(f"the link to {self.peer_address} broke: the peer aborted it"))

    def _peer_gone(self) -> None:
        if self._inbox and self._inbox[-1] is None:
            return  # it closed in good order before; that is told once the rest has been delivered
        self._end(CommBrokenError(f"the link to {self.peer_address} broke: the event loop of the peer is closed"))


class InprocListener(Listener):
    """A name in the table of this process; made by `InprocTransport`."""

    def __init__(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> None:
        self.address = address
        self.loop = asyncio.get_running_loop()
        self._on_comm = on_comm
        self._settings = settings

    async def close(self) -> None:
        if _listeners.get(self.address) is self:
            del _listeners[self.address]

    def new_comm(self, peer_address: str) -> InprocComm:
        """The listener's end of a new link; from any thread."""
        return InprocComm(self.loop, self._settings, self.address, peer_address)

    def accept(self, comm: InprocComm, accepted: Callable[[bool], None]) -> None:
        """Hands `comm` to the node, unless the listener was closed meanwhile; in the listener's loop."""
        if _listeners.get(self.address) is not self:
            accepted(False)
            return
        comm.attach()
        accepted(True)
        try:
            self._on_comm(comm)
        except Exception:
            _log.exception("on_comm of %s failed: the link from %s is aborted", self.address, comm.peer_address)
            comm.abort("refused")


_listeners: dict[str, InprocListener] = {}


class InprocTransport(Transport):
    """Frames by reference, between event loops of one process."""

    scheme = "inproc"
    capabilities = Capabilities(
        crosses_hosts=False,
        crosses_processes=False,
        encrypts=False,
        shares_memory=True,
        detects_cut_link=False,
        uses_ip=False,
        untrusted_peers=False,
    )

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        address = _normal(address)
        listener = _listeners.get(address)
        if listener is None or listener.loop.is_closed():
            known = ", ".join(sorted(_listeners)) or "none"
            raise ConnectionRefusedByPeerError(f"nobody listens at {address} in this process (listening here: {known})")
        loop = asyncio.get_running_loop()
        comm = InprocComm(loop, settings, f"{address}#{next(_numbers)}", address)
        theirs = listener.new_comm(comm.local_address)
        comm.pair(theirs)
        answer: asyncio.Future[bool] = loop.create_future()

        def settle(yes: bool) -> None:
            if not answer.done():
                answer.set_result(yes)

        def accepted(yes: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: their comm notices
                loop.call_soon_threadsafe(settle, yes)

        try:
            listener.loop.call_soon_threadsafe(listener.accept, theirs, accepted)
            async with asyncio.timeout(settings.connect_timeout_s):
                welcome = await answer
        except TimeoutError as exc:
            comm.abort()
            raise ConnectTimeoutError(
                f"the event loop that listens at {address} did not answer within {settings.connect_timeout_s:g} s: "
                f"is it running, or busy with a long call?"
            ) from exc
        except asyncio.CancelledError:
            comm.abort()
            raise
        except RuntimeError as exc:  # "Event loop is closed"
            raise ConnectionRefusedByPeerError(f"the event loop that listened at {address} is closed") from exc
        if not welcome:
            raise ConnectionRefusedByPeerError(f"the listener at {address} was closed")
        if isinstance(comm.ended, CommError):
            raise ConnectionRefusedByPeerError(f"{address} turned the connection away") from comm.ended
        comm.attach()
        return comm

    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        if split_scheme(address) == (self.scheme, ""):
            address = f"inproc://auto-{next(_numbers)}"
        listener = InprocListener(_normal(address), on_comm, settings)
        holder = _listeners.setdefault(listener.address, listener)
        if holder is not listener:
            if not holder.loop.is_closed():
                raise ConnectError(f"cannot listen at {listener.address}: the name is taken in this process")
            _listeners[listener.address] = listener
        return listener


def _normal(address: str) -> str:
    scheme, name = split_scheme(address)
    if not name or any(character.isspace() or character == "#" for character in name):
        raise AddressError(f"{address!r} names no place in this process: write it as 'inproc://some-name'")
    return f"{scheme}://{name}"
