"""One thread that runs tasks: takes a run, opens its inputs, calls the function, encodes what comes out, reports it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from time import perf_counter_ns
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from zmqtasks.ids import Key
from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.instructions import Finished
from zmqtasks.nodes.worker.outcomes import Blocked, Erred, NotStarted, Resumed, Seceded
from zmqtasks.nodes.worker.state import Run
from zmqtasks.protocol.failures import describe_exception
from zmqtasks.protocol.ops import ErrorInfo
from zmqtasks.protocol.serialize import collect_references, deserialize_inline, resolve_scope, serialize_inline, sizeof

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.executor import Executor

_NONE = serialize_inline(None)
_NUMBERS = frozenset((int, bool, float, complex))
_LEAVES = frozenset((str, bytes))
_OWN_FRAMES = 2
"""Frames of this file between the task's own and the handler of its exception."""


class TaskThread(threading.Thread):
    """Runs tasks as long as it holds a slot; see `slots`."""

    def __init__(self, executor: Executor, index: int) -> None:
        super().__init__(name=f"zmqtasks-task-{index}", daemon=True)
        self.executor = executor
        self.index = index
        self.current: Run | None = None
        self.has_slot = False
        self.wake = threading.Semaphore(0)
        self.partial: dict[int, str] = {}
        """Output of the task that has no line end yet, by level."""
        self.spoke = False
        """The task has written something, which goes out before its result."""
        self._blocks = 0
        self._is_blocked = False
        self._blocked_at = 0
        self._blocked_ns = 0
        self._seceded = False
        self._awaiting: concurrent.futures.Future[Any] | None = None

    def run(self) -> None:
        """Takes runs until the executor closes."""
        context.local.thread = self
        executor = self.executor
        slots = executor.slots
        take = executor.queue.get
        marks = executor.marks
        index = self.index
        report = executor.report
        answer = executor.answer
        try:
            while True:
                if (slots.needs_yield or not self.has_slot) and not slots.yield_slot(self):
                    return
                run = take()
                if run is None:
                    if executor.closed:
                        return
                    continue
                if run.cancelled:
                    report(NotStarted(run))
                    continue
                self.current = run
                marks[index] = run.run_id
                outcome = self._execute(run)
                if self.partial:
                    self._forward_partial()
                marks[index] = 0
                self.current = None
                if self.spoke or type(outcome) is not Finished or not answer(outcome):
                    self.spoke = False
                    report(outcome)
                del run, outcome  # nothing that a user made outlives its task here while the thread is idle
        finally:
            slots.thread_ends(self)

    def _execute(self, run: Run) -> Finished | Erred:
        started = perf_counter_ns()
        try:
            value = self._call(run)
            if type(value) is CoroutineType:
                value = self._await(run, value)
            data, size, references = self._encode(value)
        except BaseException as exc:  # SystemExit and KeyboardInterrupt of a task end the task, never the worker
            outcome: Finished | Erred = self._failed(run, exc, started)
        else:
            duration_us = (perf_counter_ns() - started - self._blocked_ns) // 1000
            outcome = Finished(run, value, data, size, duration_us, references)
        if self._seceded or self._blocked_ns:
            self._seceded = False
            self._blocked_ns = 0
        return outcome

    def _call(self, run: Run) -> Any:
        digest = run.group.function
        function = self.executor.functions.get(digest)
        if function is None:
            function = self.executor.load_function(digest, run.group.name)
        if run.args:
            if run.inputs:
                with resolve_scope([entry.get() for entry in run.inputs]):
                    args, kwargs = deserialize_inline(run.args)
            else:
                args, kwargs = deserialize_inline(run.args)
            return function(*args, **kwargs)
        if run.inputs:
            return function(*[entry.get() for entry in run.inputs])
        return function()

    def _encode(self, value: Any) -> tuple[bytes | None, int, list[Key] | None]:
        """The inline payload of a small result (None for others), its size in bytes, and the futures in it."""
        if value is None:
            return _NONE, len(_NONE), None
        kind = type(value)
        limit = self.executor.inline_bytes
        if kind in _NUMBERS:
            data = serialize_inline(value)
            return (data if len(data) <= limit else None), len(data), None
        size = sizeof(value)
        if size > 2 * limit:
            return None, size, None
        try:
            if kind in _LEAVES:
                data = serialize_inline(value)
                references: list[Key] | None = None
            else:
                with collect_references() as found:
                    data = serialize_inline(value)
                references = [getattr(reference, "key", reference) for reference in found] if found else None
        except Exception:  # it stays here as a live object; who asks for it from elsewhere is told why it can't be sent
            return None, size, None
        if len(data) > limit:
            return None, max(size, len(data)), references
        return data, len(data), references

    def _failed(self, run: Run, exc: BaseException, started: int) -> Erred:
        duration_us = (perf_counter_ns() - started - self._blocked_ns) // 1000
        try:
            text, payload, formatted = describe_exception(exc, _OWN_FRAMES)
            error = ErrorInfo("exception", text, payload, formatted, run.key, run.group.name)
        except BaseException as problem:
            error = ErrorInfo(
                "exception",
                f"{type(exc).__qualname__} (it cannot be described: {type(problem).__name__})",
                b"",
                "",
                run.key,
                run.group.name,
            )
        return Erred(run, error, duration_us)

    def _forward_partial(self) -> None:
        for level, text in self.partial.items():
            context.forward(level, "", text)
        self.partial.clear()

    # --- async tasks ------------------------------------------------------------------------------------------------

    def _await(self, run: Run, coroutine: CoroutineType[Any, Any, Any]) -> Any:
        """Runs a coroutine on the worker's loop for tasks; this thread, and its slot, stand for it until it is done."""
        future = asyncio.run_coroutine_threadsafe(self._in_context(coroutine), self.executor.task_loop())
        self._awaiting = future
        if run.cancelled:
            future.cancel()
        try:
            value, exc = future.result()
        finally:
            self._awaiting = None
        if exc is not None:
            raise exc
        return value

    async def _in_context(self, coroutine: CoroutineType[Any, Any, Any]) -> tuple[Any, BaseException | None]:
        context.async_thread.set(self)
        try:
            return await coroutine, None
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # SystemExit would end the loop of all async tasks
            exc.__traceback__ = exc.__traceback__.tb_next if exc.__traceback__ is not None else None
            return None, exc

    def interrupt(self, run: Run) -> None:
        """Cancels the coroutine of `run`; a plain function can't be stopped and only sees `is_cancelled`."""
        awaiting = self._awaiting
        if self.current is run and awaiting is not None:
            awaiting.cancel()

    # --- waiting inside of a task -----------------------------------------------------------------------------------

    def block(self) -> None:
        """The current task waits for others; raises RuntimeError when no thread is left to run them."""
        run = self.current
        assert run is not None
        if not self._blocks and not self._seceded:
            self.executor.slots.release(self, to_wait=True)
            self._is_blocked = True
            self._blocked_at = perf_counter_ns()
            self.executor.report(Blocked(run))
        self._blocks += 1

    def unblock(self, may_wait: bool) -> None:
        """The wait is over: goes on when a slot is free."""
        run = self.current
        assert run is not None
        self._blocks -= 1
        if not self._blocks and self._is_blocked:
            self._is_blocked = False
            self.executor.slots.acquire(self, may_wait)
            self._blocked_ns += perf_counter_ns() - self._blocked_at
            self.executor.report(Resumed(run))

    def secede(self) -> None:
        """The current task gives its slot back for good."""
        run = self.current
        assert run is not None
        if not self._seceded:
            if self._blocks:
                raise RuntimeError("a task cannot secede while it waits for another one")
            self._seceded = True
            self.executor.slots.release(self, to_wait=False)
            self.executor.report(Seceded(run))

    def rejoin(self) -> None:
        """The current task, which had seceded, waits for a slot."""
        run = self.current
        assert run is not None
        if self._seceded:
            self.executor.slots.acquire(self, may_wait=context.local.thread is self)
            self._seceded = False
            self.executor.report(Resumed(run))
