"""The answering side of data links."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from zmqtasks.errors import CommError, ProtocolError
from zmqtasks.ids import Key
from zmqtasks.nodes.data_messages import CUT_FRAMES, cut, payloads_untrusted
from zmqtasks.nodes.data_packing import Batch, Inbox, Packer
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.compression import Counters
from zmqtasks.protocol.frames import MIB, Buffer
from zmqtasks.protocol.ops import DataPut, DataRequest, DataSent, DropRequest, GetData, Goodbye, PutData
from zmqtasks.protocol.payload import Payload
from zmqtasks.transports.base import Comm

_log = logging.getLogger(__name__)

QUEUE_BYTES = 16 * MIB
"""With more than this waiting to be sent on a link, answers wait for their turn."""
REQUESTS_PER_LINK = 1_000
"""With more requests waiting on a link, none is read from it."""

Read: TypeAlias = Callable[[list[Key]], Iterable[tuple[Key, Payload | str | None]]]
"""Gives the value of each key, None when it is not held, or a text when it cannot be given; may be a generator."""
Write: TypeAlias = Callable[[list[tuple[Key, Payload]]], None]
_Message: TypeAlias = tuple[DataSent, Sequence[Buffer]]


class DataServer:
    """Answers data links that an acceptor has admitted.

    `read` and `write` run in the event loop; `read` may be a generator that makes one value at a time: it goes on when
    the values before have been sent.
    """

    def __init__(self, read: Read, write: Write) -> None:
        self._read = read
        self._write = write
        self._links: set[_AnsweringLink] = set()
        self.compression = Counters()
        """Of all its links so far."""

    def serve(self, comm: Comm, theirs: Sequence[str] = (), compression: str = "auto") -> None:
        """Answers requests on a comm whose handshake is done, until it ends.

        `theirs` are the codecs that the peer can read, `compression` is the mode of the configuration.
        """
        packer = Packer(comm, compression, theirs, self.compression)
        link = _AnsweringLink(comm, self._read, self._write, packer, self._links.discard)
        self._links.add(link)
        comm.set_handler(link)

    async def close(self) -> None:
        """Closes all links, after what was being sent on them; idempotent."""
        links, self._links = self._links, set()
        if links:
            await asyncio.wait([asyncio.ensure_future(link.close()) for link in links])


class _Answer:
    """An answer that is under way."""

    __slots__ = ("messages", "request")

    def __init__(self, request: int, messages: Iterator[_Message]) -> None:
        self.request = request
        self.messages = messages


class _AnsweringLink:
    """The answering side of a data link."""

    def __init__(
        self, comm: Comm, read: Read, write: Write, packer: Packer, on_ended: Callable[[_AnsweringLink], None]
    ) -> None:
        self._comm = comm
        self._packer = packer
        self._inbox = Inbox(comm, self._handle, self._give_up, packer.decompressed)
        self._read = read
        self._write = write
        self._on_ended = on_ended
        self._codec = Codec(DataRequest)
        self._answers: deque[_Answer] = deque()
        self._by_request: dict[int, _Answer] = {}
        self._task: asyncio.Task[None] | None = None
        self._too_many_asked = False

    def message_received(self, frames: list[memoryview]) -> None:
        try:
            _, _, ops = self._codec.decode_untrusted(frames[0])
            self._inbox.received_untrusted(ops, frames)
        except ProtocolError as exc:
            self._give_up(exc)

    def _handle(self, ops: Batch, frames: list[memoryview]) -> None:
        try:
            for op in ops:
                match op:
                    case GetData():
                        self._on_get_data(op)
                    case PutData():
                        self._on_put_data(op, frames)
                    case DropRequest():
                        self._on_drop_request(op)
                    case _:
                        pass  # the peer closes next
        except CommError:
            pass  # comm_ended comes next

    def _give_up(self, error: ProtocolError) -> None:
        _log.warning("the data link with %s ends: %s", self._comm.peer_address, error)
        self._leave(str(error))

    def comm_ended(self, error: Exception) -> None:
        self._inbox.stop()
        self._answers.clear()
        self._by_request.clear()
        if self._task is not None:
            self._task.cancel()
        self._on_ended(self)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._inbox.stop()
        self._answers.clear()
        self._by_request.clear()
        await self._comm.close()

    def _on_get_data(self, op: GetData) -> None:
        self._packer.rate.told = max(0, op.seen_rate)
        messages = _answer(op, self._read)
        if self._task is None and self._comm.queued_bytes < QUEUE_BYTES:
            # The common case, a small answer on a free link, needs no task.
            message = next(messages, None)
            if message is not None and self._is_sent_at_once(*message):
                message = next(messages, None)
            if message is None:
                return
            messages = itertools.chain((message,), messages)
        answer = _Answer(op.request, messages)
        self._answers.append(answer)
        self._by_request[op.request] = answer
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._send_answers())
        if len(self._answers) > REQUESTS_PER_LINK and not self._too_many_asked:
            self._too_many_asked = True
            self._inbox.pause()

    def _on_drop_request(self, op: DropRequest) -> None:
        if (answer := self._by_request.get(op.request)) is not None:
            answer.messages = iter(())  # it ends at its next turn

    def _on_put_data(self, op: PutData, frames: list[memoryview]) -> None:
        items = list(payloads_untrusted(op.keys, op.headers, op.frame_counts, frames).items())
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
                await self._packer.drain()
                answer = self._answers.popleft()
                message = next(answer.messages, None)
                if message is not None:
                    await self._pack_and_send(*message)
                    self._answers.append(answer)
                else:
                    self._by_request.pop(answer.request, None)
                    if self._too_many_asked and len(self._answers) < REQUESTS_PER_LINK // 2:
                        self._too_many_asked = False
                        self._inbox.resume()
                await asyncio.sleep(0)  # drain returns at once on a fast link, and other links have their turn too
        except CommError:
            pass  # comm_ended comes, or has come
        except Exception as exc:  # nobody would answer the requests that wait
            _log.exception("answering %s failed", self._comm.peer_address)
            self._comm.abort(f"{type(exc).__name__}: {exc}")
        finally:
            self._task = None

    def _is_sent_at_once(self, op: DataSent, frames: Sequence[Buffer]) -> bool:
        try:
            if not self._packer.goes_at_once(frames):
                return False
            self._send(op, frames)
        except CommError:
            raise
        except Exception as exc:
            self._refuse(op, frames, exc)
        return True

    async def _pack_and_send(self, op: DataSent, frames: Sequence[Buffer]) -> None:
        try:
            self._send(*await self._packer.pack(op, frames))
        except CommError:
            raise
        except Exception as exc:
            self._refuse(op, frames, exc)

    def _refuse(self, op: DataSent, frames: Sequence[Buffer], error: Exception) -> None:
        """Says why a value cannot be sent: it has buffers that no transport takes, say."""
        if len(op.keys) > 1:  # only one of them may be to blame
            for key, part, buffers in _split(op, frames):
                try:
                    self._send(part, buffers)
                except CommError:
                    raise
                except Exception as exc:
                    self._tell_failed(op.request, key, exc)
        else:
            self._tell_failed(op.request, op.keys[0], error)

    def _tell_failed(self, request: int, key: Key, error: Exception) -> None:
        _log.error("sending data to %s failed", self._comm.peer_address, exc_info=error)
        self._send(DataSent(request, [], [], [], [], [key], [f"{type(error).__name__}: {error}"]), [])

    def _send(self, op: DataSent, frames: Sequence[Buffer]) -> None:
        # Values stay as they are while they are held: what was made of one for this peer may serve the next.
        self._packer.send([self._codec.encode(0, 0, (op,)), *frames], lasting=True)

    def _leave(self, reason: str) -> None:
        try:
            self._comm.send([self._codec.encode(0, 0, (Goodbye(reason[:1000]),))])
        except CommError:
            return
        self._closing = asyncio.get_running_loop().create_task(self._comm.close())


def _split(op: DataSent, frames: Sequence[Buffer]) -> Iterator[tuple[Key, DataSent, Sequence[Buffer]]]:
    """A message for each value of one."""
    position = 0
    for key, header, count in zip(op.keys, op.headers, op.frame_counts, strict=True):
        yield key, DataSent(op.request, [key], [header], [count]), frames[position : position + count]
        position += count


def _answer(op: GetData, read: Read) -> Iterator[_Message]:
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
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # values are pickled by code of users, which may as well raise SystemExit
            _log.exception("reading data for a peer failed")
            failed.update(dict.fromkeys(unanswered, f"{type(exc).__name__}: {exc}"))
            unanswered.clear()

    for part in cut(values()):
        yield DataSent(op.request, part.keys, part.headers, part.frame_counts), part.frames
    missing.extend(unanswered)
    if missing or failed:
        yield DataSent(op.request, [], [], [], missing, list(failed), list(failed.values())), []
