"""The comm that distributed reads objects from and writes objects to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from typing import Any

from distributed.comm.core import Comm, CommClosedError
from distributed.comm.utils import from_frames, to_frames
from distributed.utils import ensure_memoryview

from zmqtasks.errors import CommError, ProtocolError
from zmqtasks.integrations.distributed_comm.frames import FrameLink
from zmqtasks.protocol.frames import total_size

_log = logging.getLogger(__name__)


class LinkComm(Comm):  # type: ignore[misc]
    """Objects over a `FrameLink`, serialized by distributed; made by a connector or a listener of this package.

    It belongs to the event loop that made it. What distributed's tcp comms guarantee holds here too: a read that is
    cancelled aborts the comm, since its answer would be taken for the next one's; every end is a `CommClosedError`.
    """

    def __init__(self, link: FrameLink, local_address: str, peer_address: str, deserialize: bool = True) -> None:
        self._link = link
        self._closed = False
        # `distributed.comm.connect` reads these two.
        self._local_addr = local_address
        self._peer_addr = peer_address
        super().__init__(deserialize)
        self._finalizer = weakref.finalize(self, _end_dangling, link, repr(self))
        self._finalizer.atexit = False

    @property
    def local_address(self) -> str:
        return self._local_addr

    @property
    def peer_address(self) -> str:
        return self._peer_addr

    @property
    def extra_info(self) -> dict[str, Any]:
        """Whether the link is `encrypted`, and whether it cannot leave this host (`same_host`)."""
        return {"encrypted": self._link.comm.encrypted, "same_host": self._link.comm.same_host}

    async def read(self, deserializers: Any = None) -> Any:
        """The next message; raises `CommClosedError` when there will be none."""
        if self._closed:
            raise CommClosedError(f"in {self}: it was closed by this side")
        try:
            frames = await self._link.receive()
        except (CommError, ProtocolError) as exc:
            raise self._over(exc) from exc
        except BaseException:
            self.abort()
            raise
        try:
            return await from_frames(
                frames, deserialize=self.deserialize, deserializers=deserializers, allow_offload=self.allow_offload
            )
        except EOFError as exc:
            self.abort()
            raise CommClosedError(f"in {self}: the peer sent a truncated message") from exc

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        """Queues a message; returns its size in bytes. Waits while more than 16 MiB are on their way."""
        if self._closed:
            raise CommClosedError(f"in {self}: it was closed by this side")
        frames = await to_frames(
            msg,
            allow_offload=self.allow_offload,
            serializers=serializers,
            on_error=on_error,
            context={"sender": self.local_info, "recipient": self.remote_info, **self.handshake_options},
        )
        flat = [frame if isinstance(frame, bytes) else ensure_memoryview(frame) for frame in frames]
        try:
            await self._link.send(flat)
        except (CommError, ProtocolError) as exc:
            raise self._over(exc) from exc
        return total_size(flat)

    async def close(self) -> None:
        """Sends what was written, and ends the comm; a reader gets `CommClosedError`. Idempotent."""
        if not self._closed:
            self._closed = True
            self._finalizer.detach()
            await self._link.close()

    def abort(self) -> None:
        """Ends the comm at once; idempotent."""
        if not self._closed:
            self._closed = True
            self._finalizer.detach()
            self._link.abort()

    def closed(self) -> bool:
        """Whether there is nothing more to read or write: either side has ended it, and all that came was read."""
        if not self._closed and self._link.exhausted:
            self._closed = True
            self._finalizer.detach()
        return self._closed

    def _over(self, error: Exception) -> CommClosedError:
        self.abort()
        return CommClosedError(f"in {self}: {error}")


def _end_dangling(link: FrameLink, name: str) -> None:
    """Ends the link of a comm that nobody has closed and nobody can; from any thread."""
    if link.comm.ended is not None:
        return
    _log.warning("Closing dangling link in %s", name)
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is link.loop or link.loop.is_closed():
        link.abort()
    else:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            link.loop.call_soon_threadsafe(link.abort)
