"""Questions to the scheduler and their answers. All of it runs in the node's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from zmqtasks.errors import SerializationError, ZmqTasksError
from zmqtasks.ids import Key
from zmqtasks.protocol.ops import (
    Locations,
    Op,
    Query,
    QueryAnswered,
    RequestLocations,
    Restart,
    RunFinished,
    RunFunction,
)

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode


class QueryError(ZmqTasksError):
    """The scheduler could not do what it was asked for; the message says why."""


class Requests:
    """What one client has asked, by number."""

    def __init__(self, node: ClientNode) -> None:
        self._node = node
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._runs: dict[int, list[RunFinished]] = {}
        self._held: list[Any] = []
        self._holds = False

    # Asking

    async def query(self, what: str, keys: Iterable[Key] = (), workers: Iterable[str] = ()) -> Any:
        """The scheduler's answer to a question, as plain data. Raises QueryError."""
        return await self.ask(lambda request: Query(request, what, list(keys), list(workers)))

    async def ask(self, make: Callable[[int], Op]) -> Any:
        """The answer to the op that `make` gives for the number of the request, as plain data. Raises QueryError."""
        return _opened(await self._ask(make))

    async def restart(self, timeout_s: float) -> Any:
        """Restarts the workers; the scheduler's answer. Raises QueryError."""
        return await self.ask(lambda request: Restart(request, timeout_s))

    async def run(self, function: bytes, workers: list[str], on_nanny: bool) -> list[RunFinished]:
        """Calls a function on workers; the answers in the order in which they came."""
        return await self.collect(lambda request: RunFunction(request, function, workers, on_nanny))

    async def collect(self, make: Callable[[int], Op]) -> list[RunFinished]:
        """All answers to the op that `make` gives for the number of the request; one without a worker is about the whole."""
        number = 0

        def numbered(request: int) -> Op:
            nonlocal number
            number = request
            self._runs[request] = []
            return make(request)

        try:
            await self._ask(numbered)
            return self._runs[number]
        finally:
            self._runs.pop(number, None)

    async def locate(self, keys: list[Key]) -> dict[Key, list[str]]:
        """The data addresses of who holds `keys` now."""
        answer: Locations = await self._ask(lambda request: RequestLocations(request, keys))
        return dict(zip(answer.keys, answer.holders, strict=True))

    async def settle(self) -> None:
        """Returns when the scheduler has taken all that this client has sent up to now."""
        await self.locate([])

    def hold(self, objects: list[Any]) -> None:
        """Keeps objects alive until the scheduler has taken all that this client has sent up to now. In the node's loop."""
        self._held += objects
        if not self._holds:
            self._holds = True
            self._node.keep_task(self._settle_held())

    async def _settle_held(self) -> None:
        try:
            while self._held:
                held, self._held = self._held, []  # noqa: F841 - it lives until the answer is here
                await self.settle()
        except ZmqTasksError:  # the client has ended
            self._held = []
        finally:
            self._holds = False

    async def _ask(self, make: Callable[[int], Op]) -> Any:
        node = self._node
        node.check_usable()
        with node.lock:
            request = node.machine.next_request()
            node.machine.send(make(request))
        future = self._waiting[request] = node.loop.create_future()
        node.flush()
        try:
            return await future
        finally:
            self._waiting.pop(request, None)

    # Answers

    def answered(self, request: int, answer: object) -> None:
        """The answer, or the last of several."""
        future = self._waiting.pop(request, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def run_finished(self, op: RunFinished) -> None:
        """One worker's answer; without a worker: there are no more."""
        answers = self._runs.get(op.request)
        if answers is None:
            return
        if op.worker:
            answers.append(op)
        else:
            if op.error:
                answers.append(op)
            self.answered(op.request, None)

    def fail(self, error: Exception) -> None:
        """No answers will come any more."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever asked may have stopped waiting


def _opened(answer: QueryAnswered) -> Any:
    if answer.error:
        raise QueryError(answer.error)
    try:
        return msgspec.msgpack.decode(answer.answer, strict=False) if answer.answer else None
    except msgspec.MsgspecError as exc:
        raise SerializationError(f"the scheduler's answer cannot be read: {exc}") from exc
