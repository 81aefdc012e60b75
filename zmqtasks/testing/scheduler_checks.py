"""What must hold in a scheduler's state between any two calls: counted anew from scratch, and compared."""

from __future__ import annotations

from collections import Counter
from typing import Any

from zmqtasks.nodes.scheduler.actors import makes_actor
from zmqtasks.nodes.scheduler.machine import SchedulerMachine
from zmqtasks.nodes.scheduler.state import (
    ERRED,
    FORGOTTEN,
    MEMORY,
    PROCESSING,
    READY,
    RELEASED,
    WAITING,
    TaskState,
    WorkerState,
)

UNFINISHED = (WAITING, READY, PROCESSING)


def check_scheduler(machine: SchedulerMachine) -> None:
    """Raises AssertionError that names the task and what is wrong with its record."""
    state = machine.state
    holds: Counter[int] = Counter()
    dependents: Counter[int] = Counter()
    for ts in state.tasks.values():
        for dep in ts.deps:
            dependents[id(dep)] += 1
            assert dep.state is not FORGOTTEN, f"{ts.name} depends on {dep.name}, which is forgotten"
        held = list(ts.deps) if ts.state in UNFINISHED else []
        if ts.rare is not None:
            held += ts.rare.references if ts.state in UNFINISHED else ()
            held += ts.rare.contains
        holds.update(id(dep) for dep in held)
    for key, ts in state.tasks.items():
        assert ts.key == key, f"{ts.name} is filed under {key}"
        assert ts.holds == holds[id(ts)], f"{ts.name}: {ts.holds} holds, counted {holds[id(ts)]}"
        assert ts.dependents == dependents[id(ts)], (
            f"{ts.name}: {ts.dependents} dependents, counted {dependents[id(ts)]}"
        )
        _check_task(machine, ts)
    inline_bytes = sum(len(ts.inline) for ts in state.tasks.values() if ts.inline is not None)
    assert state.inline_bytes == inline_bytes, f"{state.inline_bytes} bytes of small results, counted {inline_bytes}"
    for worker in state.workers.values():
        _check_worker(worker)
        stored = [ts.size for ts in state.tasks.values() if ts.held_by(worker)]
        assert worker.stored_keys == len(stored), f"{worker.name}: {worker.stored_keys} values, counted {len(stored)}"
        assert worker.stored_bytes == sum(stored), f"{worker.name}: {worker.stored_bytes} bytes, counted {sum(stored)}"
        _check_actors(machine, worker)
    _check_queues(machine)


def _check_worker(worker: WorkerState) -> None:
    load_s = 0.0
    for run_id, task in worker.processing.items():
        if task is not None and task.run_id == run_id and task.state is PROCESSING:
            assert task.worker is worker, f"{task.name} is in the list of {worker.name}, not of its worker"
            load_s += task.estimate_s
        assert (task is None) == (run_id in worker.abandoned), f"run {run_id} of {worker.name}: {task}, abandoned?"
    assert abs(worker.load_s - load_s) < 1e-6, f"{worker.name}: load {worker.load_s}, counted {load_s}"
    books: dict[str, dict[int, Any]] = {
        "held": worker.held,
        "parked": worker.parked,
        "retracting": worker.retracting,
        "abandoned": worker.abandoned,
    }
    for name, runs in books.items():
        assert runs.keys() <= worker.processing.keys(), f"{worker.name}: {name} has runs that it has not"
    for name, amount in worker.resources.items():
        held = sum(bucket.resources.get(name, 0.0) for bucket in worker.held.values())
        assert abs(worker.available[name] + held - amount) < 1e-6, (
            f"{worker.name}: {worker.available[name]} of {amount} {name} are free, {held} are held"
        )


