"""Runs one node in this process until it is told to end: the part that the command line and a cluster's processes
share."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

__all__ = ["Node", "run_loop", "serve"]

T = TypeVar("T")


class Node(Protocol):
    """What scheduler, worker and nanny nodes have in common."""

    async def start(self) -> None:
        """Up and reachable when it returns."""

    async def finished(self) -> Any:
        """Returns when the node has ended, for whatever reason."""

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


def stop_on_signals(*signals: signal.Signals) -> asyncio.Event:
    """An event that is set when one of the signals arrives (for the running loop, from its thread)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    return stop


async def serve(node: Node, stop: asyncio.Event, on_ready: Callable[[], None]) -> bool:
    """Starts `node`, calls `on_ready`, and closes the node when `stop` is set or it has ended by itself.

    Returns True when it was stopped, False when it ended by itself. Errors of the start are raised, after the node was
    closed.
    """
    try:
        if not await _either(node.start(), stop):
            return True
        on_ready()
        return not await _either(node.finished(), stop)
    finally:
        await node.close("stopped")


async def _either(work: Awaitable[Any], stop: asyncio.Event) -> bool:
    """Whether `work` was done before `stop` was set; unfinished work is cancelled."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for pending in (task, stopped):
            pending.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
