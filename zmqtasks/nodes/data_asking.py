"""The asking side of one data link: requests that are under way, what comes of them, and when nothing more will come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable

import msgspec

from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    ProtocolError,
    RemoteProtocolError,
)
from zmqtasks.ids import Key
from zmqtasks.nodes.data_messages import cut, payloads_untrusted
from zmqtasks.nodes.data_packing import Batch, Inbox, Packer
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.compression import LinkRate
from zmqtasks.protocol.frames import Frames, total_size
from zmqtasks.protocol.ops import (
    DataPut,
    DataReply,
    DataSent,
    DropRequest,
    GetData,
    Goodbye,
    PutData,
)
from zmqtasks.protocol.payload import Payload
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Comm

_log = logging.getLogger(__name__)

LOOKS = 8
"""A silence is measured by so many looks: a loop that stood still itself, or was stopped, takes one look when it goes on,
and then what has come meanwhile."""


class Fetched(msgspec.Struct):
    """What came of a request: each key of it is in exactly one of the three, unless the link broke."""

    values: dict[Key, Payload]
    missing: list[Key]
    failed: dict[Key, str]
    """Why a value that is held could not be sent."""
    broken: CommError | None = None
    """The link failed after a part of the answer had come."""

    def unanswered(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that are in none of the three."""
        told = {*self.values, *self.missing, *self.failed}
        return [key for key in keys if key not in told]


class LinkFacts(msgspec.Struct, frozen=True):
    """How an open data link travels."""

    transport: str
    """The scheme of what carries the bytes, whatever the address said."""
    local_address: str
    peer_address: str
    same_host: bool
    encrypted: bool
    compression: dict[str, int] = {}
    """Frames and bytes so far, by the names of `compression.Counters`."""
    bytes_per_s: float = 0.0
    """What the link takes, as far as it is known; 0: nobody needs to know, nothing is ever compressed on it."""


class _Waiting:
    """A request under way."""

    __slots__ = ("began", "bytes", "fetched", "future", "outstanding")

    def __init__(self, keys: Iterable[Key]) -> None:
        self.future: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.outstanding = set(keys)
        self.fetched = Fetched({}, [], {})
        self.began = time.monotonic()
        self.bytes = 0
        """Of payloads, that have passed for it."""


