"""Actors on their worker: objects that stay, each with a thread that calls its methods in the order in which calls arrive.

Calls are runs like those of tasks, but take no slots: an actor answers while tasks compute, and a task may wait for an actor on
its own worker. Coroutines go to the loop of async tasks, and the next call begins meanwhile, as such methods wait for each
other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from time import perf_counter_ns
from types import CoroutineType
from typing import TYPE_CHECKING, Any, cast

from zmqtasks.ids import Key, format_key
from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.instructions import Finished
from zmqtasks.nodes.worker.outcomes import Erred, NotStarted
from zmqtasks.nodes.worker.state import Run, RunState
from zmqtasks.nodes.worker.store import UNOPENED, Store
from zmqtasks.nodes.worker.taskthread import TaskThread
from zmqtasks.protocol.ops import ErrorInfo
from zmqtasks.protocol.serialize import deserialize_inline, resolve_scope, serialize_inline

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.executor import Executor

_IMMUTABLE = frozenset((int, float, bool, complex, str, bytes, type(None)))


class Actors:
    """The actors of a worker; except where said, methods are for the node's loop."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._threads: dict[Key, ActorThread] = {}
        self.made: deque[Run] = deque()
        """Runs that have made an actor, since `settle`."""

    def make(self, run: Run, instance: Any) -> None:
        """Keeps the object that a run has made. For task threads."""
        self._threads[run.key] = ActorThread(self._executor, run.key, instance)
        self.made.append(run)

    def settle(self, store: Store) -> None:
        """Of actors that were made: what stands for one is opened anew by each who uses it; those not wanted any more go."""
        for _ in range(len(self.made)):  # task threads may append meanwhile
            run = self.made.popleft()
            entry = store.entries.get(run.key)
            if run.state is RunState.FINISHED and entry is not None:
                entry.data = entry.data or serialize_inline(entry.value)
                entry.value = UNOPENED
            elif run.state in (RunState.FINISHED, RunState.ERRED, RunState.DROPPED):
                self.drop([run.key])
            else:
                self.made.append(run)

    def call(self, runs: Iterable[Run]) -> None:
        """Queues calls; the last input of each is its actor."""
        for run in runs:
            run.inputs = run.inputs[:-1]
            thread = self._threads.get(run.deps[-1])
            text = f"{run.group.name}: the actor {format_key(run.deps[-1])} "
            if thread is None:
                text += "is not on this worker any more"
            else:
                try:
                    thread.take(run)
                    continue
                except RuntimeError as exc:  # the system has no more threads
                    text += f"has no thread: {exc}"
            self._executor.report(Erred(run, ErrorInfo("ActorLostError", text, b"", "", run.key, run.group.name), 0))

    def interrupt(self, runs: Sequence[Run]) -> None:
        """Cancels the coroutines of calls."""
        for run in runs:
            if run.group.actor and run.deps and (thread := self._threads.get(run.deps[-1])) is not None:
                thread.interrupt(run)

    def drop(self, keys: Iterable[Key]) -> None:
        """Lets actors go, after the calls that they have; other keys are passed over."""
        for key in keys:
            if (thread := self._threads.pop(key, None)) is not None:
                thread.queue.put(None)

    def close(self) -> None:
        """Lets all go."""
        self.drop(list(self._threads))


