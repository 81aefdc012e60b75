"""What the scheduler does when nothing is left to do after many tasks: it lets go of the memory that they took.

A single small object keeps a whole arena (1 MiB) of Python's allocator, and numbers that were made at the peak are such objects.
Made anew now, they go where the allocator has room first: beside other objects of the peak, which go a moment later. So that room
is filled before, and the old numbers keep theirs until the last new one is made; then places are freed beside objects that
live as long as the scheduler, and the allocator takes what was freed last. `bench.tasks zero` has the memory after rounds of tasks.
"""

from __future__ import annotations

from zmqtasks.nodes.scheduler.state import SchedulerState

_PLACES = 1 << 14
"""More than there are free places of the size of a number in arenas that are nearly empty; filling them takes 0.3 ms."""
_BEYOND_SMALL_INTS = 1 << 20
_FREE_FLOATS = 200
"""More than Python keeps for the next ones."""
_ARENA_BITS = 20


def rest(state: SchedulerState) -> None:
    """Empties the tables, each of which lets go of what it grew to, and makes the numbers anew. No task is left."""
    state.tasks.clear()
    fill: list[float] = [_anew(number) for number in range(_BEYOND_SMALL_INTS, _BEYOND_SMALL_INTS + _PLACES)]
    fill += [number * 1.0 for number in range(_FREE_FLOATS)]
    workers = state.workers.values()
    old = [state.now, state.next_run_id, state.next_priority, state.inline_bytes, *state.counters.values()]
    old += [function.duration_s for function in state.functions.values()]
    old += [number for worker in workers for number in (worker.stored_bytes, worker.stored_keys)]
    homes = {id(table) >> _ARENA_BITS for table in (state.counters, state.functions, state.workers, state.lost)}
    places = [place for place, number in enumerate(fill) if id(number) >> _ARENA_BITS in homes]
    for place in places[: 2 * len(old)]:
        fill[place] = 0
    for name, count in state.counters.items():
        state.counters[name] = _anew(count)
    state.now *= 1.0
    state.next_run_id = _anew(state.next_run_id)
    state.next_priority = _anew(state.next_priority)
    state.inline_bytes = _anew(state.inline_bytes)
    for function in state.functions.values():
        function.duration_s *= 1.0
    for worker in workers:
        if not worker.processing:
            worker.processing.clear()
        worker.stored_bytes = _anew(worker.stored_bytes)
        worker.stored_keys = _anew(worker.stored_keys)
    old.clear()
    fill.clear()


def _anew(number: int) -> int:
    """The same number as a new object."""
    return number + 1 - 1
