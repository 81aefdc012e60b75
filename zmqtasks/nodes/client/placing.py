"""Data of a client on its way to workers. All of it runs in the node's loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from zmqtasks.errors import CommError, ZmqTasksError
from zmqtasks.ids import Key
from zmqtasks.nodes.client.state import FutureState
from zmqtasks.protocol.ops import PlaceData, PlacementFailed

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

logger = logging.getLogger("zmqtasks.client")


class Placements:
    """What the scheduler has told one client to put where."""

    def __init__(self, node: ClientNode) -> None:
        self._node = node
        self._tasks: dict[asyncio.Task[None], frozenset[Key]] = {}

    def begin(self, op: PlaceData) -> None:
        """Puts data on workers; the scheduler is told of what fails, and of the rest by those workers."""
        task = self._node.loop.create_task(self._put_all(op.keys, op.addresses))
        self._tasks[task] = frozenset(op.keys)
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def under_way(self, states: Iterable[FutureState]) -> bool:
        """Whether data of these keys is on its way to a worker."""
        keys = {state.key for state in states}
        return any(not placed.isdisjoint(keys) for placed in self._tasks.values())

    async def wait(self, states: Iterable[FutureState], timeout_s: float | None) -> bool:
        """Waits until no data of these keys is on its way to a worker any more; False: that took too long."""
        keys = {state.key for state in states}
        try:
            async with asyncio.timeout(timeout_s):
                while tasks := [task for task, placed in self._tasks.items() if not placed.isdisjoint(keys)]:
                    await asyncio.wait(tasks)
        except TimeoutError:
            return False
        return True

    def cancel(self) -> None:
        """The client is closed."""
        for task in list(self._tasks):
            task.cancel()

    async def _put_all(self, keys: list[Key], addresses: list[str]) -> None:
        payloads = self._node.machine.payloads
        items = [(key, payloads[key]) for key in keys if key in payloads]
        await asyncio.gather(*[self._put(address, items) for address in addresses])

    async def _put(self, address: str, items: Sequence[Any]) -> None:
        try:
            await self._node.pool.put(address, list(items))
        except (CommError, ZmqTasksError) as exc:
            logger.debug("could not put data on %s: %s", address, exc)
            self._node.tell(PlacementFailed([key for key, _ in items], address, str(exc)))
