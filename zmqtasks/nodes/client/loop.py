"""The event loop that all synchronous clients of a process share: one daemon thread, started with the first client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeAlias, TypeVar

from zmqtasks.nodes.client.gate import closed_gate, open_gate, pass_gate

T = TypeVar("T")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
"""What makes a coroutine, in the loop: no interrupt can come between its making and its beginning there."""

_STOP_TIMEOUT_S = 2.0


class LoopThread:
    """A running event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = _new_event_loop()
        self._started = threading.Event()
        self.thread = threading.Thread(target=self._run, name="zmqtasks-client", daemon=True)
        self.thread.start()
        self._started.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._started.set)
        self.loop.run_forever()

    def stop(self) -> None:
        """Ends the thread, if it is not the calling one; what still runs in the loop is left where it is."""
        if self.thread.is_alive() and not self.is_current():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(_STOP_TIMEOUT_S)

    def is_current(self) -> bool:
        """Whether the caller runs in the loop's thread, and so must not wait for it."""
        return threading.current_thread() is self.thread

    def run(self, work: Work[T], timeout_s: float | None = None) -> T:
        """`run_in` the loop of this thread; raises RuntimeError in the thread itself, which would wait for ever."""
        if self.is_current():
            raise RuntimeError(
                "a blocking call of a synchronous client inside its own event loop would wait for ever: "
                "do it in another thread, or use Client(asynchronous=True)"
            )
        return run_in(self.loop, work, timeout_s)


def run_in(loop: asyncio.AbstractEventLoop, work: Work[T], timeout_s: float | None = None) -> T:
    """The result of `work`, run in a loop of another thread.

    Raises TimeoutError in time; Ctrl-C ends the wait and the coroutine.
    """
    run = _Run(loop, work)
    try:
        loop.call_soon_threadsafe(run.begin)
        return run.result(timeout_s)
    except BaseException:
        run.give_up()
        raise
    finally:
        del run  # it holds an error, whose traceback holds this frame


class _Run(Generic[T]):
    """One piece of work for a loop. Unlike `asyncio.run_coroutine_threadsafe`, it leaves nothing behind that was never awaited."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Work[T]) -> None:
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._given_up = False
        self._over = False
        self._gate = closed_gate()

    def begin(self) -> None:
        if not self._given_up:
            self._task = self._loop.create_task(self._do())
            self._task.add_done_callback(self._end)

    async def _do(self) -> T:
        return await self._work()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # it is told of as never retrieved otherwise, when nobody waits any more
        self._over = True
        open_gate(self._gate)

    def result(self, timeout_s: float | None) -> T:
        if not pass_gate(self._gate, timeout_s):
            raise TimeoutError
        assert self._task is not None
        try:
            return self._task.result()
        except asyncio.CancelledError:
            raise concurrent.futures.CancelledError from None
        finally:
            del self  # the traceback has this frame

    def give_up(self) -> None:
        """Nobody waits any more: ends the work, also before it has begun."""
        self._given_up = True
        if not self._over:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.SelectorEventLoop()
    return uvloop.new_event_loop()


_lock = threading.Lock()
_shared: LoopThread | None = None
_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


def shared_loop() -> LoopThread:
    """The loop thread of this process."""
    global _shared
    with _lock:
        if _shared is None or not _shared.thread.is_alive():
            _shared = LoopThread()
        return _shared


def stop_shared_loop() -> None:
    """At exit: a daemon thread that is still in uvloop's C code when the interpreter is taken down may crash the process."""
    if _shared is not None:
        _shared.stop()


def on_fork(node: Any) -> None:
    """`node.forked()` will be called in the child after a fork of this process."""
    _after_fork.add(node)


def _forked() -> None:
    global _lock, _shared
    _lock = threading.Lock()  # the parent may have held it
    _shared = None  # its thread exists in the parent only
    for node in list(_after_fork):
        node.forked()


register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if register is not None:
    register(after_in_child=_forked)
