"""Links that have shaken hands, and what has come by them and was not read yet.

The transport's callbacks meet distributed's `await comm.read()` here. A `FrameLink` takes messages as they come; when more
than `UNREAD_BYTES` wait for a reader it stops receiving, so that a peer which sends faster than this side reads waits there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from zmqtasks.config import Config
from zmqtasks.errors import CommClosedError
from zmqtasks.ids import InstanceId, new_instance_id
from zmqtasks.nodes.acceptor import Acceptor, Admission
from zmqtasks.nodes.links import PeerInfo, dial
from zmqtasks.nodes.versions import own_versions
from zmqtasks.protocol.frames import DATA_LIMITS, MIB, Frames, total_size
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.ops import DataIntroduction, Introduction
from zmqtasks.security import Security
from zmqtasks.transports.base import Comm

UNREAD_BYTES = 16 * MIB
_MESSAGE_OVERHEAD_BYTES = 256
"""What a message takes beside its frames, so that tiny ones are bounded as well."""

_CLOSE_S = 1.0
"""How long a close waits for the peer's answer, which comes from its event loop: a task there may hold it up for longer."""

_NAME = "dask.distributed"
_instance_id: InstanceId = new_instance_id()


class FrameLink:
    """A comm of a transport, read by coroutines; see the module's docstring."""

    def __init__(self, comm: Comm) -> None:
        """Takes over the callbacks of a comm whose handshake is done."""
        self.comm = comm
        self.loop = asyncio.get_running_loop()
        self.ended: Exception | None = None
        self._unread: deque[list[memoryview]] = deque()
        self._unread_bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        comm.set_handler(self)

    @property
    def exhausted(self) -> bool:
        """It has ended, and all that came by it was read."""
        return self.ended is not None and not self._unread

    async def receive(self) -> list[memoryview]:
        """The next message; raises the link's end. One reader at a time."""
        while not self._unread:
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            if self._waiter is not None:
                raise RuntimeError(f"two coroutines read from the link to {self.comm.peer_address} at the same time")
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frames = self._unread.popleft()
        self._unread_bytes -= _weight(frames)
        if self._paused and self._unread_bytes <= UNREAD_BYTES // 2:
            self._paused = False
            self.comm.resume_receiving()
        return frames

    async def send(self, frames: Frames) -> None:
        """Queues a message, and waits while too much is queued; raises the link's end."""
        self.comm.send(frames)
        await self.comm.drain()

    async def close(self) -> None:
        """Ends the link once what was sent is out; what was not read is dropped, and a reader gets the end.

        With a peer that is busy that goes on after this has returned.
        """
        self._drop_unread(CommClosedError(f"the link to {self.comm.peer_address} was closed by this side"))
        if self._closing is None:
            self._closing = self.loop.create_task(self.comm.close())
        await asyncio.wait((self._closing,), timeout=_CLOSE_S)

    def abort(self) -> None:
        """Ends the link at once, in any state of its event loop; a reader gets the end."""
        self.comm.abort()
        if not self.loop.is_closed():
            self._drop_unread(CommClosedError(f"the link to {self.comm.peer_address} was aborted by this side"))

    # -- callbacks of the transport

    def message_received(self, frames: list[memoryview]) -> None:
        if self.ended is not None:
            return
        self._unread.append(frames)
        self._unread_bytes += _weight(frames)
        if self._unread_bytes > UNREAD_BYTES and not self._paused:
            self._paused = True
            self.comm.pause_receiving()
        self._wake()

    def comm_ended(self, error: Exception) -> None:
        if self.ended is None:
            self.ended = error
        self._wake()

    def _drop_unread(self, error: Exception) -> None:
        self._unread.clear()
        self._unread_bytes = 0
        if self.ended is None:
            self.ended = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def connect(address: str, security: Security, config: Config) -> FrameLink:
    """A link to a `FrameListener`; raises what `nodes.links.dial` does, and leaves nothing behind then."""
    request = LinkRequest(DataIntroduction(_NAME), _instance_id, b"", versions=own_versions())
    dialed = await dial(address, request, security=security, config=config, limits=DATA_LIMITS)
    link = FrameLink(dialed.comm)
    for frames in dialed.arrived.messages:
        link.message_received(frames)
    if dialed.arrived.ended is not None:
        link.comm_ended(dialed.arrived.ended)
    dialed.comm.resume_receiving()
    return link


class FrameListener:
    """Accepts links at an address until stopped; `on_link` gets each that has shown that it holds the key."""

    def __init__(self, on_link: Callable[[FrameLink], None], security: Security, config: Config) -> None:
        self._on_link = on_link
        self._acceptor = Acceptor(
            security=security, config=config, epoch=0, instance_id=_instance_id, admit=self._admit
        )

    async def start(self, address: str) -> str:
        """Listens; returns the address with the real port."""
        return await self._acceptor.listen(address)

    def stop(self) -> None:
        """Turns newcomers away from now on; the address is free a moment later, or with the last link made here."""
        self._acceptor.stop()

    def serve(self, comm: Comm, theirs: Sequence[str] = (), compression: str = "auto") -> None:
        """Takes a comm over from the acceptor; distributed compresses by itself."""
        self._on_link(FrameLink(comm))

    def _admit(self, introduction: Introduction, peer: PeerInfo) -> Admission:
        return Admission(data_handler=self)


def _weight(frames: Frames) -> int:
    return total_size(frames) + _MESSAGE_OVERHEAD_BYTES
