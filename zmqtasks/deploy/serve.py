"""Runs one node in this process until it is told to end: the part that the command line and a cluster's processes
share."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

__all__ = ["STOPPED", "Node", "calm_collector", "run_loop", "serve", "stop_on_signals", "unless_stopped"]

T = TypeVar("T")
STOPPED = object()
COLLECTOR_THRESHOLD = 50_000
"""New containers before a look at the youngest ones; a task brings a few."""


class Node(Protocol):
    """What scheduler, worker and nanny nodes have in common."""

    async def start(self) -> None:
        """Up and reachable when it returns."""

    async def finished(self) -> Exception | None:
        """Returns when the node has ended: the error that ended it, None for an end in good order."""

    async def close(self, reason: str = "") -> None:
        """Ends the node in good order; idempotent."""


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on uvloop where there is one."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # Windows
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def calm_collector() -> None:
    """Sets the garbage collector for a scheduler: what was imported is left alone, the rest is looked at rarely.

    The scheduler's records have no cycles, and walking a million of them for nothing costs 14 to 37 % of its time
    (measured in dask.distributed, issue 4987).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTOR_THRESHOLD, 50, 1_000)


def stop_on_signals(*signals: signal.Signals) -> asyncio.Event:
    """An event that is set when one of the signals arrives (for the running loop, from its thread)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    return stop


async def serve(node: Node, stop: asyncio.Event, on_ready: Callable[[], None]) -> Exception | None:
    """Starts `node`, calls `on_ready`, and closes the node when `stop` is set or it has ended by itself.

    Returns the error that ended the node, if one did. Errors of the start are raised, after the node was closed.
    """
    try:
        if await unless_stopped(node.start(), stop) is STOPPED:
            return None
        on_ready()
        ended = await unless_stopped(node.finished(), stop)
        return ended if isinstance(ended, Exception) else None
    finally:
        await node.close("stopped")


async def unless_stopped(work: Awaitable[Any], stop: asyncio.Event) -> Any:
    """The result of `work`; `STOPPED` when `stop` was set first, with `work` cancelled."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else STOPPED
    finally:
        for pending in (task, stopped):
            pending.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
