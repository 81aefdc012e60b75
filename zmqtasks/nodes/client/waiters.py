"""How threads and coroutines wait for records: one wake-up at the end of a wait, not one for each key.

`settled` is called under the lock of the client. A waiter is done when `remaining` is 0, or, if it is `eager`, with the first
record that isn't FINISHED (whoever gathers results need not wait for the others).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from zmqtasks.nodes.client.gate import closed_gate, open_gate, pass_gate
from zmqtasks.nodes.client.state import FINISHED, PENDING, FutureState, Waiter


class Countdown:
    """Waits until `count` of the records have settled."""

    __slots__ = ("eager", "remaining")

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.remaining = 0

    def settled(self, state: FutureState) -> None:
        """One less; wakes when that was the last."""
        self.remaining -= 1
        if self.remaining == 0 or (self.eager and state.status is not FINISHED):
            self.wake()

    def wake(self) -> None:
        """Ends the wait; further calls do nothing."""
        raise NotImplementedError


class ThreadCountdown(Countdown):
    """A thread waits."""

    __slots__ = ("_gate",)

    def __init__(self, eager: bool = False) -> None:
        super().__init__(eager)
        self._gate = closed_gate()

    def wake(self) -> None:
        open_gate(self._gate)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it was woken in time. Ctrl-C raises KeyboardInterrupt in the main thread."""
        return pass_gate(self._gate, timeout_s)


class LoopCountdown(Countdown):
    """A coroutine waits, in whatever loop it runs."""

    __slots__ = ("_future", "_loop")

    def __init__(self, eager: bool = False) -> None:
        super().__init__(eager)
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._finish)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            pass

    def _finish(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether it was woken in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._future
        except TimeoutError:
            return False
        return True


class Sink(Protocol):
    """Takes settled records, one after another; called under the lock of the client."""

    def put(self, state: FutureState) -> None: ...


class Feed:
    """Hands settled records on to a sink as they come, unless it was closed."""

    __slots__ = ("sink",)

    def __init__(self, sink: Sink) -> None:
        self.sink: Sink | None = sink

    def settled(self, state: FutureState) -> None:
        if self.sink is not None:
            self.sink.put(state)

    def close(self) -> None:
        """Nothing is handed on any more, and the sink may go."""
        self.sink = None


class ThreadQueue:
    """Settled records for a thread."""

    def __init__(self) -> None:
        self.items: deque[FutureState] = deque()
        self._gate = closed_gate()

    def put(self, state: FutureState) -> None:
        self.items.append(state)
        open_gate(self._gate)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether there is an item, or was one put, in time; may be true once too often."""
        if self.items:
            return True
        return pass_gate(self._gate, timeout_s)


class LoopQueue:
    """Settled records for a coroutine."""

    def __init__(self) -> None:
        self.items: deque[FutureState] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def put(self, state: FutureState) -> None:
        self.items.append(state)
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._event.set)
            except RuntimeError:
                pass

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether there is an item in time."""
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while not self.items:
                    self._event.clear()
                    if self.items:
                        break
                    await self._event.wait()
        except TimeoutError:
            return False
        return True


def add_waiter(waiter: Waiter, states: Iterable[FutureState]) -> int:
    """Adds `waiter` to the pending ones of `states` and tells how many that are. Under the lock of the client."""
    count = 0
    for state in states:
        if state.status is PENDING:
            count += 1
            if state.waiters is None:
                state.waiters = [waiter]
            else:
                state.waiters.append(waiter)
    return count


def remove_waiter(waiter: Waiter, states: Iterable[FutureState]) -> None:
    """Takes `waiter` off the records that are still pending. Under the lock of the client."""
    for state in states:
        waiters: list[Any] | None = state.waiters
        if waiters is not None and waiter in waiters:
            waiters[:] = [w for w in waiters if w is not waiter]
            if not waiters:
                state.waiters = None
