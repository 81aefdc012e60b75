"""Results that didn't come with their notice: asked of the workers that hold them, many keys in one request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zmqtasks.errors import CommError, LostDataError, SerializationError, ZmqTasksError
from zmqtasks.ids import Key, format_key
from zmqtasks.nodes.channel import Fetched
from zmqtasks.nodes.client.state import FINISHED, FutureState
from zmqtasks.protocol.ops import ReportMissing
from zmqtasks.protocol.payload import Payload

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

logger = logging.getLogger("zmqtasks.client")

FIRST_PAUSE_S = 0.01
LAST_PAUSE_S = 1.0
EXTRA_S = 5.0
"""Beyond the grace time, in which the scheduler finds out that a holder is gone and has its results computed again."""


async def fetch(node: ClientNode, states: Sequence[FutureState]) -> dict[Key, Payload | ZmqTasksError]:
    """The values of those of `states` that are (and remain) FINISHED; for what can't be had, the error.

    A key that a worker doesn't give is reported; the scheduler then says that it is computed again (its record changes,
    and it is left out), or names other holders. A holder that says nothing for the grace time is left for another one;
    ends soon after that if nobody gives anything.
    """
    found: dict[Key, Payload | ZmqTasksError] = {}
    pause_s = FIRST_PAUSE_S
    turn = 0
    deadline = node.loop.time() + node.config.grace_s + EXTRA_S
    problem = "no worker holds it"
    while wanted := [s for s in states if s.status is FINISHED and s.key not in found]:
        holders = await node.requests.locate([state.key for state in wanted])
        groups: dict[str, list[Key]] = {}
        for state in wanted:
            if addresses := holders.get(state.key):
                groups.setdefault(addresses[turn % len(addresses)], []).append(state.key)
        before = len(found)
        problems = await asyncio.gather(*[_get(node, address, keys, found) for address, keys in groups.items()])
        problem = next(filter(None, problems), problem)
        if len(found) > before:
            pause_s = FIRST_PAUSE_S
            deadline = node.loop.time() + node.config.grace_s + EXTRA_S
            continue
        if node.loop.time() > deadline:
            for state in wanted:
                name = format_key(state.key, state.name)
                found[state.key] = LostDataError(f"the result of {name!r} could not be fetched: {problem}")
            break
        turn += 1
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
    return found


async def _get(
    node: ClientNode, address: str, keys: list[Key], found: dict[Key, Payload | ZmqTasksError]
) -> str | None:
    """Fetches from one worker into `found`; reports what it didn't give, and says why."""
    try:
        fetched = await node.pool.get(address, keys)
    except CommError as exc:
        fetched = Fetched({}, [], {}, exc)
    found.update(fetched.values)
    for key, reason in fetched.failed.items():
        found[key] = SerializationError(f"the result of {format_key(key)!r} cannot be sent: {reason}")
    if fetched.missing:
        node.tell(ReportMissing(fetched.missing, address, reachable=True))
    if fetched.broken is not None:
        logger.debug("could not fetch from %s: %s", address, fetched.broken)
        node.tell(ReportMissing(fetched.unanswered(keys), address, reachable=False))
        return f"{address}: {fetched.broken}"
    return f"{address} does not have it any more" if fetched.missing else None
