"""Where a piece of code runs: which task, on which worker; and what a task may say about itself from inside.

The current task is found by a thread-local, set once for each task thread; in async tasks by a context variable.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from zmqtasks.ids import Key
from zmqtasks.protocol.ops import LogRecord

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.node import WorkerNode
    from zmqtasks.nodes.worker.taskthread import TaskThread

STDOUT_LEVEL = 0
STDERR_LEVEL = 1


class _Local(threading.local):
    thread: TaskThread | None = None
    worker: WorkerNode | None = None


local = _Local()
"""`local.thread` is the task thread that runs this code, `local.worker` the worker that calls a function outside of tasks."""

async_thread: ContextVar[TaskThread | None] = ContextVar("zmqtasks_task", default=None)
"""The task thread that waits for this coroutine."""

output_is_forwarded = False
"""Whether `output.install` was called: then all that tasks write is forwarded anyway."""

output_is_local = True
"""Whether it is written here too."""

workers: weakref.WeakSet[WorkerNode] = weakref.WeakSet()
"""Worker nodes of this process."""

departures: list[Callable[[WorkerNode], None]] = []
"""Called when one of them ends, after it has left `workers`; must not wait."""


def current_thread() -> TaskThread | None:
    """The task thread whose task this code belongs to, or None."""
    return local.thread or async_thread.get()


def current_key() -> Key | None:
    """The key of the task that this code belongs to, or None outside of tasks."""
    thread = current_thread()
    return thread.current.key if thread is not None and thread.current is not None else None


def get_worker() -> WorkerNode:
    """The worker that runs this code.

    In a thread that a task has started: the worker of this process, when there is exactly one. Raises ValueError
    outside of workers, as in dask.distributed.
    """
    thread = current_thread()
    if thread is not None:
        worker: WorkerNode | None = thread.executor.worker
        if worker is not None:
            return worker
    elif local.worker is not None:
        return local.worker
    elif len(workers) == 1:
        return next(iter(workers))
    raise ValueError("no worker runs this code: get_worker() works inside of tasks only")


def is_cancelled() -> bool:
    """Whether the task that this code belongs to has been asked to stop; False outside of tasks."""
    thread = current_thread()
    return thread is not None and thread.current is not None and thread.current.cancelled


def secede() -> None:
    """The current task leaves the worker's slots, so that another task can start; for tasks that mostly wait.

    Raises ValueError outside of tasks.
    """
    thread = _own_thread("secede")
    thread.secede()


def rejoin() -> None:
    """A task that has seceded comes back; waits until a slot is free. Raises ValueError outside of tasks."""
    thread = _own_thread("rejoin")
    thread.rejoin()


def _own_thread(what: str) -> TaskThread:
    thread = current_thread()
    if thread is None or thread.current is None:
        raise ValueError(f"no task runs this code: {what}() works inside of tasks only")
    return thread


class waiting:  # noqa: N801 - a context manager, used like a function
    """While open, the current task waits for other tasks: its slot is free for them; elsewhere it does nothing.

    Leaving waits until a slot is free again (in an async task it takes one at once instead, as its loop must not
    stop). Raises RuntimeError when too many tasks of this worker wait inside of each other already. Blocks nest.
    """

    __slots__ = ("_thread",)

    def __init__(self) -> None:
        self._thread: TaskThread | None = None

    def __enter__(self) -> None:
        thread = current_thread()
        if thread is not None and thread.current is not None:
            thread.block()
            self._thread = thread

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.unblock(may_wait=local.thread is self._thread)


def forward(level: int, logger: str, text: str, category: str = "") -> bool:
    """Sends a line of the current task to the clients; False outside of tasks."""
    thread = current_thread()
    if thread is None or thread.executor.worker is None:
        return False
    thread.spoke = True
    thread.executor.worker.log_soon(LogRecord(level, logger, text, "", category))
    return True


class _Suppressed(threading.local):
    depth = 0


suppressed = _Suppressed()


@contextmanager
def not_forwarded() -> Iterator[None]:
    """While open, nothing that this thread writes is forwarded."""
    suppressed.depth += 1
    try:
        yield
    finally:
        suppressed.depth -= 1


def print(*args: Any, sep: str | None = " ", end: str | None = "\n", file: Any = None, flush: bool = False) -> None:  # noqa: A001
    """As the built-in `print`; in a task the line is printed by the clients too, with its end as it is."""
    import builtins

    builtins.print(*args, sep=sep, end=end, file=file, flush=flush)
    if file is None and not output_is_forwarded:
        text = (" " if sep is None else sep).join(map(str, args)) + ("\n" if end is None else end)
        forward(STDOUT_LEVEL, "", text.removesuffix("\n"))


def warn(message: str | Warning, category: type[Warning] | None = UserWarning, stacklevel: int = 1) -> None:
    """As `warnings.warn`; in a task the clients warn too, each time."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    forwarded = forward(logging.WARNING, "py.warnings", str(message), kind.__name__)
    if not forwarded or output_is_local:
        with not_forwarded():
            warnings.warn(message, kind, stacklevel=stacklevel + 1)
