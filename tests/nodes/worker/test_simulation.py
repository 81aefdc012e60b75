"""The worker's machine under random stimuli in random order: every run is answered once, and nothing is left behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from zmqtasks.ids import Key
from zmqtasks.nodes.worker.instructions import (
    DropInline,
    DropKeys,
    FetchKeys,
    Finished,
    Interrupt,
    KeepInline,
    StartRuns,
    TakeBack,
)
from zmqtasks.nodes.worker.machine import WorkerMachine
from zmqtasks.nodes.worker.state import Run, RunState
from zmqtasks.protocol.ops import (
    CancelRuns,
    ComputeTasks,
    DataAdded,
    ErrorInfo,
    FetchFailed,
    FreeKeys,
    Inputs,
    Peers,
    RetractRuns,
    RunsDropped,
    SchedulerToWorker,
    TaskErred,
    TasksFinished,
    UpdateLocations,
)

PEERS = {1: "one", 2: "two", 3: "three"}


class World:
    """Scheduler, executor, store and peers around one machine; any of them may do its next step at any time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.machine = WorkerMachine(self.rng.choice([1, 50, 10_000]), debug=True)
        self.queue: list[Run] = []
        self.executing: list[Run] = []
        self.blocked: list[Run] = []
        self.fetches: list[FetchKeys] = []
        self.store: set[Key] = set()
        self.inline: set[Key] = set()
        self.sent: set[int] = set()
        self.answers: Counter[int] = Counter()
        self.missing: set[Key] = set()
        self.keys: list[Key] = [f"d{number}" for number in range(8)]
        self.last_run = 0
        self.machine.receive([Peers(list(PEERS), list(PEERS.values()))], 0.0)

    # --- what comes out ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        while True:
            ops, instructions = self.machine.outbox.take()
            for op in ops:
                match op:
                    case TasksFinished() | RunsDropped():
                        self.answers.update(op.run_ids)
                    case TaskErred():
                        self.answers[op.run_id] += 1
                    case FetchFailed():
                        self.missing.update(op.keys)
                    case DataAdded():
                        assert set(op.keys) <= self.store, "a replica was reported that the store does not have"
            for instruction in instructions:
                self.carry_out(instruction)
            if not instructions:
                break
        assert max(self.answers.values(), default=0) <= 1, "a run was answered twice"
        assert set(self.machine.inputs.held) <= self.store

    def carry_out(self, instruction: object) -> None:
        match instruction:
            case StartRuns(runs):
                for run in runs:
                    assert set(run.deps) <= self.store, "a run was started without its inputs"
                self.queue.extend(runs)
            case TakeBack(runs):
                back = [run for run in self.queue if run in runs]
                self.queue = [run for run in self.queue if run not in back]
                self.machine.runs_taken_back(back)
            case FetchKeys():
                assert instruction.address in PEERS.values()
                self.fetches.append(instruction)
            case KeepInline(keys, _):
                self.store.update(keys)
                self.inline.update(keys)
            case DropKeys(keys):
                self.store.difference_update(keys)
            case DropInline(keys):
                self.store.difference_update(self.inline.intersection(keys))
                self.inline.difference_update(keys)
            case Interrupt():
                pass
            case _:
                raise AssertionError(f"unexpected {instruction}")

    def keep(self, key: Key) -> None:
        self.store.add(key)
        self.inline.discard(key)

    # --- what goes in -----------------------------------------------------------------------------------------------

    def receive(self, *ops: SchedulerToWorker) -> None:
        self.machine.receive(ops, 0.0)

    def holders(self) -> list[int]:
        return self.rng.sample(list(PEERS), self.rng.randint(0, 3))

    def compute(self) -> None:
        count = self.rng.randint(1, 4)
        run_ids = list(range(self.last_run + 1, self.last_run + count + 1))
        self.last_run += count
        deps = [self.rng.choices(self.keys, k=self.rng.choice([0, 0, 1, 2, 3])) for _ in run_ids]
        flat = [key for keys in deps for key in keys]
        told = [key for key in dict.fromkeys(flat) if self.rng.random() < 0.9]
        inline = [self.rng.random() < 0.3 for _ in told]
        inputs = Inputs(
            told,
            [self.rng.randint(1, 100) for _ in told],
            [[] if here else self.holders() for here in inline],
            [1 if here else -1 for here in inline],
            b"v" * sum(inline),
        )
        keys: list[Key] = [self.rng.choice([f"r{run_id}", f"d{run_id % 8}"]) for run_id in run_ids]
        tasks = ComputeTasks(b"d", "f", keys, run_ids, [0] * count, dep_counts=[len(keys) for keys in deps], deps=flat)
        self.sent.update(run_ids)
        self.receive(inputs, tasks)

    def some_runs(self) -> list[int]:
        return [self.rng.randint(1, self.last_run) for _ in range(self.rng.randint(1, 3))] if self.last_run else []

    def retract(self) -> None:
        self.receive(RetractRuns(self.some_runs()))

    def cancel(self) -> None:
        self.receive(CancelRuns(self.some_runs()))

    def free(self) -> None:
        self.receive(FreeKeys(self.rng.sample(self.keys, 2)))

    def announce(self) -> None:
        key = self.rng.choice(self.keys)
        here = self.rng.random() < 0.5
        self.receive(Inputs([key], [5], [[] if here else self.holders()], [1 if here else -1], b"v" * here))

    def locate(self) -> None:
        if self.missing:
            key = self.rng.choice(sorted(self.missing, key=str))
            self.receive(UpdateLocations([key], [self.holders()]))

    def put(self) -> None:
        key = self.rng.choice(self.keys)
        self.keep(key)
        self.machine.data_put([key], [3])

    def start(self) -> None:
        if self.queue:
            self.executing.append(self.queue.pop(0))

    def report_executing(self) -> None:
        self.machine.runs_executing([*self.executing, *self.blocked])

    def block(self) -> None:
        free = [run for run in self.executing if run.state is not RunState.SECEDED]
        if free:
            run = self.rng.choice(free)
            self.executing.remove(run)
            self.machine.run_blocked(run)
            self.blocked.append(run)

    def resume(self) -> None:
        if self.blocked:
            run = self.blocked.pop(self.rng.randrange(len(self.blocked)))
            self.machine.run_resumed(run)
            self.executing.append(run)

    def secede(self) -> None:
        if self.executing:
            run = self.rng.choice(self.executing)
            if run.state is RunState.SECEDED:
                self.machine.run_resumed(run)
            else:
                self.machine.run_seceded(run)

    def finish(self) -> None:
        count = self.rng.randint(0, len(self.executing))
        runs, self.executing = self.executing[:count], self.executing[count:]
        good = [run for run in runs if self.rng.random() < 0.8]
        for run in good:
            if not run.cancelled:
                self.keep(run.key)
        self.machine.runs_finished([Finished(run, None, b"x", 1, 1) for run in good])
        for run in runs:
            if run not in good:
                self.machine.run_erred(run, ErrorInfo("exception", "no"), 1)

    def fetched(self) -> None:
        if not self.fetches:
            return
        fetch = self.fetches.pop(self.rng.randrange(len(self.fetches)))
        if self.rng.random() < 0.2:
            self.machine.fetch_broken(fetch.request)
            return
        fates = {key: self.rng.random() for key in fetch.keys}
        sizes = {key: 4 for key, fate in fates.items() if fate < 0.7}
        missing = [key for key, fate in fates.items() if 0.7 <= fate < 0.95]
        failed = {key: "no pickle" for key, fate in fates.items() if fate >= 0.95}
        unanswered = list(failed) if self.rng.random() < 0.5 else []
        for key in unanswered:
            del failed[key]
        kept = self.machine.fetch_finished(fetch.request, sizes, missing, failed, unanswered)
        for key in kept:
            self.keep(key)

    def tick(self) -> None:
        self.machine.tick()

    def step(self) -> None:
        self.rng.choice(STEPS)(self)
        self.flush()

    def end(self) -> None:
        """The scheduler cancels everything, and all that is under way ends."""
        self.receive(CancelRuns(sorted(self.sent)))
        self.flush()
        while self.queue or self.executing or self.blocked or self.fetches:
            for step in (World.start, World.resume, World.finish, World.fetched):
                step(self)
                self.flush()
        for _ in range(2):
            self.machine.tick()
            self.flush()


STEPS: list[Callable[[World], None]] = [
    World.compute,
    World.compute,
    World.retract,
    World.cancel,
    World.free,
    World.announce,
    World.locate,
    World.locate,
    World.put,
    World.start,
    World.start,
    World.report_executing,
    World.block,
    World.resume,
    World.secede,
    World.finish,
    World.finish,
    World.fetched,
    World.fetched,
    World.tick,
]


@pytest.mark.parametrize("block", range(10))
def test_every_run_is_answered_once_and_nothing_is_left(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        try:
            world = World(seed)
            for _ in range(150):
                world.step()
            world.end()
            assert set(world.answers) == world.sent, f"unanswered: {world.sent - set(world.answers)}"
            assert world.machine.runs == {}
            assert world.machine.inputs.records == {}
            assert set(world.machine.inputs.held) == world.store
            assert world.machine.inputs.fetching == 0
            assert world.machine.inputs._bytes_in_flight == 0
            assert world.machine.inputs._bytes_from == {}
            assert not any(holder in world.machine.inputs._aside for holder in PEERS)
        except BaseException:
            print(f"seed {seed}")
            raise
