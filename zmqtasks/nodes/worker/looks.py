"""Looks at what task threads are at, while they are at something: they take tasks and answer without the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zmqtasks.nodes.worker.executor import Executor
from zmqtasks.nodes.worker.machine import WorkerMachine
from zmqtasks.nodes.worker.metrics import LongRuns

LONG_RUN_S = 0.05
"""A run seen executing at two looks this far apart is told to the scheduler, which then takes back what waits behind it."""


class Looks:
    """Takes in what threads have answered, and tells the scheduler early what can't be retracted."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        machine: WorkerMachine,
        flush: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._machine = machine
        self._flush = flush
        self._runs = LongRuns()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def look_later(self) -> None:
        """There is, or will be, something to see."""
        self._executor.drains_soon = True
        if self._timer is None and not self._stopped:
            self._timer = self._loop.call_later(LONG_RUN_S, self._look)

    def tick(self) -> int:
        """A look of the worker's regular kind, at all that executes; gives how many runs do. A flush follows."""
        self._executor.drain()
        executing = self._executor.executing()
        self._machine.tick()
        self._runs.look(executing)
        self._machine.runs_executing(self._runs.told(executing))
        return len(executing)

    def stop(self) -> None:
        """No more looks."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Looks again only while there is something new to see."""
        self._timer = None
        executor = self._executor
        executor.drains_soon = False
        executor.drain()
        executing = executor.executing()
        long, again = self._runs.look(executing)
        if long:
            self._machine.runs_executing(long)
            self._flush()
        if again or (not executing and executor.queued):  # threads of a loaded machine may begin late
            self.look_later()
