"""What must hold in a scheduler's state between any two calls: counted anew from scratch, and compared."""

from __future__ import annotations

from collections import Counter

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
    for worker in state.workers.values():
        for run_id, task in worker.processing.items():
            if task is not None and task.run_id == run_id and task.state is PROCESSING:
                assert task.worker is worker, f"{task.name} is in the list of {worker.name}, not of its worker"


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
