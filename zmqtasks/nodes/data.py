"""Bulk data between nodes: values of keys, asked for and given over data links.

A data link carries requests one way and answers the other; many requests are under way at the same time. A value
travels as its payload's header (inside the op) and frames (uncopied, in the frames of the message). Long answers are
cut into messages of about `CUT_BYTES`, and the answers to several requests on one link take turns message by message, so
a small request never waits for the whole of a large one. Data links are not resumed: when one breaks, all its requests
fail with `CommError`, and whoever asked tries another holder or again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import msgspec

from zmqtasks.config import Config
from zmqtasks.errors import (
    CommBrokenError,
    CommClosedError,
    CommError,
    ProtocolError,
    RemoteProtocolError,
    ZmqTasksError,
)
from zmqtasks.ids import InstanceId, Key, SessionId
from zmqtasks.nodes.links import dial, own_versions
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.frames import DATA_LIMITS, MIB, Buffer, Frames
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.ops import (
    DataIntroduction,
    DataPut,
    DataReply,
    DataRequest,
    DataSent,
    GetData,
    Goodbye,
    PutData,
)
from zmqtasks.protocol.payload import Payload
from zmqtasks.security import Security
from zmqtasks.transports.base import Comm

_log = logging.getLogger(__name__)

CUT_BYTES = 64 * MIB
CUT_KEYS = 10_000
CUT_FRAMES = DATA_LIMITS.frames - 1
QUEUE_BYTES = 16 * MIB
"""With more than this waiting to be sent on a link, answers wait for their turn."""
REQUESTS_PER_LINK = 1_000
"""With more requests waiting on a link, none is read from it."""

Read: TypeAlias = Callable[[list[Key]], Iterable[tuple[Key, Payload | str | None]]]
"""Gives the value of each key, None when it is not held, or a text when it cannot be given; may be a generator."""
Write: TypeAlias = Callable[[list[tuple[Key, Payload]]], None]


class Fetched(msgspec.Struct):
    """What came of a request: each key of it is in exactly one of the three."""

    values: dict[Key, Payload]
    missing: list[Key]
    failed: dict[Key, str]
    """Why a value that is held could not be sent."""


class DataPool:
    """Data links to any number of nodes: one per address, opened when needed.

    More than `config.data_links` are closed, the least recently used first; one with requests under way never is. The
    pool belongs to one event loop.
    """

    def __init__(self, *, security: Security, config: Config, instance_id: InstanceId, name: str) -> None:
        self._security = security
        self._config = config
        self._request = LinkRequest(DataIntroduction(name), instance_id, SessionId(b""), versions=own_versions())
        self._links: OrderedDict[str, _AskingLink] = OrderedDict()
        self._dials: dict[str, asyncio.Task[_AskingLink]] = {}
        self._closings: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def addresses(self) -> list[str]:
        """Addresses with an open link, the least recently used first."""
        return list(self._links)

    async def get(self, address: str, keys: list[Key]) -> Fetched:
        """The values of `keys` from the node at `address`.

        Raises CommError when there is no link to it, or the link fails before all is here. Waits for as long as the
        link lives: callers set their own limits. A cancelled get leaves the link usable.
        """
        if not keys:
            return Fetched({}, [], {})
        link = await self._link(address)
        try:
            return await link.get(keys)
        finally:
            self._close_surplus()

    async def put(self, address: str, items: list[tuple[Key, Payload]]) -> None:
        """Gives values to the node at `address`; they are held there when this returns.

        Raises CommError as `get` does, and when the node could not take them. After failure any of them may be held.
        """
        if not items:
            return
        link = await self._link(address)
        try:
            await link.put(items)
        finally:
            self._close_surplus()

    async def close(self) -> None:
        """Closes all links; requests under way fail with CommClosedError. Idempotent."""
        self._closed = True
        for task in list(self._dials.values()):
            task.cancel()
        if self._dials:
            await asyncio.wait(list(self._dials.values()))
        for link in list(self._links.values()):
            self._close(link)
        if self._closings:
            await asyncio.wait(self._closings)

    async def _link(self, address: str) -> _AskingLink:
        while True:
            if self._closed:
                raise CommClosedError("the data pool is closed")
            if link := self._links.get(address):
                self._links.move_to_end(address)
                return link
            task = self._dials.get(address)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._dial(address))
                self._dials[address] = task
                task.add_done_callback(_retrieve)
            try:
                # Shielded: others may wait for the same link.
                await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise CommClosedError("the data pool is closed") from None
                raise
            except ZmqTasksError as exc:
                if isinstance(exc, CommError):
                    raise type(exc)(str(exc)) from exc  # each waiter gets an error of its own
                raise CommError(f"no data link: {exc}") from exc

    async def _dial(self, address: str) -> _AskingLink:
        try:
            dialed = await dial(
                address, self._request, security=self._security, config=self._config, limits=DATA_LIMITS
            )
            link = _AskingLink(address, dialed.comm, self._link_ended)
            self._links[address] = link
            link.start(dialed.arrived.ended)
            self._close_surplus()
            return link
        finally:
            del self._dials[address]

    def _link_ended(self, link: _AskingLink) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]

    def _close_surplus(self) -> None:
        surplus = len(self._links) - self._config.data_links
        if surplus > 0:
            idle = [link for link in self._links.values() if not link.busy]
            # The newest is about to be used by whoever asked for it.
            for link in idle[: min(surplus, len(self._links) - 1)]:
                self._close(link)

    def _close(self, link: _AskingLink) -> None:
        del self._links[link.address]
        task = asyncio.get_running_loop().create_task(link.close())
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)


class _Waiting:
    """A request under way."""

    __slots__ = ("fetched", "future", "outstanding")

    def __init__(self, keys: Iterable[Key]) -> None:
        self.future: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.outstanding = set(keys)
        self.fetched = Fetched({}, [], {})


class _AskingLink:
    """The asking side of a data link."""

    def __init__(self, address: str, comm: Comm, on_ended: Callable[[_AskingLink], None]) -> None:
        self.address = address
        self._comm = comm
        self._on_ended = on_ended
        self._codec = Codec(DataReply)
        self._requests = 0
        self._waiting: dict[int, _Waiting] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def start(self, ended: Exception | None) -> None:
        self._comm.set_handler(self)
        if ended is not None:
            self.comm_ended(ended)
        else:
            self._comm.resume_receiving()

    async def get(self, keys: list[Key]) -> Fetched:
        number = self._next_request()
        waiting = _Waiting(keys)
        frame = self._codec.encode(0, 0, (GetData(number, keys),))
        return await self._answer(number, waiting, [frame])

    async def put(self, items: list[tuple[Key, Payload]]) -> None:
        answers: list[asyncio.Future[Fetched]] = []
        try:
            for part in _cut((key, payload) for key, payload in items):
                number = self._next_request()
                op = PutData(number, part.keys, part.headers, part.frame_counts)
                waiting = _Waiting(part.keys)
                self._send(number, waiting, [self._codec.encode(0, 0, (op,)), *part.frames])
                answers.append(waiting.future)
                await self._comm.drain()
            for answer in answers:
                await answer
        finally:
            for answer in answers:
                answer.cancel()
                _retrieve(answer)

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
                match op:
                    case DataSent():
                        self._on_data_sent(op, frames)
                    case DataPut():
                        self._on_data_put(op)
                    case _:
                        self._fail(CommClosedError(f"{self.address} closed the data link: {op.reason}", by="peer"))
        except ProtocolError as exc:
            _log.warning("the data link to %s ends: %s", self.address, exc)
            self._comm.abort("given up")
            self._fail(CommBrokenError(f"the data link to {self.address} ended: {exc}"))

    def comm_ended(self, error: Exception) -> None:
        self._fail(error)

    def _next_request(self) -> int:
        self._requests += 1
        return self._requests

    async def _answer(self, number: int, waiting: _Waiting, frames: Frames) -> Fetched:
        self._send(number, waiting, frames)
        return await waiting.future

    def _send(self, number: int, waiting: _Waiting, frames: Frames) -> None:
        self._comm.send(frames)
        self._waiting[number] = waiting
        waiting.future.add_done_callback(lambda _: self._waiting.pop(number, None))

    def _on_data_sent(self, op: DataSent, frames: list[memoryview]) -> None:
        values = _payloads_untrusted(op.keys, op.headers, op.frame_counts, frames)
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
            waiting.future.set_result(fetched)

    def _on_data_put(self, op: DataPut) -> None:
        waiting = self._waiting.get(op.request)
        if waiting is None:
            self._check_past(op.request)
        elif not waiting.future.done():
            if op.error:
                waiting.future.set_exception(CommError(f"{self.address} could not take data: {op.error}"))
            else:
                waiting.future.set_result(waiting.fetched)

    def _check_past(self, number: int) -> None:
        """An answer that nobody waits for must be to a request that was given up."""
        if not 0 < number <= self._requests:
            raise RemoteProtocolError(f"{self.address} answered request {number}, which was never made")

    def _fail(self, error: Exception) -> None:
        self._on_ended(self)
        for waiting in list(self._waiting.values()):
            if not waiting.future.done():
                waiting.future.set_exception(_comm_error(self.address, error))
        self._waiting.clear()


class DataServer:
    """Answers data links that an acceptor has admitted.

    `read` and `write` run in the event loop; `read` may be a generator that makes one value at a time: it goes on when
    the values before have been sent.
    """

    def __init__(self, read: Read, write: Write) -> None:
        self._read = read
        self._write = write
        self._links: set[_AnsweringLink] = set()

    def serve(self, comm: Comm) -> None:
        """Answers requests on a comm whose handshake is done, until it ends."""
        link = _AnsweringLink(comm, self._read, self._write, self._links.discard)
        self._links.add(link)
        comm.set_handler(link)

    async def close(self) -> None:
        """Closes all links, after what was being sent on them; idempotent."""
        links, self._links = self._links, set()
        if links:
            await asyncio.wait([asyncio.ensure_future(link.close()) for link in links])


class _AnsweringLink:
    """The answering side of a data link."""

    def __init__(self, comm: Comm, read: Read, write: Write, on_ended: Callable[[_AnsweringLink], None]) -> None:
        self._comm = comm
        self._read = read
        self._write = write
        self._on_ended = on_ended
        self._codec = Codec(DataRequest)
        self._answers: deque[Iterator[Frames]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._paused = False

    def message_received(self, frames: list[memoryview]) -> None:
        try:
            _, _, ops = self._codec.decode_untrusted(frames[0])
            for op in ops:
                match op:
                    case GetData():
                        self._on_get_data(op)
                    case PutData():
                        self._on_put_data(op, frames)
                    case _:
                        pass  # the peer closes next
        except ProtocolError as exc:
            _log.warning("the data link with %s ends: %s", self._comm.peer_address, exc)
            self._leave(str(exc))
        except CommError:
            pass  # comm_ended comes next

    def comm_ended(self, error: Exception) -> None:
        self._answers.clear()
        if self._task is not None:
            self._task.cancel()
        self._on_ended(self)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._answers.clear()
        await self._comm.close()

    def _on_get_data(self, op: GetData) -> None:
        answer = _answer(self._codec, op, self._read)
        if self._task is None and self._comm.queued_bytes < QUEUE_BYTES:
            # The common case, a small answer on a free link, needs no task.
            for message in itertools.islice(answer, 1):
                self._comm.send(message)
            following = next(answer, None)
            if following is None:
                return
            answer = itertools.chain((following,), answer)
        self._answers.append(answer)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._send_answers())
        if len(self._answers) > REQUESTS_PER_LINK and not self._paused:
            self._paused = True
            self._comm.pause_receiving()

    def _on_put_data(self, op: PutData, frames: list[memoryview]) -> None:
        items = list(_payloads_untrusted(op.keys, op.headers, op.frame_counts, frames).items())
        error = ""
        try:
            self._write(items)
        except Exception as exc:
            _log.exception("taking data from %s failed", self._comm.peer_address)
            error = f"{type(exc).__name__}: {exc}"
        self._comm.send([self._codec.encode(0, 0, (DataPut(op.request, error),))])

    async def _send_answers(self) -> None:
        """Sends the messages of all answers in turns, as fast as the peer takes them."""
        try:
            while self._answers:
                await self._comm.drain()
                answer = self._answers.popleft()
                message = next(answer, None)
                if message is not None:
                    self._comm.send(message)
                    self._answers.append(answer)
                elif self._paused and len(self._answers) < REQUESTS_PER_LINK // 2:
                    self._paused = False
                    self._comm.resume_receiving()
                await asyncio.sleep(0)  # drain returns at once on a fast link, and other links have their turn too
        except CommError:
            pass  # comm_ended comes, or has come
        finally:
            self._task = None

    def _leave(self, reason: str) -> None:
        try:
            self._comm.send([self._codec.encode(0, 0, (Goodbye(reason[:1000]),))])
        except CommError:
            return
        self._closing = asyncio.get_running_loop().create_task(self._comm.close())


class _Part(NamedTuple):
    """Values that travel in one message."""

    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    frames: list[Buffer]


def _cut(items: Iterable[tuple[Key, Payload]]) -> Iterator[_Part]:
    """Values in messages of about `CUT_BYTES`; a larger value has a message of its own."""
    part, size = _Part([], [], [], []), 0
    for key, payload in items:
        added = payload.nbytes
        if part.keys and (
            size + added > CUT_BYTES
            or len(part.keys) >= CUT_KEYS
            or len(part.frames) + len(payload.frames) > CUT_FRAMES
        ):
            yield part
            part, size = _Part([], [], [], []), 0
        part.keys.append(key)
        part.headers.append(payload.header)
        part.frame_counts.append(len(payload.frames))
        part.frames.extend(payload.frames)
        size += added
    if part.keys:
        yield part


def _answer(codec: Codec, op: GetData, read: Read) -> Iterator[Frames]:
    """The messages that answer one request; whatever `read` does, each key is answered for."""
    unanswered = dict.fromkeys(op.keys)
    missing: list[Key] = []
    failed: dict[Key, str] = {}

    def values() -> Iterator[tuple[Key, Payload]]:
        try:
            for key, value in read(list(unanswered)):
                del unanswered[key]
                if value is None:
                    missing.append(key)
                elif isinstance(value, str):
                    failed[key] = value
                elif len(value.frames) > CUT_FRAMES:
                    failed[key] = f"it has {len(value.frames)} buffers, a message takes {CUT_FRAMES}"
                else:
                    yield key, value
        except Exception as exc:
            _log.exception("reading data for a peer failed")
            failed.update(dict.fromkeys(unanswered, f"{type(exc).__name__}: {exc}"))
            unanswered.clear()

    for part in _cut(values()):
        sent = DataSent(op.request, part.keys, part.headers, part.frame_counts)
        yield [codec.encode(0, 0, (sent,)), *part.frames]
    missing.extend(unanswered)
    if missing or failed:
        rest = DataSent(op.request, [], [], [], missing, list(failed), list(failed.values()))
        yield [codec.encode(0, 0, (rest,))]


def _payloads_untrusted(
    keys: list[Key], headers: list[bytes], frame_counts: list[int], frames: list[memoryview]
) -> dict[Key, Payload]:
    """The values in a message from a peer; RemoteProtocolError when the columns and the frames do not fit together."""
    if not len(keys) == len(headers) == len(frame_counts):
        raise RemoteProtocolError(
            f"the peer sent {len(keys)} keys with {len(headers)} headers and {len(frame_counts)} frame counts"
        )
    if sum(frame_counts) != len(frames) - 1 or min(frame_counts, default=0) < 0:
        raise RemoteProtocolError(f"the peer sent {len(frames) - 1} frames and counts of {sum(frame_counts)}")
    values: dict[Key, Payload] = {}
    position = 1
    for key, header, count in zip(keys, headers, frame_counts, strict=True):
        values[key] = Payload(header, tuple(frames[position : position + count]))
        position += count
    return values


def _comm_error(address: str, error: Exception) -> CommError:
    """An error of its own for each request that a link takes with it."""
    kind = CommClosedError if isinstance(error, CommClosedError) else CommBrokenError
    made = kind(f"the data link to {address} ended before the answer was complete: {error}")
    made.__cause__ = error
    return made


def _retrieve(future: asyncio.Future[Fetched] | asyncio.Task[_AskingLink]) -> None:
    """Marks an exception as seen: it has been raised where it matters, or nobody waits any more."""
    if future.done() and not future.cancelled():
        future.exception()