class AskingLink:
    """The asking side of a data link."""

    def __init__(
        self, address: str, comm: Comm, packer: Packer, silence_s: float, on_ended: Callable[[AskingLink], None]
    ) -> None:
        self.address = address
        self._silence_s = silence_s
        self._silent_looks = 0
        self._received = self._handed_over = 0
        self._looking: asyncio.TimerHandle | None = None
        self._comm = comm
        self._packer = packer
        self._inbox = Inbox(comm, self._handle, self._give_up, packer.decompressed)
        self._incoming = LinkRate()
        self._on_ended = on_ended
        self._codec = Codec(DataReply)
        self._requests = 0
        self._waiting: dict[int, _Waiting] = {}
        self.ended: Exception | None = None

    @property
    def received_bytes(self) -> int:
        return self._comm.statistics().bytes_received

    @property
    def facts(self) -> LinkFacts:
        comm = self._comm
        scheme, _ = split_scheme(comm.peer_address)
        rate = self._packer.rate.bytes_per_s if self._packer.codec else 0.0
        return LinkFacts(
            scheme,
            comm.local_address,
            comm.peer_address,
            comm.same_host,
            comm.encrypted,
            self._packer.counters.as_dict(),
            rate,
        )

    def start(self, ended: Exception | None) -> None:
        self._comm.set_handler(self)
        if ended is not None:
            self.comm_ended(ended)
        else:
            self._comm.resume_receiving()

    async def get(self, keys: list[Key]) -> Fetched:
        number = self._next_request()
        waiting = _Waiting(keys)
        frame = self._codec.encode(0, 0, (GetData(number, keys, int(self._incoming.proven)),))
        self._send(number, waiting, [frame])
        try:
            return await waiting.future
        except asyncio.CancelledError:
            self._drop(number)
            raise

    async def put(self, items: list[tuple[Key, Payload]]) -> None:
        answers: list[asyncio.Future[Fetched]] = []
        try:
            for part in cut((key, payload) for key, payload in items):
                number = self._next_request()
                op, frames = await self._packer.pack(
                    PutData(number, part.keys, part.headers, part.frame_counts), part.frames
                )
                waiting = _Waiting(part.keys)
                waiting.bytes = total_size(frames)
                self._send(number, waiting, [self._codec.encode(0, 0, (op,)), *frames])
                answers.append(waiting.future)
                await self._packer.drain()
            for answer in answers:
                await answer
        finally:
            for answer in answers:
                answer.cancel()
                retrieve(answer)

    async def close(self) -> None:
        self._fail(CommClosedError(f"the data link to {self.address} is closed"))
        try:
            self._comm.send([self._codec.encode(0, 0, (Goodbye(),))])
        except CommError:
            pass
        await self._comm.close()

    def message_received(self, frames: list[memoryview]) -> None:
        try:
            _, _, ops = self._codec.decode_untrusted(frames[0])
            for op in ops:
                if isinstance(op, DataSent):
                    if waiting := self._waiting.get(op.request):
                        waiting.bytes += total_size(frames)
                    else:
                        self._check_past(op.request)  # before anything is unpacked that nobody has asked for
            self._inbox.received_untrusted(ops, frames)
        except ProtocolError as exc:
            self._give_up(exc)

    def comm_ended(self, error: Exception) -> None:
        self._inbox.at_end(lambda: self._fail(error))

    def _handle(self, ops: Batch, frames: list[memoryview]) -> None:
        for op in ops:
            match op:
                case DataSent():
                    self._on_data_sent(op, frames)
                case DataPut():
                    self._on_data_put(op)
                case _:
                    reason = "".join(char if char.isprintable() else " " for char in op.reason)
                    self._fail(CommClosedError(f"{self.address} closed the data link: {reason}", by="peer"))
                    self._comm.abort("given up")
                    return

    def _give_up(self, error: ProtocolError) -> None:
        _log.warning("the data link to %s ends: %s", self.address, error)
        self._comm.abort("given up")
        self._fail(CommBrokenError(f"the data link to {self.address} ended: {error}"))

    def _next_request(self) -> int:
        self._requests += 1
        return self._requests

    def _drop(self, number: int) -> None:
        """What is not on its way yet need not come: it would share the link with what is wanted."""
        if self.ended is None:
            with contextlib.suppress(CommError):  # comm_ended comes next
                self._packer.send([self._codec.encode(0, 0, (DropRequest(number),))])

    def _send(self, number: int, waiting: _Waiting, frames: Frames) -> None:
        self._packer.send(frames)
        self._waiting[number] = waiting
        waiting.future.add_done_callback(lambda _: self._waiting.pop(number, None))
        if self._looking is None:
            self._has_moved()
            self._silent_looks = 0
            self._look_later()

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self._silence_s / LOOKS, self._look)

    def _look(self) -> None:
        """Ends a link on which nothing passes although something is asked for: others may have the values."""
        self._looking = None
        if not self._waiting:
            return
        self._silent_looks = 0 if self._has_moved() else self._silent_looks + 1
        if self._silent_looks < LOOKS:
            self._look_later()
            return
        self._comm.abort("given up")
        self._fail(CommBrokenError(f"nothing has passed for {self._silence_s:g} s"))

    def _has_moved(self) -> bool:
        """Whether bytes have come, or the peer has taken some, since the last call."""
        comm = self._comm.statistics()
        received, handed_over = comm.bytes_received, comm.bytes_sent - comm.queued_bytes
        moved = received > self._received or handed_over > self._handed_over
        # What is queued may count a little more than what was sent: only more than ever before is news.
        self._received, self._handed_over = received, max(handed_over, self._handed_over)
        return moved

    def _on_data_sent(self, op: DataSent, frames: list[memoryview]) -> None:
        values = payloads_untrusted(op.keys, op.headers, op.frame_counts, frames)
        if len(op.failed) != len(op.reasons):
            raise RemoteProtocolError(f"{self.address} sent {len(op.failed)} failures with {len(op.reasons)} reasons")
        waiting = self._waiting.get(op.request)
        if waiting is None:
            self._check_past(op.request)
            return
        fetched, outstanding = waiting.fetched, waiting.outstanding
        for key in (*op.keys, *op.missing, *op.failed):
            try:
                outstanding.remove(key)
            except KeyError:
                raise RemoteProtocolError(f"{self.address} answered for key {key!r}, which was not asked for") from None
        fetched.values.update(values)
        fetched.missing += op.missing
        fetched.failed.update(zip(op.failed, op.reasons, strict=True))
        if not outstanding and not waiting.future.done():
            self._incoming.at_least(waiting.bytes, time.monotonic() - waiting.began)
            waiting.future.set_result(fetched)

    def _on_data_put(self, op: DataPut) -> None:
        waiting = self._waiting.get(op.request)
        if waiting is None:
            self._check_past(op.request)
        elif not waiting.future.done():
            if op.error:
                waiting.future.set_exception(CommError(f"{self.address} could not take data: {op.error}"))
            else:
                self._packer.rate.at_least(waiting.bytes, time.monotonic() - waiting.began)
                waiting.future.set_result(waiting.fetched)

    def _check_past(self, number: int) -> None:
        """An answer that nobody waits for must be to a request that was given up."""
        if not 0 < number <= self._requests:
            raise RemoteProtocolError(f"{self.address} answered request {number}, which was never made")

    def _fail(self, error: Exception) -> None:
        self.ended = self.ended or error
        self._inbox.stop()
        self._on_ended(self)
        if self._looking is not None:
            self._looking.cancel()
        for waiting in list(self._waiting.values()):
            if not waiting.future.done():
                fetched, broken = waiting.fetched, comm_error(self.address, error)
                if fetched.values or fetched.missing or fetched.failed:
                    fetched.broken = broken
                    waiting.future.set_result(fetched)
                else:
                    waiting.future.set_exception(broken)
        self._waiting.clear()


def comm_error(address: str, error: Exception) -> CommError:
    """An error of its own for each request that a link takes with it."""
    kind = CommClosedError if isinstance(error, CommClosedError) else CommBrokenError
    made = kind(f"the data link to {address} ended before the answer was complete: {error}")
    made.__cause__ = error
    return made


def retrieve(future: asyncio.Future[Fetched] | asyncio.Task[AskingLink]) -> None:
    """Marks an exception as seen: it has been raised where it matters, or nobody waits any more."""
    if future.done() and not future.cancelled():
        future.exception()
