"""Futures of other clients among what one submits.

Keys are numbers that a scheduler hands out, so those of two clusters are alike: a future of another cluster is refused.

One of another client of the same cluster is an input like any other, but nothing orders the links of two clients. What the other
client has submitted may still be on its way, and is waited for: where blocking calls may be made, and if that client has a thread
of its own for its loop (an asynchronous one may be waiting for this very thread). And the other may drop its future before the
scheduler has this submission: it is kept until then, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

from zmqtasks.errors import ConfigError, ZmqTasksError
from zmqtasks.fetching import run_on
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.names import to_user
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.nodes.client.state import PENDING, FutureState


class ForeignFutures:
    """Those of one submission of a client's; `submitted` is due when it is on its way."""

    def __init__(self, node: ClientNode) -> None:
        self._node = node
        self._kept: dict[FutureState, Future[object] | None] = {}
        self._settled: set[ClientNode] = set()

    def key(self, state: FutureState) -> Key:
        """The key of any future. Raises ConfigError for one of another cluster, or of a client that has ended."""
        if state.owner is not self._node:
            self._meet((state,))
        return state.key

    def keys(self, states: Sequence[FutureState]) -> list[Key]:
        """As `key`, for many."""
        node = self._node
        others = [state for state in states if state.owner is not node]
        if others:
            self._meet(others)
        return [state.key for state in states]

    def submitted(self) -> None:
        """Keeps them until the scheduler has what this client has sent up to now."""
        kept, self._kept = [future for future in self._kept.values() if future is not None], {}
        if kept:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._node.loop.call_soon_threadsafe(self._node.requests.hold, kept)

    def _meet(self, states: Iterable[FutureState]) -> None:
        new = [state for state in states if state not in self._kept]
        for state in new:
            check_cluster(self._node, state)
            self._kept[state] = _one_more(state)
        for state in new:
            if state.status is PENDING and state.owner not in self._settled:
                self._settled.add(state.owner)
                self._wait_for(state)

    def _wait_for(self, state: FutureState) -> None:
        """Returns when the scheduler has what the owner of a future has sent, where that can be waited for."""
        owner: ClientNode = state.owner
        if owner.loop_thread is None or owner.is_forked or self._node.client._called_asynchronously():
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if owner.loop is running:
            owner.flush()
            return
        try:
            run_on(owner, owner.requests.settle)
        except ZmqTasksError:
            check_cluster(self._node, state)  # it has ended meanwhile
            raise


def _one_more(state: FutureState) -> Future[object] | None:
    owner: ClientNode = state.owner
    with owner.lock:
        shared = owner.machine.share(state.key)
        return None if shared is None else Future(shared)


def check_cluster(node: ClientNode, state: FutureState) -> None:
    """Raises ConfigError for a future that the scheduler of `node` does not know."""
    owner: ClientNode = state.owner
    if owner is node or (owner.scheduler_id == node.scheduler_id and (owner.is_forked or not owner.ended)):
        return
    where = f"of the cluster at {owner.address}"
    if owner.ended and not owner.is_forked:
        where = f"that has ended ({owner.error})"
    raise ConfigError(
        f"the future {to_user(state.key, state.name)!r} belongs to a client {where}, not to one of the cluster at "
        f"{node.address}: use it with its own client, or pass on its result"
    )
