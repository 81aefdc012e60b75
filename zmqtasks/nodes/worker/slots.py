"""Who may run: a task thread needs one of the worker's slots to take a run, and a task that waits gives its own back.

Theory of operation
-------------------
A thread holds a slot from the moment it is started or woken until its task blocks or secedes; a thread that finds the
queue empty keeps its slot and waits there. A free slot is given, in this order, to a task whose wait is over
(`resuming`), or, when there are runs to take, to a parked thread or to a new one. A thread whose task has no slot any
more (it seceded) or has to give it to one that resumes parks after its task; a few parked threads are kept, others
end.

All of it is rare: the hot path of a thread only looks at `needs_yield`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.taskthread import TaskThread

MAX_EXTRA_THREADS = 256
"""Threads beyond the slots, for tasks that wait inside themselves: deeper nesting fails instead of hanging."""

MAX_PARKED = 16


class Slots:
    """The slots of a worker; every method is for any thread."""

    def __init__(self, nthreads: int, new_thread: Callable[[int], TaskThread], has_work: Callable[[], bool]) -> None:
        self.nthreads = nthreads
        self.free = nthreads
        """Below zero while async tasks have taken slots that were not free."""
        self.threads: dict[int, TaskThread] = {}
        """Living threads by the index of their mark."""
        self._lock = threading.Lock()
        self._resuming: deque[TaskThread] = deque()
        self._parked: list[TaskThread] = []
        self._indices = list(range(nthreads + MAX_EXTRA_THREADS - 1, -1, -1))
        self._new_thread = new_thread
        self._has_work = has_work
        self._closed = False
        self.needs_yield = False
        """Whether a thread should call `yield_slot` before it takes the next run."""

    def occupy(self, count: int) -> None:
        """Gives up to `count` free slots to threads that will take runs."""
        with self._lock:
            self._occupy(count)

    def _occupy(self, count: int) -> None:
        while count > 0 and self.free > 0 and not self._closed:
            if self._parked:
                thread = self._parked.pop()
                thread.has_slot = True
                thread.wake.release()
            elif self._indices:
                index = self._indices.pop()
                thread = self._new_thread(index)
                thread.has_slot = True
                self.threads[index] = thread
                thread.start()
            else:
                return
            self.free -= 1
            count -= 1

    def release(self, thread: TaskThread, to_wait: bool) -> None:
        """The task of `thread` blocks (`to_wait`) or secedes: its slot goes to somebody else.

        Raises RuntimeError when it would wait and no thread is left that could run what it waits for.
        """
        with self._lock:
            if to_wait and not self._indices and not self._parked:
                raise RuntimeError(
                    f"{self.nthreads + MAX_EXTRA_THREADS} tasks of this worker wait for other tasks inside of themselves:"
                    " nest less deeply, or pass futures as arguments instead of waiting for them in the task"
                )
            if not thread.has_slot:
                return
            thread.has_slot = False
            self._give()

    def _give(self) -> None:
        """A slot has become free."""
        if self.free < 0 or not self._resuming:
            self.free += 1
            if self._has_work():
                self._occupy(1)
        else:
            other = self._resuming.popleft()
            other.has_slot = True
            other.wake.release()
        self._update()

    def _update(self) -> None:
        self.needs_yield = bool(self._resuming) or self.free < 0

    def acquire(self, thread: TaskThread, may_wait: bool) -> None:
        """The task of `thread` goes on: waits for a slot, first in line; or takes one at once."""
        with self._lock:
            if thread.has_slot:
                return
            if self.free > 0 or not may_wait or self._closed:
                self.free -= 1
                thread.has_slot = True
                self._update()
                return
            self._resuming.append(thread)
            self.needs_yield = True
        thread.executor.nudge()
        thread.wake.acquire()

    def yield_slot(self, thread: TaskThread) -> bool:
        """For a thread between two tasks: parks it when its slot is wanted or gone; False: the thread is to end."""
        with self._lock:
            if self._closed:
                return False
            if thread.has_slot:
                if not self.needs_yield:
                    return True
                thread.has_slot = False
                self._give()
            if len(self._parked) >= MAX_PARKED:
                return False
            self._parked.append(thread)
        thread.wake.acquire()
        return not self._closed

    def thread_ends(self, thread: TaskThread) -> None:
        """The thread will not take runs any more; its index is free again."""
        with self._lock:
            if self.threads.pop(thread.index, None) is not None:
                self._indices.append(thread.index)
            if thread.has_slot:
                thread.has_slot = False
                self._give()

    def close(self) -> None:
        """Lets parked and resuming threads go; those that run a task end after it."""
        with self._lock:
            self._closed = True
            for thread in (*self._parked, *self._resuming):
                thread.has_slot = True
                thread.wake.release()
            self._parked.clear()
            self._resuming.clear()
