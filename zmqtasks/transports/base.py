"""The transport contract: how frames move between two nodes.

Theory of operation
-------------------
A `Transport` makes `Comm`s: by `connect` on one side, by the callback given to `listen` on the other. A comm moves whole
messages (lists of frames) in order, without loss or duplication, or it ends. It knows no op and no object.

*Receiving* is by callback: `Comm.start(handler)` begins delivery, `handler.message_received(frames)` gets each message,
`handler.comm_ended(error)` is called exactly once, last, whatever ended the comm, and tells how it ended:

- `CommClosedError(by="local")`: `close()` or `abort()` was called here;
- `CommClosedError(by="peer")`: the peer called `close()`; everything it sent before has been delivered;
- `CommBrokenError`: neither side asked for it (`__cause__` has the reason); anything not yet delivered may be lost;
- `RemoteProtocolError` / `LimitExceededError`: the peer's bytes are no message, or one over the limits.

Messages that arrive before `start` are held (bounded by flow control), not lost. Callbacks run in the event loop of the
comm, never inside `send`, `start`, `close` or `abort` of the same comm. An exception from a handler is a bug of this
side: it is logged and the comm is aborted with it as the cause.

*Sending* never blocks: `send(frames)` queues and takes ownership: the sender must not change the buffers until they are
out. Large frames are not copied. `queued_bytes` counts what has been accepted and not yet handed to the operating system
(or, over a transport with credits, to the peer). `await drain()` waits until the queue is under the low-water mark, and
raises the comm's error when the comm ends first. Whoever sends without draining is bounded only by its own good sense;
the peer's memory stays bounded in any case.

*Frames received from another process* are writable, 64-byte aligned memory that belongs to the receiver.

*Liveness.* A comm reports links and guesses nothing about processes. The peer's close and its death are noticed at once
where the operating system tells; a link that is cut silently is noticed within `heartbeat_s` of the settings. A peer that
does not read, holds its GIL, or is stopped for less than that is not broken.

*Threads.* A comm belongs to the event loop that made it; no method may be called from another thread, but for
`send_direct` where a transport offers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from zmqtasks.errors import LocalProtocolError
from zmqtasks.protocol.frames import HELLO_LIMITS, Frames, Limits


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do; tests and link selection skip by these declarations only."""

    crosses_hosts: bool
    crosses_processes: bool
    encrypts: bool
    shares_memory: bool
    detects_cut_link: bool
    """Notices within `heartbeat_s` that packets no longer pass."""
    uses_ip: bool
    """Addresses are `scheme://host:port`, with IPv4 and IPv6 hosts."""
    untrusted_peers: bool
    """Strangers can reach the listener, so bytes must be bounded before authentication."""


@dataclass(frozen=True, slots=True)
class Encryption:
    """What a transport that `encrypts` makes its keys and certificates of; both ends of a link have the same.

    Each transport derives what it needs from `secret` by a label of its own, so that no key serves two purposes.
    """

    secret: bytes | None = field(default=None, repr=False)
    """32 bytes that only the cluster knows; None: links are neither encrypted nor asked to be."""
    same_host: bool = False
    """Whether links that cannot leave this host are encrypted as well."""


PLAIN = Encryption()


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Timeouts and sizes of a transport's links; one object for all transports."""

    connect_timeout_s: float = 10.0
    heartbeat_s: float = 15.0
    """A silently cut link breaks after about this; a peer stopped for less is left alone."""
    high_water_bytes: int = 16 << 20
    """Receivers stop reading, and `drain` starts to wait, above this."""
    low_water_bytes: int = 4 << 20
    limits: Limits = field(default=HELLO_LIMITS)
    """In force on a new comm until `set_limits`."""
    encryption: Encryption = field(default=PLAIN)


@dataclass(frozen=True, slots=True)
class CommStatistics:
    """A snapshot of a comm's counters."""

    messages_sent: int
    messages_received: int
    bytes_sent: int
    bytes_received: int
    queued_bytes: int
    credit_bytes: int | None = None
    """What may still be sent before the peer must grant more; None: the transport has no credits of its own."""


