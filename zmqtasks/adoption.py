"""Futures of other clients among what one submits.

Keys are numbers that a scheduler hands out, so those of two clusters are alike: a future of another cluster is refused.

One of another client of the same cluster is adopted: the submitting client gets a future of its own first. Nothing orders the
links of two clients, so two answers are waited for: that the scheduler has what the other client has submitted, which this one's
submission might overtake, and that it knows that this one wants the key too, which the other may drop at any time. An asynchronous
client waits for nothing, and nothing is asked of a client whose loop this thread is running: there the other's submission is sent
now, if that can be done, and it is left to the scheduler which of two links it reads first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from zmqtasks.errors import ConfigError
from zmqtasks.fetching import run_on
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.names import to_user
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.nodes.client.state import PENDING, FutureState


class Adoption:
    """The futures of one submission as those of its client, which has to keep this until the submission is on its way."""

    def __init__(self, node: ClientNode) -> None:
        self._node = node
        self._own: dict[FutureState, Future[Any]] = {}
        self._settled: set[ClientNode] = set()

    def key(self, state: FutureState) -> Key:
        """The key of a future, which the scheduler knows for this client. Raises ConfigError for one of another cluster."""
        if state.owner is not self._node:
            self._adopt((state,))
        return state.key

    def keys(self, states: Sequence[FutureState]) -> list[Key]:
        """As `key`, for many."""
        node = self._node
        others = [state for state in states if state.owner is not node]
        if others:
            self._adopt(others)
        return [state.key for state in states]

    def future(self, future: Future[Any]) -> Future[Any]:
        """The future of this client that has the same key; raises as `key`."""
        if future._state.owner is self._node:
            return future
        self._adopt((future._state,))
        return self._own[future._state]

    def _adopt(self, states: Sequence[FutureState]) -> None:
        new = [state for state in dict.fromkeys(states) if state not in self._own]
        if not new:
            return
        for state in new:
            check_cluster(self._node, state)
        for owner in {state.owner for state in new if state.status is PENDING} - self._settled:
            self._settle(owner)
            self._settled.add(owner)
        node = self._node
        with node.lock:
            for state in new:
                own = node.machine.share(state.key)
                if own is None:
                    own = FutureState(state.key, node, state.name)
                    node.machine.want(own)
                self._own[state] = Future(own)
            node.wake()
        self._settle(node)

    def _settle(self, node: ClientNode) -> None:
        """Waits until the scheduler has what a client has sent, where that can be waited for."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if node.loop is running:
            node.flush()
        elif self._node.loop_thread is not None:
            run_on(node, node.requests.settle)


def check_cluster(node: ClientNode, state: FutureState) -> None:
    """Raises ConfigError for a future that the scheduler of `node` does not know."""
    owner: ClientNode = state.owner
    if owner is node or (owner.scheduler_id == node.scheduler_id and not owner.ended):
        return
    where = "that is closed" if owner.ended else f"of the cluster at {owner.address}"
    raise ConfigError(
        f"the future {to_user(state.key, state.name)!r} belongs to a client {where}, not to one of the cluster at "
        f"{node.address}: use it with its own client, or pass on its result"
    )
