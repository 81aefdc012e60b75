"""Data of the client on its way to workers, by the user's wish: `Client.scatter`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zmqtasks.errors import TaskTimeoutError
from zmqtasks.fetching import Deadline
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.names import to_wire
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.nodes.client.state import FutureState
from zmqtasks.nodes.client.waiters import LoopCountdown, add_waiter, remove_waiter
from zmqtasks.protocol.ops import DeclareData
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import serialize
from zmqtasks.submission import payload_digest

NO_WORKER_S = 30.0
"""How long to wait for a worker that may take the data, when no time limit is given; dask's default."""


@dataclass(slots=True)
class Prepared:
    """Data in bytes, and the shape in which its futures go back."""

    keys: list[Key]
    names: list[str]
    payloads: list[Payload]
    specs: list[bytes]
    shape: Any
    """The original collection, or None for a single object."""

    def shaped(self, futures: list[Future[Any]]) -> Any:
        """The futures as the user expects them."""
        shape = self.shape
        if shape is None:
            return futures[0]
        if isinstance(shape, dict):
            return dict(zip(shape, futures, strict=True))
        if isinstance(shape, tuple):
            return tuple(futures)
        return set(futures) if isinstance(shape, (set, frozenset)) else futures


def prepare(node: ClientNode, data: Any, hashed: bool) -> Prepared:
    """Serializes data in the caller's thread."""
    node.check_usable()
    if isinstance(data, (Iterator, range)):
        data = list(data)
    shape = data if isinstance(data, (dict, list, tuple, set, frozenset)) else None
    items = list(data.values()) if isinstance(data, dict) else [data] if shape is None else list(data)
    payloads = [serialize(item) for item in items]
    names = [type(item).__name__ for item in items]
    named = isinstance(data, dict)
    digests = [payload_digest(payload) for payload in payloads] if hashed or named else []
    keys: list[Key]
    if named:
        keys = [to_wire(name) for name in data]
    elif hashed:
        keys = [f"{name}-{digest}" for name, digest in zip(names, digests, strict=True)]
    else:
        with node.lock:
            first = node.machine.take_keys(len(items))
        keys = list(range(first, first + len(items)))
    return Prepared(keys, names, payloads, [digest.encode() for digest in digests] or [b""] * len(items), shape)


async def scatter(
    node: ClientNode, prepared: Prepared, workers: list[str], copies: int, timeout_s: float | None
) -> Any:
    """Declares the data, puts it where the scheduler says, and waits until it is there. In the node's loop."""
    node.check_usable()
    states: list[FutureState] = []
    new: dict[Key, tuple[FutureState, Payload]] = {}
    with node.lock:
        for key, name, payload, spec in zip(
            prepared.keys, prepared.names, prepared.payloads, prepared.specs, strict=True
        ):
            state = node.machine.share(key, spec)
            if state is None and key in new:
                state = new[key][0]
                state.refs += 1
            elif state is None:
                state = FutureState(key, node, name, spec=spec)
                new[key] = (state, payload)
            states.append(state)
        if new:
            payloads = [payload for _, payload in new.values()]
            op = DeclareData(list(new), [payload.nbytes for payload in payloads], workers, copies)
            node.machine.declare(op, payloads, [state for state, _ in new.values()])
    futures: list[Future[Any]] = [Future(state) for state in states]  # from here on, dropping them releases the data
    with node.lock:
        node.wake()
    deadline = Deadline(timeout_s)
    await _wait_settled(node, states, deadline)
    if not await node.placements.wait(states, deadline.remaining_s()):
        raise TaskTimeoutError(
            f"scatter: not all workers have taken their copies of the data within {deadline.limit_s:g} s"
        )
    for future in futures:
        error = future._error()
        if error is not None:
            raise error
    return prepared.shaped(futures)


async def _wait_settled(node: ClientNode, states: list[FutureState], deadline: Deadline) -> None:
    while True:
        countdown = LoopCountdown(eager=True)
        with node.lock:
            countdown.remaining = add_waiter(countdown, states)
        if not countdown.remaining:
            return
        remaining_s = deadline.remaining_s()
        settled = await countdown.wait(NO_WORKER_S if remaining_s is None else remaining_s)
        if countdown.remaining:
            with node.lock:
                remove_waiter(countdown, states)
        if settled:
            return
        if deadline.limit_s is not None or not node.placements.under_way(states):
            limit_s = NO_WORKER_S if deadline.limit_s is None else deadline.limit_s
            raise TaskTimeoutError(
                f"scatter: no worker has taken all of the data within {limit_s:g} s ({node.cluster.workers} workers)"
            )