class CommHandler(Protocol):
    """What a comm calls; see the module's docstring for when."""

    def message_received(self, frames: list[memoryview]) -> None:
        """One whole message; the frames belong to the handler from now on."""

    def comm_ended(self, error: Exception) -> None:
        """The comm is over; called once, after the last message."""


class Comm(ABC):
    """One bidirectional, ordered, message-preserving link; see the module's docstring."""

    local_address: str
    peer_address: str
    same_host: bool = False
    """The link cannot leave this host (loopback, say): nothing is gained by encrypting or compressing."""
    encrypted: bool = False
    """Nobody on the way can read or change what passes, and both ends have shown that they know the secret."""

    @abstractmethod
    def start(self, handler: CommHandler) -> None:
        """Begins to deliver messages to `handler`; once per comm, except through `set_handler`."""

    @abstractmethod
    def set_handler(self, handler: CommHandler) -> None:
        """Messages from the next one on go to another handler (after a handshake, say)."""

    @abstractmethod
    def send(self, frames: Frames) -> None:
        """Queues one message of at least one frame.

        Raises the comm's end (`CommClosedError`, `CommBrokenError`) when it is over, `LocalProtocolError` for no frames.
        """

    def send_lasting(self, frames: Frames) -> None:
        """Like `send`, for frames that stay as they are for as long as these very objects live.

        A transport may keep what it made of a memoryview for the next time that it is sent, to whomever.
        """
        self.send(frames)

    @property
    def ready_for_direct(self) -> bool:
        """Whether `send_direct` may be called now, from whatever thread; transports that can't do that never say so.

        The loop does not wait for who asks, so what it has in hand counts as queued until it is out.
        """
        return False

    def send_direct(self, frames: Frames) -> None:
        """Like `send`, from any thread, after `ready_for_direct`; the caller sees to it that nobody else sends meanwhile.

        A message of up to 48 KiB to a peer that reads is on its way when this returns; of others the rest may wait for the loop.
        """
        raise LocalProtocolError(f"{type(self).__name__} sends from its own loop only")

    @abstractmethod
    async def drain(self) -> None:
        """Waits until `queued_bytes` is below the low-water mark; raises the comm's end when that comes first."""

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """Bytes accepted by `send` and not yet passed on."""

    @abstractmethod
    def pause_receiving(self) -> None:
        """No further message is delivered until `resume_receiving` (one already being read may be)."""

    @abstractmethod
    def resume_receiving(self) -> None:
        """Undoes `pause_receiving`."""

    @abstractmethod
    def set_limits(self, limits: Limits) -> None:
        """Bounds on messages from the peer, from the next one on."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> memoryview:
        """Writable, aligned memory that this comm sends without a copy."""

    @abstractmethod
    async def close(self) -> None:
        """Flushes what is queued, tells the peer, and ends the comm; idempotent. Gives up flushing after `heartbeat_s`."""

    @abstractmethod
    def abort(self, reason: str = "aborted") -> None:
        """Ends the comm at once; what is queued is dropped and the peer sees a break; idempotent."""

    @property
    @abstractmethod
    def ended(self) -> Exception | None:
        """What ended the comm, or None while it lives."""

    @abstractmethod
    def statistics(self) -> CommStatistics:
        """Counters up to now."""


class Listener(ABC):
    """Accepts comms at an address until closed."""

    address: str
    """Where peers connect: with the real port, and a host that others can use (never 0.0.0.0)."""

    @abstractmethod
    async def close(self) -> None:
        """Stops accepting and frees the address; comms already made live on; idempotent."""

    def stop(self) -> None:
        """Like `close`, for callers that cannot wait, where a transport offers it: the address is free a moment later."""
        raise LocalProtocolError(f"{type(self).__name__} cannot be stopped without waiting: await close()")


class Transport(ABC):
    """A way to move frames, found in the registry by the scheme of an address."""

    scheme: str
    capabilities: Capabilities

    @abstractmethod
    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        """Makes a link to the listener at `address`.

        Raises `AddressError`, `ConnectionRefusedByPeerError`, `ConnectTimeoutError` or another `ConnectError`, each of
        which names the address. After cancellation nothing is left behind.
        """

    @abstractmethod
    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        """Listens at `address` (port 0: any free one); `on_comm` gets each new comm, not yet started.

        Raises `AddressError`, or `ConnectError` when the address is taken or not of this host.
        """
