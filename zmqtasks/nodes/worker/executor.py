"""The threads of a worker that run tasks, and the two queues between them and the node's loop.

Theory of operation
-------------------
The loop hands runs over in batches; threads take them one by one from a `SimpleQueue` (a C queue: no lock of
Python's). Outcomes go onto a list, and a thread wakes the loop only when no wake-up is pending: under load the loop
gets its turn once per switch interval of the interpreter and then finds a batch, while a single outcome is reported
at once. Idle threads sleep in the queue, and nothing polls.

A small result that comes alone, with nothing reported before it and no run queued behind it, is answered from its
thread: waking the loop to do so would double the worker's share of the latency (`bench.tasks latency`). The books are
kept afterwards, by the loop, which in any case does so (`drain`) before it looks at anything that may have followed from
the answer.

The queue is in order of priority as long as runs arrive so; when one arrives that goes earlier, the loop takes
everything out, sorts it and puts it back: threads that find the queue empty at that moment just wait for the next
item. Retraction works in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from zmqtasks.errors import DeserializationError
from zmqtasks.nodes.worker.actors import Actors
from zmqtasks.nodes.worker.instructions import Finished
from zmqtasks.nodes.worker.outcomes import Outcome
from zmqtasks.nodes.worker.slots import MAX_EXTRA_THREADS, Slots
from zmqtasks.nodes.worker.state import Run
from zmqtasks.nodes.worker.taskthread import TaskThread
from zmqtasks.protocol.ops import Op, TasksFinished
from zmqtasks.protocol.serialize import loads_function

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.node import WorkerNode

logger = logging.getLogger(__name__)

LATE_BYTES = 64 << 10
"""Inputs of up to this size in all may be held until the loop next looks at what threads have answered."""
_FIRST = -(1 << 63)


class Executor:
    """Runs tasks in `nthreads` slots; except where said, methods are for the loop that made it.

    `on_outcomes` is called on the loop with batches of what happened. `marks` is where a thread leaves the id of the
    run that it executes: one 64-bit integer per thread, `marks_needed(nthreads)` in all, which a nanny reads after a
    death.
    """

    def __init__(
        self,
        nthreads: int,
        on_outcomes: Callable[[list[Outcome]], None],
        *,
        inline_bytes: int = 4 << 10,
        marks: memoryview | None = None,
        worker: WorkerNode | None = None,
    ) -> None:
        self.worker = worker
        self.inline_bytes = inline_bytes
        self.functions: dict[bytes, Any] = {}
        self.queue: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.marks = cast("list[int]", marks if marks is not None else [0] * marks_needed(nthreads))
        self.closed = False
        self.drains_soon = False
        """The loop is going to `drain` by itself: what threads have answered can wait for that."""
        self.slots = Slots(nthreads, lambda index: TaskThread(self, index), lambda: not self.queue.empty())
        self._on_outcomes = on_outcomes
        self._loop = asyncio.get_running_loop()
        self._outcomes: list[Outcome] = []
        self._answered: list[Outcome] = []
        self._wake_pending = False
        self._last_priority = _FIRST
        self._serialized: dict[bytes, bytes] = {}
        self._load_lock = threading.Lock()
        self._task_loop: asyncio.AbstractEventLoop | None = None
        self.actors = Actors(self)

    # --- runs in ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the threads, so that the first tasks need not wait for that."""
        self.slots.occupy(self.slots.nthreads)

    def hand_over(self, runs: Sequence[Run]) -> None:
        """Queues runs whose inputs are pinned."""
        waiting = self.queue
        put = waiting.put
        last = _FIRST if waiting.empty() else self._last_priority
        for position, run in enumerate(runs):
            if run.priority < last:
                self._reorder(runs[position:])
                break
            last = run.priority
            put(run)
        else:
            self._last_priority = last
        if self.slots.free > 0:
            self.slots.occupy(len(runs))

    def _reorder(self, runs: Sequence[Run]) -> None:
        ordered = sorted((*self._take_all(), *runs), key=lambda run: run.priority)
        self._last_priority = ordered[-1].priority
        for run in ordered:
            self.queue.put(run)

    def _take_all(self) -> list[Run]:
        taken: list[Run] = []
        with contextlib.suppress(queue.Empty):
            while True:
                run = self.queue.get_nowait()
                if run is not None:
                    taken.append(run)
        return taken

    def take_back(self, runs: Sequence[Run]) -> list[Run]:
        """Removes runs from the queue and gives those that were still there; the others have started or ended."""
        wanted = {run.run_id for run in runs}
        back: list[Run] = []
        for run in self._take_all():
            if run.run_id in wanted:
                back.append(run)
            else:
                self.queue.put(run)
        self.nudge()  # in case a token for a resuming task was among what was taken
        return back

    def interrupt(self, runs: Sequence[Run]) -> None:
        """Asks runs that have started to stop: coroutines are cancelled, functions may look at `is_cancelled`."""
        wanted = {run.run_id: run for run in runs}
        for thread in list(self.slots.threads.values()):
            current = thread.current
            if current is not None and current.run_id in wanted:
                thread.interrupt(current)
        self.actors.interrupt(runs)

    def nudge(self) -> None:
        """Makes an idle thread look at its slot; for any thread."""
        if self.slots.needs_yield:
            self.queue.put(None)

    def executing(self) -> list[Run]:
        """Runs that threads execute at this moment, blocked and seceded ones among them."""
        return [run for thread in list(self.slots.threads.values()) if (run := thread.current) is not None]

    @property
    def queued(self) -> int:
        """Runs that no thread has taken."""
        return self.queue.qsize()

    # --- functions --------------------------------------------------------------------------------------------------

    def learn_functions(self, digests: Sequence[bytes], functions: Sequence[bytes]) -> None:
        """Keeps serialized functions; each is opened by the first task that needs it."""
        self._serialized.update(zip(digests, functions, strict=True))

    def load_function(self, digest: bytes, name: str) -> Any:
        """Opens a function, once; raises DeserializationError. For any thread."""
        with self._load_lock:
            if (function := self.functions.get(digest)) is None:
                if (data := self._serialized.get(digest)) is None:
                    raise DeserializationError(f"the function {name} ({digest.hex()}) was never sent to this worker")
                function = self.functions[digest] = loads_function(data)
            return function

    def forget_functions(self) -> None:
        """Functions are opened anew by the next task: modules that they come from have been imported again. For any thread."""
        with self._load_lock:
            self.functions.clear()

    # --- outcomes out -----------------------------------------------------------------------------------------------

    def report(self, outcome: Outcome) -> None:
        """Passes an outcome to the loop; for task threads."""
        self._outcomes.append(outcome)
        self._wake()

    def _wake(self) -> None:
        if not self._wake_pending:
            self._wake_pending = True
            try:
                self._loop.call_soon_threadsafe(self.drain)
            except RuntimeError:  # the loop has been closed: the worker is no more
                return

    def answer(self, outcome: Finished) -> bool:
        """Sends the answer of a run from its thread; False: it has to be reported. For task threads."""
        run, data = outcome.run, outcome.data
        channel = self.worker.answers_by if self.worker is not None else None
        if (
            channel is None
            or data is None
            or run.cancelled
            or outcome.references
            or self._outcomes
            or not self.queue.empty()
            or not channel.begin_direct()
        ):
            return False
        ops: list[Op] = []
        try:
            outcome.answered = True
            self._answered.append(outcome)  # before it is sent: whatever follows from the answer finds it in the books
            ops.append(TasksFinished([run.run_id], [len(data)], data, [outcome.duration_us]))
        finally:
            channel.send_direct(ops)
        # Waking the loop now takes the processor from those who wait for the answer; but large inputs are let go at once.
        if not self.drains_soon or sum([entry.size for entry in run.inputs]) > LATE_BYTES:
            self._wake()
        return True

    def drain(self) -> None:
        """Passes on what has been reported and answered up to now."""
        # The flags go first: an outcome that is appended after the copy finds them cleared and wakes the loop again.
        self._wake_pending = False
        for outcomes in (self._answered, self._outcomes):
            if outcomes:
                batch = outcomes[:]
                del outcomes[: len(batch)]
                self._on_outcomes(batch)

    # --- async tasks ------------------------------------------------------------------------------------------------

    def task_loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which coroutines of tasks run: user code must not stop the node's own. For any thread."""
        with self._load_lock:
            if self._task_loop is None:
                self._task_loop = asyncio.new_event_loop()
                threading.Thread(target=self._run_task_loop, name="zmqtasks-async-tasks", daemon=True).start()
            return self._task_loop

    def _run_task_loop(self) -> None:
        loop = self._task_loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Takes no more runs; threads end after the task that they run (as daemons they hold no process up)."""
        self.closed = True
        self._take_all()
        self.actors.close()
        self.slots.close()
        for _ in list(self.slots.threads):  # threads that end meanwhile take themselves off
            self.queue.put(None)
        if (loop := self._task_loop) is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(loop.stop)


def marks_needed(nthreads: int) -> int:
    """How many 64-bit integers `Executor.marks` has."""
    return nthreads + MAX_EXTRA_THREADS
