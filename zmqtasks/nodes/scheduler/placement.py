"""Which worker gets which task, and when.

Theory of operation
-------------------
A task that is READY waits in one of three places: in the queue of the worker that holds the most bytes of its inputs, in the
bucket of its restrictions and resources, or, with nothing to fetch, in the central queue. Nothing is sent while ops are
handled; `dispatch`, called once per flush, gives tasks to workers that have room.

Room is counted in time: a worker has room while a thread is free, or while the estimated work beyond what its threads run is
less than `prefetch_s` a thread. So it gets hundreds of 10 us tasks ahead, and one long task. What was given too early, or
waits for a busy worker, goes to idle ones by `stealing`.

No step looks at all workers for one task: idle workers and workers with room are kept in sets that change with each
assignment and each finish.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.nodes.scheduler.queues import Bucket, ReadyQueue
from zmqtasks.nodes.scheduler.state import (
    MIN_ESTIMATE_S,
    PROCESSING,
    READY,
    SchedulerState,
    TaskState,
    WorkerState,
)
from zmqtasks.protocol.ops import TaskOptions

MAKES_ACTOR, CALLS_ACTOR = 1, 2
"""`TaskOptions.actor`."""
BANDWIDTH = 1e9
"""Bytes per second assumed between workers, where a choice needs one."""
QUANTUM_S = 2.5e-3
QUANTUM_PER_WORKER_S = 5e-6
"""Short tasks go out in lots of at least this much estimated work, longer lots with more workers: a message costs the scheduler as
much as some tasks do, and one by one over 2,000 workers there were three messages a task (`bench.tasks zero`)."""
STALE_KEPT = 1000
"""So many entries of cancelled tasks may stay in the central queue."""
HOLDERS_COMPARED = 16
"""Of the workers that hold inputs, so many with the most bytes are compared by their load."""


class Placement:
    """The queues, and the rules by which tasks leave them."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self.queue = ReadyQueue()
        self.buckets: WeakValueDictionary[tuple[object, ...], Bucket] = WeakValueDictionary()
        """As long as a spec has them."""
        self.active_buckets: dict[Bucket, None] = {}
        self.backlogged: dict[WorkerState, None] = {}
        """Workers whose own queue may have tasks."""
        self.idle: dict[WorkerState, None] = {}
        """Usable workers with a free thread."""
        self.roomy: dict[WorkerState, None] = {}
        """Usable workers without a free thread that may still get tasks ahead."""
        self.calls = Bucket((), False, {})
        """Of calls of actors, which never wait in it."""

    # --- membership -------------------------------------------------------------------------------------------------

    def add_worker(self, worker: WorkerState) -> None:
        """A worker may be given tasks from now on (it is new, or its link is back)."""
        for bucket in self.buckets.values():
            if bucket.admits(worker):
                bucket.eligible[worker] = None
        self.update_room(worker)

    def remove_worker(self, worker: WorkerState) -> list[TaskState]:
        """A worker may not be given tasks any more; returns the tasks of its own queue, to be placed anew."""
        self.idle.pop(worker, None)
        self.roomy.pop(worker, None)
        self.backlogged.pop(worker, None)
        for bucket in self.buckets.values():
            bucket.eligible.pop(worker, None)
        tasks = worker.queue.tasks()
        worker.queue = ReadyQueue()
        return tasks

    def bucket_for(self, options: TaskOptions) -> Bucket | None:
        """The bucket for tasks with these options; None when any worker will do."""
        if options.actor == CALLS_ACTOR:
            return self.calls
        if not options.workers and not options.resources and not options.actor:
            return None
        if not all(0 <= amount < float("inf") for amount in options.resources.values()):
            raise RemoteProtocolError(f"resources have to be numbers of at least 0: {options.resources}")
        resources = {name: amount for name, amount in options.resources.items() if amount}
        restrictions = tuple(sorted(options.workers))
        key = (restrictions, options.allow_other_workers, tuple(sorted(resources.items())))
        bucket = self.buckets.get(key)
        if bucket is None:
            bucket = self.buckets[key] = Bucket(restrictions, options.allow_other_workers, resources)
            bucket.eligible.update((w, None) for w in self.state.workers.values() if w.usable and bucket.admits(w))
        return bucket

    def rest(self) -> None:
        """Empties its tables; see `resting`."""
        self.queue.clear()
        for worker in self.state.workers.values():
            worker.queue.clear()
        for workers in (self.idle, self.roomy, self.backlogged):
            kept = list(workers)
            workers.clear()
            workers.update(dict.fromkeys(kept))

    # --- queues -----------------------------------------------------------------------------------------------------

    def enqueue(self, ts: TaskState) -> None:
        """Takes a task that has just become READY."""
        assert ts.spec is not None
        bucket = ts.spec.bucket
        if bucket is not None:
            if ts.spec.options.actor and self._place_actor(ts, bucket):
                return
            bucket.queue.push(ts)
            self.active_buckets[bucket] = None
            return
        for dep in ts.deps:
            if dep.inline is None:  # there is something to fetch
                worker = self._best_holder(ts)
                if worker is not None:
                    worker.queue.push(ts)
                    self.backlogged[worker] = None
                    return
                break
        self.queue.push(ts)

    def _place_actor(self, ts: TaskState, bucket: Bucket) -> bool:
        """Sends a call to its actor, whatever that worker does; a new actor to where the fewest are. False: it has to wait.

        Calls are sent also to a worker whose link is lost: the link keeps them, in order, until it is back.
        """
        if bucket is self.calls:
            actor = ts.deps[-1].rare
            assert actor is not None
            assert actor.home is not None
            ts.extra().home = actor.home
            self.assign(actor.home, ts)
            actor.home.load_s -= ts.estimate_s
            ts.estimate_s = 0.0
            actor.home.parked[ts.run_id] = True  # it takes no thread of those for tasks
            return True
        ts.extra()
        usable = [] if bucket.resources else [w for w in bucket.eligible if w.usable]
        if not usable:
            return False
        worker = min(usable, key=lambda w: w.actors + w.busy)
        self.assign(worker, ts)
        self.update_room(worker)
        return True

    def _best_holder(self, ts: TaskState) -> WorkerState | None:
        """The worker with the most bytes of the inputs; the least loaded one among near equals; None: nothing to fetch."""
        held: dict[WorkerState, int] = {}
        for dep in ts.deps:
            if dep.inline is None:
                for worker in dep.holders():
                    if worker.usable:
                        held[worker] = held.get(worker, 0) + dep.size + 1
        if len(held) < 2:
            return next(iter(held), None)
        most = sorted(held, key=held.__getitem__, reverse=True)[:HOLDERS_COMPARED]
        total = sum(held.values())
        return min(most, key=lambda w: (total - held[w]) / BANDWIDTH + self.wait_s(w))

    def wait_s(self, worker: WorkerState) -> float:
        """How long a task given to the worker now would wait, by the estimates."""
        return (worker.load_s + len(worker.queue) * self.state.config.prefetch_s) / worker.nthreads

    # --- room -------------------------------------------------------------------------------------------------------

    def update_room(self, worker: WorkerState) -> None:
        """Files a worker under idle, roomy or neither, after its load has changed."""
        if not worker.usable:
            self.idle.pop(worker, None)
            self.roomy.pop(worker, None)
            return
        busy = len(worker.processing) - len(worker.parked)
        if busy == 0 and not worker.parked:
            worker.load_s = 0.0  # sums of floats drift
            worker.last_progress = 0.0  # and floats of their own at rest pin memory (see `resting`)
        if busy < worker.nthreads:
            self.idle[worker] = None
            self.roomy.pop(worker, None)
        else:
            self.idle.pop(worker, None)
            if self.has_room(worker):
                self.roomy[worker] = None
            else:
                self.roomy.pop(worker, None)

    def has_room(self, worker: WorkerState) -> bool:
        """Whether estimated work beyond what the threads run is below `prefetch_s` a thread."""
        threads = worker.nthreads
        busy = len(worker.processing) - len(worker.parked)
        return busy < threads or worker.load_s * (busy - threads) < self.state.config.prefetch_s * threads * busy

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Gives tasks to workers that have room, until tasks or room run out."""
        if self.backlogged:
            self._dispatch_own_queues()
        if self.active_buckets:
            self._dispatch_buckets()
        if len(self.queue):
            if len(self.queue) > len(self.state.tasks) + STALE_KEPT:
                self.queue.tidy()
            self._dispatch_central()

    def _dispatch_central(self) -> None:
        queue = self.queue
        lot = self._lot()
        for worker in list(self.idle):  # first of all, no thread stays idle
            self._feed(worker, max(lot, worker.nthreads - len(worker.processing) + len(worker.parked)))
            if not len(queue):
                return
        if self.roomy:
            share = max(lot, -(-len(queue) // len(self.roomy)))
            for worker in list(self.roomy):
                self._feed(worker, share)
                if not len(queue):
                    return

    def _lot(self) -> int:
        """How many tasks like the next one are worth a message."""
        head = self.queue.peek()
        if head is None or head.spec is None or head.spec.function.duration_s < 0:
            return 1
        estimate = max(MIN_ESTIMATE_S, head.spec.function.duration_s)
        return int(min(QUANTUM_S, QUANTUM_PER_WORKER_S * len(self.state.workers)) / estimate) or 1

    def _feed(self, worker: WorkerState, limit: int) -> None:
        """At most `limit` tasks of the central queue, as room allows."""
        pop = self.queue.pop
        alike = 1
        while limit > 0 and self.has_room(worker):
            ts = pop()
            if ts is None:
                break
            self.assign(worker, ts)
            limit -= 1
            if alike:  # until there are none
                alike = self._assign_alike(worker, ts, limit)
                limit -= alike
        self.update_room(worker)

    def _places(self, worker: WorkerState, estimate_s: float, limit: int) -> int:
        """How many tasks that take so long may go to the worker one after another while it has room, up to `limit`."""
        threads, prefetch_s = worker.nthreads, self.state.config.prefetch_s
        busy = len(worker.processing) - len(worker.parked)
        low, high = 0, limit
        while low < high:  # room only shrinks
            middle = (low + high) // 2
            then = busy + middle
            load_s = worker.load_s + middle * estimate_s
            if then < threads or load_s * (then - threads) < prefetch_s * threads * then:
                low = middle + 1
            else:
                high = middle
        return low

    def _assign_alike(self, worker: WorkerState, last: TaskState, limit: int) -> int:
        """`assign` for the next tasks of the central queue as long as they are like the last one and there is room; how many."""
        spec, estimate_s = last.spec, last.estimate_s
        if spec is None or spec.bucket is not None:
            return 0
        tasks: list[TaskState] = []
        inputs: list[TaskState] = []
        run_id = self.state.next_run_id
        processing = worker.processing
        for ts in self.queue.pop_alike(spec, self._places(worker, estimate_s, limit)):
            ts.state = PROCESSING
            ts.worker = worker
            ts.run_id = run_id
            ts.estimate_s = estimate_s
            processing[run_id] = ts
            inputs += ts.deps
            tasks.append(ts)
            run_id += 1
        if inputs:
            self._send_inputs(worker, inputs)
        if tasks:
            self.state.next_run_id = run_id
            worker.load_s += estimate_s * len(tasks)
            worker.outbox.add_alike(tasks, spec)
        return len(tasks)

    def _dispatch_own_queues(self) -> None:
        for worker in list(self.backlogged):
            if not worker.usable:
                continue
            while self.has_room(worker):
                central = self.queue.peek()
                ts = worker.queue.peek()
                if ts is None or (central is not None and central.priority < ts.priority):
                    ts = self.queue.pop() if central is not None else None
                else:
                    worker.queue.pop()
                if ts is None:
                    break
                self.assign(worker, ts)
            if worker.queue.peek() is None:
                self.backlogged.pop(worker, None)
            self.update_room(worker)

    def _dispatch_buckets(self) -> None:
        for bucket in sorted(self.active_buckets, key=_head_priority):
            eligible = bucket.eligible
            if not eligible and bucket.allow_other:
                eligible = {w: None for w in self.state.workers.values() if w.usable}
            for worker in sorted(eligible, key=lambda w: len(w.processing)):
                while worker.usable and self.has_room(worker) and bucket.fits_now(worker):
                    ts = bucket.queue.pop()
                    if ts is None:
                        break
                    self.assign(worker, ts)
                self.update_room(worker)
            if bucket.queue.peek() is None:
                self.active_buckets.pop(bucket)

    def assign(self, worker: WorkerState, ts: TaskState) -> None:
        """READY -> PROCESSING: a new attempt of `ts` on `worker`."""
        state = self.state
        run_id = state.next_run_id
        state.next_run_id = run_id + 1
        assert ts.state is READY
        ts.state = PROCESSING
        ts.worker = worker
        ts.run_id = run_id
        worker.processing[run_id] = ts
        spec = ts.spec
        assert spec is not None
        function = spec.function
        estimate = function.duration_s
        if estimate < MIN_ESTIMATE_S:
            estimate = state.config.prefetch_s if estimate < 0 else MIN_ESTIMATE_S
        ts.estimate_s = estimate
        worker.load_s += estimate
        if function.digest not in worker.functions:
            worker.functions.add(function.digest)
            worker.outbox.add_function(function)
        if spec.bucket is not None and spec.bucket.resources:
            spec.bucket.take(worker)
            worker.held[run_id] = spec.bucket
        if ts.deps:
            self._send_inputs(worker, ts.deps)
        worker.outbox.add_task(ts, spec)

    def _send_inputs(self, worker: WorkerState, inputs: Iterable[TaskState]) -> None:
        """Those that `worker` does not hold: the values of small ones, where to get others."""
        missing = [dep for dep in inputs if dep.who_has is not worker and not dep.held_by(worker)]
        if not missing:
            return
        for dep in missing:
            if dep.inline is None:
                for holder in dep.holders():
                    self.introduce(worker, holder)
        worker.outbox.add_inputs(missing)

    def introduce(self, worker: WorkerState, peer: WorkerState) -> None:
        """Makes sure that `worker` knows the address behind the number of `peer`."""
        if peer.number not in worker.known_peers:
            worker.known_peers.add(peer.number)
            worker.outbox.add_peer(peer)


def _head_priority(bucket: Bucket) -> int:
    head = bucket.queue.peek()
    return head.priority if head is not None else 0
