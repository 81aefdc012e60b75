"""What programs and tasks share by name, seen from a client: one request at a time to the scheduler, which keeps the books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from uuid import uuid4

from zmqtasks import sessions
from zmqtasks.errors import ConfigError, PayloadTooLargeError, ZmqTasksError
from zmqtasks.fetching import await_on, run_on, task_waiting
from zmqtasks.foreign import ForeignFutures
from zmqtasks.ids import Key
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.nodes.client.requests import QueryError
from zmqtasks.protocol.ops import GiveUp, Op, Received
from zmqtasks.protocol.serialize import collect_references, deserialize_inline, serialize_inline

if TYPE_CHECKING:
    from zmqtasks.client import Client

Timeout: TypeAlias = float | str | timedelta | None

BYTES_PER_FUTURE = 1024
"""By so much the limit for a shared value is higher for each future inside: a collection of many parts is a graph of futures."""


class Request:
    """One request to the scheduler. Whatever ends the wait for its answer, what it asked for is given up then."""

    def __init__(self, node: ClientNode, make: Callable[[int], Op], error: type[ZmqTasksError]) -> None:
        self.node = node
        self.number = 0
        self._given_up = False
        self._make = make
        self._error = error

    def _numbered(self, number: int) -> Op:
        # Under the lock under which the op is queued: either it is not sent at all, or a `GiveUp` that knows it comes after it.
        if self._given_up:
            raise asyncio.CancelledError
        self.number = number
        return self._make(number)

    async def _run(self) -> Any:
        return await self.node.requests.ask(self._numbered)

    def give_up(self) -> None:
        """Gives back what was granted, or ends the wait, whichever it is by now."""
        with self.node.lock:  # an interrupt may come before the loop has begun with the coroutine
            self._given_up = True
        if self.number and not self.node.ended:
            self.node.tell(GiveUp(0, self.number))

    def received(self) -> None:
        """What was granted has arrived, and is this client's own now."""
        self.node.tell(Received(self.number))

    def _ended(self, error: BaseException) -> BaseException:
        if isinstance(error, QueryError):
            return self._error(str(error))
        self.give_up()
        return error

    def wait(self, keeps_slot: bool) -> Any:
        """The answer, for a thread; a task gives its slot back meanwhile, or `keeps_slot`."""
        try:
            with nullcontext() if keeps_slot else task_waiting():
                return run_on(self.node, self._run)
        except BaseException as exc:
            raise self._ended(exc) from None

    async def wait_async(self) -> Any:
        """The answer, for a coroutine in any loop."""
        try:
            with task_waiting():
                return await await_on(self.node, self._run())
        except BaseException as exc:
            raise self._ended(exc) from None


Then: TypeAlias = Callable[[Request, Any], Any]
"""What to make of an answer."""


class Named:
    """What has a name on the cluster, and a client to ask for it: at first use, that of `get_client`."""

    _prefix = ""
    _keeps_slot = False
    _error: type[ZmqTasksError] = ZmqTasksError

    def __init__(self, name: str | None, client: Client | None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name={name!r}: give a text, or nothing for a new name")
        self.name = name or f"{self._prefix}-{uuid4().hex}"
        self._given_client = client

    @property
    def client(self) -> Client:
        """Through which it is used."""
        if self._given_client is None:
            self._given_client = sessions.get_client()
        return self._given_client

    def _ask(self, make: Callable[[int], Op], then: Then | None = None) -> Any:
        """The scheduler's answer, or what `then` makes of it; something to await for an asynchronous caller."""
        return ask(self.client, make, then, self._error, self._keeps_slot)

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.name}>"


def ask(
    client: Client,
    make: Callable[[int], Op],
    then: Then | None,
    error: type[ZmqTasksError],
    keeps_slot: bool = False,
) -> Any:
    """The scheduler's answer, or what `then` makes of it; something to await for an asynchronous caller.

    `error` is raised when the scheduler refuses.
    """
    request = Request(client._node, make, error)
    if client._called_asynchronously():
        return _ask_async(request, then)
    try:
        answer = request.wait(keeps_slot)
        return answer if then is None else then(request, answer)
    except BaseException:  # an interrupt, or what can't be read here: nobody will have what was granted
        request.give_up()
        raise


async def _ask_async(request: Request, then: Then | None) -> Any:
    answer = await request.wait_async()
    try:
        return answer if then is None else then(request, answer)
    except BaseException:
        request.give_up()
        raise


class SharedValue:
    """An object on its way into the scheduler: its bytes, and the keys of the futures inside.

    It keeps the object: futures live at least until the request that brings their keys has been answered.
    """

    def __init__(self, client: Client, value: Any, title: str) -> None:
        limit = client._node.config.shared_value_bytes
        if hasattr(type(value), "__array_interface__") and value.nbytes > limit:  # not worth to be pickled
            raise too_large(title, value.nbytes, limit)
        with collect_references() as notes:
            self.data = serialize_inline(value)
        self.keys: list[Key] = list(dict.fromkeys(ForeignFutures(client._node).keys(notes)))
        limit += BYTES_PER_FUTURE * len(self.keys)
        if len(self.data) > limit:
            raise too_large(title, len(self.data), limit)
        self.value = value


def too_large(title: str, size: int, limit: int) -> PayloadTooLargeError:
    """The error for a value that the scheduler should not be asked to keep."""
    return PayloadTooLargeError(
        f"the value for {title} takes {size} bytes, over the limit of {limit} (ZMQTASKS_SHARED_VALUE_BYTES): "
        "scatter it, and share its future: client.scatter(...)"
    )


def opened(client: Client, data: bytes) -> Any:
    """The object of a shared value; futures inside belong to `client`."""
    receiving = sessions.receiving
    outer, receiving.client = receiving.client, client
    try:
        return deserialize_inline(bytearray(data))  # arrays are to be writable
    finally:
        receiving.client = outer


def take_over(client: Client, request: Request, blobs: list[bytes]) -> list[Any]:
    """The objects of values that the scheduler holds for `request`, which are this client's when they could be opened.

    Futures inside are wanted by the time that the scheduler hears so: it handles ops in order.
    """
    values = [opened(client, data) for data in blobs]
    request.received()
    return values


def checked_maxsize(maxsize: Any) -> int:
    """A bound for a queue; raises ConfigError."""
    if not isinstance(maxsize, int) or maxsize < 0:
        raise ConfigError(f"maxsize={maxsize!r}: give a number of values, or 0 for any number")
    return maxsize
