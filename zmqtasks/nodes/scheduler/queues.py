"""Queues of ready tasks.

Tasks become ready mostly in the order of their priorities, so a queue is a deque for those that arrive in order and a heap for
the rest; the smaller head goes first. Entries are not removed when a task leaves READY by another way: `pop` skips them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zmqtasks.nodes.scheduler.state import TaskSpec, TaskState, WorkerState

_LOWEST = -(1 << 80)
READY_STATE = 2  # State.READY; the enum's module imports this one


class ReadyQueue:
    """Ready tasks by priority, lowest first; first in, first out among equals."""

    __slots__ = ("_counter", "_heap", "_in_order", "_last_priority")

    def __init__(self) -> None:
        self._in_order: deque[TaskState] = deque()
        self._heap: list[tuple[int, int, TaskState]] = []
        self._counter = 0
        self._last_priority = _LOWEST

    def __len__(self) -> int:
        """Entries, stale ones included: an upper bound on what `pop` gives."""
        return len(self._in_order) + len(self._heap)

    def push(self, ts: TaskState) -> None:
        """Adds a task that is READY."""
        if ts.priority >= self._last_priority or not self._in_order:
            self._last_priority = ts.priority
            self._in_order.append(ts)
        else:
            self._counter += 1
            heappush(self._heap, (ts.priority, self._counter, ts))

    def peek(self) -> TaskState | None:
        """The next task, left in the queue."""
        in_order, heap = self._in_order, self._heap
        while in_order and in_order[0].state != READY_STATE:
            in_order.popleft()
        while heap and heap[0][2].state != READY_STATE:
            heappop(heap)
        if heap and (not in_order or heap[0][0] < in_order[0].priority):
            return heap[0][2]
        return in_order[0] if in_order else None

    def pop(self) -> TaskState | None:
        """The next task, taken out; None when there is none."""
        in_order = self._in_order
        if not self._heap:  # the usual case, without a second look at the head
            while in_order:
                ts = in_order.popleft()
                if ts.state == READY_STATE:
                    return ts
            return None
        ts_or_none = self.peek()
        if ts_or_none is None:
            return None
        if in_order and in_order[0] is ts_or_none:
            in_order.popleft()
        else:
            heappop(self._heap)
        return ts_or_none

    def pop_alike(self, spec: TaskSpec, limit: int) -> Iterator[TaskState]:
        """At most `limit` tasks from the head that have this spec, taken out; fewer where one that came out of order is next.

        Each has to leave READY before the next is asked for: a task may be in the queue twice.
        """
        in_order, heap = self._in_order, self._heap
        while limit > 0 and in_order:
            ts = in_order[0]
            if ts.state == READY_STATE:
                if ts.spec is not spec or (heap and heap[0][0] < ts.priority):
                    return
                limit -= 1
                in_order.popleft()
                yield ts
            else:
                in_order.popleft()

    def clear(self) -> None:
        """Drops all entries."""
        self._in_order.clear()
        self._heap.clear()
        self._counter = 0
        self._last_priority = _LOWEST

    def tidy(self) -> None:
        """Drops the entries of tasks that are no longer READY."""
        self._in_order = deque(ts for ts in self._in_order if ts.state == READY_STATE)
        self._heap = [entry for entry in self._heap if entry[2].state == READY_STATE]
        heapify(self._heap)

    def pop_last(self) -> TaskState | None:
        """A task from the far end, for a worker that takes work from another's queue."""
        while self._in_order:
            ts = self._in_order.pop()
            if ts.state == READY_STATE:
                return ts
        return self.pop()

    def tasks(self) -> list[TaskState]:
        """The ready tasks in it, in no particular order."""
        found = {id(ts): ts for ts in self._in_order if ts.state == READY_STATE}
        found.update((id(ts), ts) for _, _, ts in self._heap if ts.state == READY_STATE)
        return list(found.values())


class Bucket:
    """Ready tasks that only some workers may run: those with the same restrictions and resources."""

    __slots__ = ("__weakref__", "allow_other", "eligible", "queue", "resources", "restrictions")

    def __init__(self, restrictions: tuple[str, ...], allow_other: bool, resources: dict[str, float]) -> None:
        self.restrictions = restrictions
        self.allow_other = allow_other
        self.resources = resources
        self.queue = ReadyQueue()
        self.eligible: dict[WorkerState, None] = {}

    def admits(self, worker: WorkerState) -> bool:
        """Whether `worker` has what the tasks ask for, by its name, address or host and by its resources in all."""
        if any(worker.resources.get(name, 0.0) < amount for name, amount in self.resources.items()):
            return False
        return not self.restrictions or any(r in (worker.name, worker.address, worker.host) for r in self.restrictions)

    def fits_now(self, worker: WorkerState) -> bool:
        """Whether enough of the resources are free."""
        available = worker.available
        return all(available.get(name, 0.0) >= amount for name, amount in self.resources.items())

    def take(self, worker: WorkerState) -> None:
        """Holds the resources for one task."""
        for name, amount in self.resources.items():
            worker.available[name] -= amount

    def give_back(self, worker: WorkerState) -> None:
        """Frees the resources of one task."""
        for name, amount in self.resources.items():
            worker.available[name] += amount