class ActorThread(TaskThread):
    """Calls the methods of one object."""

    def __init__(self, executor: Executor, key: Key, instance: Any) -> None:
        super().__init__(executor, -1)
        self.name = f"zmqtasks-actor-{type(instance).__name__}"
        self.key = key
        self.queue: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._instance = instance
        self._async_calls: dict[int, AsyncCall] = {}

    def take(self, run: Run) -> None:
        """Queues a call; the thread begins with the first one."""
        if self.ident is None:
            self.start()
        self.queue.put(run)

    def run(self) -> None:
        """Takes calls until the actor is let go."""
        context.local.thread = self
        executor, take = self.executor, self.queue.get
        while (run := take()) is not None:
            if run.cancelled:
                executor.report(NotStarted(run))
                continue
            self.current = run
            outcome = self._perform(run)
            if self.partial:
                self._forward_partial()
            self.current = None
            if outcome is not None:
                if self.spoke or type(outcome) is not Finished or not executor.answer(outcome):
                    executor.report(outcome)
                self.spoke = False
            del run, outcome
        self._instance = None

    def _perform(self, run: Run) -> Finished | Erred | None:
        """None: the call goes on, on the loop."""
        started = perf_counter_ns()
        try:
            value = self._call(run)
            if type(value) is CoroutineType:
                self._async_calls[run.run_id] = AsyncCall(self, run, started)
                self._async_calls[run.run_id].begin(value)
                return None
            return self.finish(run, value, started)
        except BaseException as exc:  # as in tasks
            return self._failed(run, exc, started)

    def _call(self, run: Run) -> Any:
        with resolve_scope([entry.get() for entry in run.inputs]):
            (reads, name, *args), kwargs = deserialize_inline(run.args)
        attribute = getattr(self._instance, name)
        return attribute if reads else attribute(*args, **kwargs)

    def finish(self, run: Run, value: Any, started: int) -> Finished:
        """The outcome of a call: its result as it is now, whatever later calls do to the object."""
        data, size, references = self._encode(value)
        value = UNOPENED if data is not None else _as_it_is(value)
        return Finished(run, value, data, size, (perf_counter_ns() - started) // 1000, references)

    def failed(self, run: Run, exc: BaseException, started: int) -> Erred:
        """The outcome of a call that raised."""
        return self._failed(run, exc, started)

    def async_call_ended(self, run: Run) -> None:
        """The coroutine of a call is done."""
        del self._async_calls[run.run_id]

    def interrupt(self, run: Run) -> None:
        """Cancels the coroutine of a call."""
        if (call := self._async_calls.get(run.run_id)) is not None:
            call.cancel()

    # A call takes no slot, so it has none to give back.

    def block(self) -> None:
        """The call waits."""

    def unblock(self, may_wait: bool) -> None:
        """The wait is over."""

    def secede(self) -> None:
        """Nothing to leave."""

    def rejoin(self) -> None:
        """Nothing to come back to."""


class AsyncCall:
    """A coroutine of an actor, on the loop of async tasks; stands for a task thread in its context (`context.async_thread`)."""

    def __init__(self, thread: ActorThread, run: Run, started: int) -> None:
        self.executor = thread.executor
        self.key = thread.key
        self.current: Run | None = run
        self.partial: dict[int, str] = {}
        self.spoke = False
        self._thread = thread
        self._started = started
        self._future: concurrent.futures.Future[None] | None = None

    def begin(self, coroutine: CoroutineType[Any, Any, Any]) -> None:
        """Runs it; its outcome is reported when it is done."""
        assert self.current is not None
        self._future = asyncio.run_coroutine_threadsafe(
            self._perform(self.current, coroutine), self.executor.task_loop()
        )
        if self.current.cancelled:
            self.cancel()

    def cancel(self) -> None:
        """Cancels it."""
        if self._future is not None:
            self._future.cancel()

    async def _perform(self, run: Run, coroutine: CoroutineType[Any, Any, Any]) -> None:
        context.async_thread.set(cast(TaskThread, self))
        outcome: Finished | Erred
        try:
            outcome = self._thread.finish(run, await self._awaited(coroutine), self._started)
        except BaseException as exc:  # SystemExit would end the loop of all async tasks
            outcome = self._thread.failed(run, exc, self._started)
        for level, text in self.partial.items():
            context.forward(level, "", text)
        self._thread.async_call_ended(run)
        self.current = None
        self.executor.report(outcome)

    @staticmethod
    async def _awaited(coroutine: CoroutineType[Any, Any, Any]) -> Any:
        return await coroutine  # a frame, as errors of tasks come with two of ours

    def block(self) -> None:
        """See `ActorThread.block`."""

    def unblock(self, may_wait: bool) -> None:
        """See `ActorThread.block`."""

    secede = rejoin = block


def _as_it_is(value: Any) -> Any:
    """A large result, apart from the object that has returned it, which may change its own copy."""
    if type(value) in _IMMUTABLE:
        return value
    numpy = sys.modules.get("numpy")
    if numpy is not None and type(value) is numpy.ndarray and not value.dtype.hasobject:
        alone = value.base is None and sys.getrefcount(value) <= _ALONE
        return value if alone else value.copy("K")
    try:
        return deserialize_inline(serialize_inline(value))
    except Exception:  # it can't leave this worker: who asks for it is told why
        return value


def _count_alone() -> int:
    """How often an object counts as referred to in `_as_it_is` when nothing but calls like those on the way there holds it."""

    def perform() -> int:
        value = object()
        return finish(value)

    def finish(value: object) -> int:
        return count(value)

    def count(value: object) -> int:
        return sys.getrefcount(value)

    return perform()


_ALONE = _count_alone()
