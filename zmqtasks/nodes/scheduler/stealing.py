"""Work stealing: idle workers get what waits for busy ones, and what was given to those too early.

An idle worker first takes from the queues of others, here, without asking anyone. Only then are busy workers asked to return
what they have not started (`RetractRuns`): not at once, since most are through within a round trip, and not what takes longer to
move than it would wait. A worker that does not answer in time (stopped, say) has its tasks run elsewhere under a new run id;
the first finish wins.
"""

from __future__ import annotations

from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.placement import BANDWIDTH, HOLDERS_COMPARED, Placement
from zmqtasks.nodes.scheduler.state import PROCESSING, READY, SchedulerState, TaskState, WorkerState
from zmqtasks.protocol.ops import RetractRuns

RETRACT_AFTER_S = 0.005
"""How long workers may be idle beside busy ones before work is taken back: shorter than a long task, longer than a round trip."""
RETRACT_PER_WORKER_S = 5e-6
"""A look for work to take back costs about this per worker; with many workers it is taken less often."""


class WorkStealing:
    """What moves from busy workers to idle ones, and the requests for it that are under way."""

    def __init__(self, state: SchedulerState, placement: Placement, lifecycle: Lifecycle) -> None:
        self._state = state
        self._placement = placement
        self._lifecycle = lifecycle
        self._retract_at: float | None = None
        self._returned: list[tuple[WorkerState, TaskState]] = []
        """Tasks that workers gave back for idle ones."""

    # --- what is here -----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Once all that could be placed is placed: idle workers take what others wait with, or will ask for some soon."""
        placement = self._placement
        if not placement.idle:
            return
        if placement.backlogged:
            self._take_from_backlogged()
        if self._retract_at is None and self._state.next_run_id and not len(placement.queue):
            self._plan_retraction()

    def _take_from_backlogged(self) -> None:
        """Idle workers take what waits for busy ones, where moving the inputs takes less time than waiting."""
        placement = self._placement
        for worker in list(placement.idle):
            victims = [
                w for w in placement.backlogged if w is not worker and len(w.queue) and not placement.has_room(w)
            ]
            if not victims:
                return
            victim = max(victims, key=lambda w: len(w.queue))
            ts = victim.queue.pop_last()
            if ts is None:
                placement.backlogged.pop(victim, None)
                continue
            if _missing_bytes(worker, ts) / BANDWIDTH > self._stall_s(victim):
                victim.queue.push(ts)
                return
            placement.assign(worker, ts)
            placement.update_room(worker)

    def _stall_s(self, worker: WorkerState) -> float:
        """How long what waits for a busy worker will wait, at a guess: as long as that was silent already, at least."""
        silent_s = self._state.now - worker.last_progress if worker.last_progress else 0.0
        return max(self._placement.wait_s(worker), silent_s)

    # --- what was given already -------------------------------------------------------------------------------------

    def _plan_retraction(self) -> None:
        workers = len(self._state.workers)
        if workers > len(self._placement.idle):
            self._retract_at = self._state.now + max(RETRACT_AFTER_S, workers * RETRACT_PER_WORKER_S)

    def _retract(self) -> None:
        """Asks workers with tasks ahead to give back a fair share for the idle ones."""
        self._retract_at = None
        idle = self._placement.idle
        if not idle or len(self._placement.queue):
            return
        now = self._state.now
        free = sum(w.nthreads - w.busy for w in idle)
        loaded = [w for w in self._state.workers.values() if w.usable and w.busy > w.nthreads and not w.retracting]
        loaded.sort(key=lambda w: w.load_s, reverse=True)
        for worker in loaded:
            if free <= 0:
                break
            if not worker.last_progress:
                worker.last_progress = now  # it has just begun: have a look next time
                continue
            if worker.load_s / worker.nthreads < RETRACT_AFTER_S and now - worker.last_progress < RETRACT_AFTER_S:
                continue  # it will be through before the tasks could have moved
            surplus = worker.busy - worker.nthreads
            runs = self._last_unstarted(worker, min(surplus, max(free, surplus // 2)))
            if runs:
                deadline = now + self._state.config.heartbeat_s
                worker.retracting.update((run_id, deadline) for run_id in runs)
                self._state.retracting[worker] = None
                worker.outbox.add(RetractRuns(runs))
                self._state.counters["retracted"] += len(runs)
                free -= len(runs)
        if any(w.usable and w.busy > w.nthreads for w in self._state.workers.values()):
            self._plan_retraction()

    def _last_unstarted(self, worker: WorkerState, count: int) -> list[int]:
        """The runs given last that it hasn't reported as executing and that an idle worker may run."""
        runs: list[int] = []
        movable = self._stall_s(worker) * BANDWIDTH
        for run_id, ts in reversed(worker.processing.items()):
            if len(runs) >= count:
                break
            if ts is None or run_id in worker.executing or run_id in worker.parked or ts.run_id != run_id:
                continue
            if ts.deps and sum(dep.size for dep in ts.deps if dep.inline is None) > movable:
                continue
            bucket = ts.spec.bucket if ts.spec is not None else None
            if bucket is None or any(w in self._placement.idle and bucket.fits_now(w) for w in bucket.eligible):
                runs.append(run_id)
        return runs

    # --- answers ----------------------------------------------------------------------------------------------------

    def came_back(self, source: WorkerState, ts: TaskState) -> None:
        """A worker gave back what it was asked for; the task is READY again."""
        self._returned.append((source, ts))

    def place_returned(self) -> None:
        """Before others: tasks with inputs go to the idle, or they would be queued again where they come from."""
        if not self._returned:
            return
        returned, self._returned = self._returned, []
        placement = self._placement
        for source, ts in returned:
            if ts.state is not READY or not ts.deps or ts.spec is None or ts.spec.bucket is not None:
                continue
            others = [w for w, _ in zip(placement.idle, range(HOLDERS_COMPARED), strict=False) if w is not source]
            if others:
                worker = min(others, key=lambda w: _missing_bytes(w, ts))
                placement.assign(worker, ts)
                placement.update_room(worker)

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether `deadline` gives a time."""
        return self._retract_at is not None or bool(self._state.retracting)

    def deadline(self) -> float | None:
        """When `tick` is to be called, at the latest; None: no need."""
        times = [t for w in self._state.retracting for t in w.retracting.values()]
        if self._retract_at is not None:
            times.append(self._retract_at)
        return min(times) if times else None

    def tick(self) -> None:
        """Does what `deadline` asked for."""
        self._give_up_waiting()
        if self._retract_at is not None and self._retract_at <= self._state.now:
            self._retract()

    def _give_up_waiting(self) -> None:
        now = self._state.now
        for worker in list(self._state.retracting):
            if not worker.retracting:
                del self._state.retracting[worker]
            overdue = [run_id for run_id, until in worker.retracting.items() if until <= now]
            for run_id in overdue:
                del worker.retracting[run_id]
                ts = worker.processing.get(run_id)
                if ts is None or ts.run_id != run_id or ts.state is not PROCESSING:
                    continue
                if ts.spec is not None and ts.spec.options.idempotent and worker.lost_at is None:
                    self._state.note(ts.name, f"{worker.address} did not give it back in time; another attempt is made")
                    worker.load_s -= ts.estimate_s
                    self._lifecycle.requeue(ts)


def _missing_bytes(worker: WorkerState, ts: TaskState) -> int:
    return sum(dep.size for dep in ts.deps if dep.inline is None and not dep.held_by(worker))