def _check_actors(machine: SchedulerMachine, worker: WorkerState) -> None:
    living = [ts for ts in machine.state.tasks.values() if makes_actor(ts) and ts.state is MEMORY]
    here = sum(ts.rare is not None and ts.rare.home is worker for ts in living)
    assert worker.actors == here, f"{worker.name}: {worker.actors} actors, counted {here}"
    for ts in living:
        assert ts.rare is not None, f"the actor {ts.name} is nowhere"
        assert ts.rare.home is not None, f"the actor {ts.name} is nowhere"
        assert ts.rare.home.session in machine.state.workers, f"{ts.name} outlives its worker {ts.rare.home.name}"
    for run_id, task in worker.processing.items():
        if task is not None and task.spec is not None and task.spec.bucket is machine.placement.calls:
            actor = task.deps[-1].rare
            assert actor is not None, f"{task.name} is a call of nothing"
            assert actor.home is worker, f"{task.name} is not where its actor is"
            assert run_id in worker.parked, f"{task.name} takes a thread"


def _check_queues(machine: SchedulerMachine) -> None:
    placement = machine.placement
    queued = {id(ts) for ts in placement.queue.tasks()}
    for bucket in placement.active_buckets:
        queued.update(id(ts) for ts in bucket.queue.tasks())
    for worker in placement.backlogged:
        assert worker.session in machine.state.workers, f"{worker.name} has left and is backlogged"
        queued.update(id(ts) for ts in worker.queue.tasks())
    for ts in machine.state.tasks.values():
        assert ts.state is not READY or id(ts) in queued, f"{ts.name} is ready and in no queue"
    for worker in (*placement.idle, *placement.roomy):
        assert worker.session in machine.state.workers, f"{worker.name} has left and is to be given tasks"
        assert worker.usable, f"{worker.name} is not usable and is to be given tasks"


def _check_task(machine: SchedulerMachine, ts: TaskState) -> None:
    needed = ts.wanted or ts.holds > 0
    missing = sum(dep.state is not MEMORY for dep in ts.deps)
    assert (ts.who_has is not None) == (ts.state is MEMORY), f"{ts.name}: {ts.state.name} with holders {ts.who_has}"
    for worker in ts.holders():
        assert worker.session in machine.state.workers, f"{ts.name} is said to be on {worker.name}, which has left"
    match ts.state:
        case _ if ts.state is WAITING:
            assert ts.recount or ts.waiting_on == missing, f"{ts.name}: waits for {ts.waiting_on}, missing {missing}"
            assert missing or ts.spec is None, f"{ts.name} waits for nothing"
            for dep in ts.deps:
                assert dep.state is MEMORY or ts in (dep.waiters or ()), (
                    f"{dep.name} does not know that {ts.name} waits"
                )
                assert dep.state is MEMORY or dep.state in UNFINISHED, (
                    f"{ts.name} waits for {dep.name}: {dep.state.name}"
                )
            assert needed, f"{ts.name} waits and nobody needs it"
        case _ if ts.state is READY:
            assert not missing, f"{ts.name} is ready, {missing} inputs are missing"
            assert needed, f"{ts.name} is ready and nobody needs it"
        case _ if ts.state is PROCESSING:
            assert ts.worker is not None, f"{ts.name} is processed nowhere"
            assert ts.worker.processing.get(ts.run_id) is ts, f"{ts.name} is not in the list of its worker"
            assert needed, f"{ts.name} is processed and nobody needs it"
        case _ if ts.state is MEMORY:
            assert needed, f"{ts.name} is kept and nobody needs it"
        case _ if ts.state is RELEASED:
            assert not ts.wanted, f"{ts.name} is wanted and released"
            assert ts.dependents, f"{ts.name} is released, should be forgotten"
            assert not ts.holds, f"{ts.name} is released and held"
        case _ if ts.state is ERRED:
            assert ts.rare is not None, f"{ts.name} erred without an error"
            assert ts.rare.error is not None, f"{ts.name} erred without an error"
        case _:
            raise AssertionError(f"{ts.name} is {ts.state.name} and on file")
