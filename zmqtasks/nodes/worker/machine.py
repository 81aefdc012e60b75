"""The worker's logic, without I/O: ops and outcomes in, ops and instructions out.

Theory of operation
-------------------
A *run* is one attempt at a task. It comes with `ComputeTasks`, waits for the inputs that are not held here (`inputs`
fetches them), is handed to the executor (`StartRuns`) and ends in exactly one answer to the scheduler:
`TasksFinished`, `TaskErred` or `RunsDropped`. After the answer nothing is remembered of it.

The executor's threads take runs by themselves, so that no word is exchanged for each start: `READY` means "handed
over; a thread may have taken it". Whoever wants a run back therefore has to ask (`TakeBack`), and the shell reports
those that no thread had taken (`runs_taken_back`): the others end as usual. Runs that execute for a while, block or
secede are reported, and the machine knows them as `EXECUTING`, `BLOCKED` or `SECEDED`.

A cancelled run that has started is asked to stop (`Interrupt`); however it ends, its answer is `RunsDropped` and its
result is not kept. Values never pass through here: the shell's store has them, the machine says what to keep and what
to drop.

Every stimulus is a method; afterwards the caller drains `outbox`. A stimulus that makes a transition which
`transitions` does not list raises `InvalidTransitionError`. With `debug` each run's error carries its story.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import assert_never

from zmqtasks.ids import Key
from zmqtasks.nodes.worker.inputs import InputTable
from zmqtasks.nodes.worker.instructions import (
    Call,
    Finished,
    Interrupt,
    LearnFunctions,
    Outbox,
    Plug,
    StartRuns,
    Stop,
    TakeBack,
)
from zmqtasks.nodes.worker.state import Run, RunState, TaskGroup
from zmqtasks.nodes.worker.transitions import RUN_TRANSITIONS, invalid_run_transition, origins
from zmqtasks.protocol.ops import (
    CallFunction,
    CancelRuns,
    ComputeTasks,
    DataAdded,
    ErrorInfo,
    FreeKeys,
    Goodbye,
    Inputs,
    Peers,
    PlaceFile,
    PutFunctions,
    RetractRuns,
    RunsDropped,
    RunsExecuting,
    SchedulerToWorker,
    SetUpPlugin,
    StopWorker,
    TaskBlocked,
    TaskErred,
    TaskResumed,
    TaskSeceded,
    TasksFinished,
    TearDownPlugin,
    UpdateLocations,
)

_MAY_FINISH = origins(RUN_TRANSITIONS, RunState.FINISHED)
_MAY_DROP = origins(RUN_TRANSITIONS, RunState.DROPPED)
_STARTED = (RunState.EXECUTING, RunState.BLOCKED, RunState.SECEDED)


class WorkerMachine:
    """The state of one worker; see the module's docstring."""

    def __init__(self, fetch_bytes: int = 256 << 20, debug: bool = False) -> None:
        self.outbox = Outbox()
        self.runs: dict[int, Run] = {}
        """Runs that have not been answered."""
        self.inputs = InputTable(self.outbox, fetch_bytes)
        self._stories: dict[int, list[str]] | None = {} if debug else None

    # --- stimuli from the scheduler ---------------------------------------------------------------------------------

    def receive(self, ops: Iterable[SchedulerToWorker], now: float) -> None:
        """Takes a batch of the scheduler's ops in; `now` (seconds, any origin) only dates the stories."""
        for op in ops:
            match op:
                case ComputeTasks():
                    self._on_compute_tasks(op, now)
                case Inputs():
                    self._start(self.inputs.learn(op))
                case FreeKeys():
                    self.inputs.free(op.keys)
                case PutFunctions():
                    self.outbox.instructions.append(LearnFunctions(op.digests, op.functions))
                case Peers():
                    self.inputs.peers.update(zip(op.numbers, op.addresses, strict=True))
                case RetractRuns():
                    self._on_retract_runs(op)
                case CancelRuns():
                    self._on_cancel_runs(op)
                case UpdateLocations():
                    self.inputs.update_locations(op.keys, op.holders)
                case CallFunction():
                    self.outbox.instructions.append(Call(op))
                case PlaceFile() | SetUpPlugin() | TearDownPlugin():
                    self.outbox.instructions.append(Plug(op))
                case StopWorker():
                    self.outbox.instructions.append(Stop(op.reason))
                case Goodbye():
                    pass  # the channel ends, which the shell sees
                case _:
                    assert_never(op)
        self.inputs.plan_fetches()

    def _on_compute_tasks(self, op: ComputeTasks, now: float) -> None:
        group = TaskGroup(op.function, op.name, op.resources, op.actor)
        runs = self.runs
        started: list[Run] = []
        if not op.args and not op.deps:
            for key, run_id, priority in zip(op.keys, op.run_ids, op.priorities, strict=True):
                runs[run_id] = run = Run(run_id, key, priority, group, RunState.READY)
                started.append(run)
        else:
            self._take_in(op, group, started)
        if self._stories is not None:
            for run_id in op.run_ids:
                self._stories[run_id] = [f"{now:.6f} ComputeTasks"]
        if started:
            self.outbox.instructions.append(StartRuns(started))

    def _take_in(self, op: ComputeTasks, group: TaskGroup, started: list[Run]) -> None:
        count = len(op.keys)
        args_lengths = op.args_lengths or [0] * count
        dep_counts = op.dep_counts or [0] * count
        args_at = deps_at = 0
        for key, run_id, priority, args_length, dep_count in zip(
            op.keys, op.run_ids, op.priorities, args_lengths, dep_counts, strict=True
        ):
            args = op.args[args_at : args_at + args_length] if args_length else b""
            args_at += args_length
            run = self.runs[run_id] = Run(run_id, key, priority, group, RunState.READY, args)
            if dep_count:
                run.deps = op.deps[deps_at : deps_at + dep_count]
                deps_at += dep_count
                self.inputs.register(run)
                if run.missing:
                    run.state = RunState.WAITING
                    continue
            started.append(run)

    def _on_retract_runs(self, op: RetractRuns) -> None:
        dropped: list[int] = []
        asked: list[Run] = []
        for run_id in op.run_ids:
            if (run := self.runs.get(run_id)) is None:
                continue  # its answer is on the way
            if run.state is RunState.WAITING:
                self._drop(run, dropped)
            elif run.state is RunState.READY:
                asked.append(run)
        if asked:
            self.outbox.instructions.append(TakeBack(asked))
        if dropped:
            self.outbox.ops.append(RunsDropped(dropped))

    def _on_cancel_runs(self, op: CancelRuns) -> None:
        dropped: list[int] = []
        asked: list[Run] = []
        started: list[Run] = []
        for run_id in op.run_ids:
            if (run := self.runs.get(run_id)) is None:
                continue
            run.cancelled = True
            if run.state is RunState.WAITING:
                self._drop(run, dropped)
                continue
            started.append(run)
            if run.state is RunState.READY:
                asked.append(run)
        if asked:
            self.outbox.instructions.append(TakeBack(asked))
        if started:
            self.outbox.instructions.append(Interrupt(started))
        if dropped:
            self.outbox.ops.append(RunsDropped(dropped))

    # --- stimuli from the executor ----------------------------------------------------------------------------------

    def runs_finished(self, outcomes: Sequence[Finished]) -> None:
        """Runs gave results, which are in the store by now unless the run is cancelled."""
        run_ids: list[int] = []
        lengths: list[int] = []
        values: list[bytes] = []
        durations: list[int] = []
        sizes: list[int] = []
        reference_counts: list[int] = []
        references: list[Key] = []
        dropped: list[int] = []
        ready: list[Run] = []
        all_inline = True
        held, records, runs = self.inputs.held, self.inputs.records, self.runs
        for outcome in outcomes:
            run = outcome.run
            if run.state not in _MAY_FINISH:
                raise self._invalid(run, RunState.FINISHED, "runs_finished")
            if run.cancelled:
                self._drop(run, dropped if not outcome.answered else [])
                continue
            run.state = RunState.FINISHED
            del runs[run.run_id]
            if run.records:
                self.inputs.release(run)
            if run.key in records:
                self.inputs.hold(run.key, outcome.size, ready)
            else:
                held[run.key] = outcome.size
            if outcome.answered:
                continue
            run_ids.append(run.run_id)
            durations.append(outcome.duration_us)
            sizes.append(outcome.size)
            if outcome.data is None:
                lengths.append(-1)
                all_inline = False
            else:
                lengths.append(len(outcome.data))
                values.append(outcome.data)
            reference_counts.append(len(outcome.references) if outcome.references else 0)
            if outcome.references:
                references.extend(outcome.references)
        if run_ids:
            same_sizes = all_inline and sizes == lengths
            self.outbox.ops.append(
                TasksFinished(
                    run_ids,
                    lengths,
                    b"".join(values),
                    durations,
                    [] if same_sizes else sizes,
                    reference_counts if references else [],
                    references,
                )
            )
        self._forget_stories(run_ids)
        if dropped:
            self.outbox.ops.append(RunsDropped(dropped))
        self._start(ready)

    def run_erred(self, run: Run, error: ErrorInfo, duration_us: int) -> None:
        """A run raised."""
        if run.cancelled:
            dropped: list[int] = []
            self._drop(run, dropped)
            self.outbox.ops.append(RunsDropped(dropped))
            return
        self._change(run, RunState.ERRED, "run_erred")
        del self.runs[run.run_id]
        self._forget_stories([run.run_id])
        self.inputs.release(run)
        self.outbox.ops.append(TaskErred(run.run_id, error, duration_us))

    def runs_taken_back(self, runs: Sequence[Run]) -> None:
        """The answer to `TakeBack`: the runs that no thread had taken."""
        dropped: list[int] = []
        for run in runs:
            self._drop(run, dropped)
        if dropped:
            self.outbox.ops.append(RunsDropped(dropped))

    def runs_executing(self, runs: Sequence[Run]) -> None:
        """Runs that have been executing for a while; told to the scheduler each time."""
        told = []
        for run in runs:
            if self.runs.get(run.run_id) is not run:
                continue
            if run.state is RunState.READY:
                self._change(run, RunState.EXECUTING, "runs_executing")
            told.append(run.run_id)
        if told:
            self.outbox.ops.append(RunsExecuting(told))

    def run_blocked(self, run: Run) -> None:
        """A run waits for a future: its slot is free."""
        self._change(run, RunState.BLOCKED, "run_blocked")
        self.outbox.ops.append(TaskBlocked(run.run_id))

    def run_resumed(self, run: Run) -> None:
        """The wait is over and the run has a slot again, or it has rejoined."""
        self._change(run, RunState.EXECUTING, "run_resumed")
        self.outbox.ops.append(TaskResumed(run.run_id))

    def run_seceded(self, run: Run) -> None:
        """A run left the slots."""
        self._change(run, RunState.SECEDED, "run_seceded")
        self.outbox.ops.append(TaskSeceded(run.run_id))

    # --- stimuli from data links ------------------------------------------------------------------------------------

    def fetch_finished(
        self,
        request: int,
        sizes: dict[Key, int],
        missing: Iterable[Key],
        failed: dict[Key, str],
        unanswered: Iterable[Key] = (),
    ) -> list[Key]:
        """A peer has answered; the values of the returned keys are put into the store before the outbox is drained.

        The link broke before it answered for `unanswered`: these are dealt with as by `fetch_broken`.
        """
        ready: list[Run] = []
        kept, silent = self.inputs.fetch_finished(request, sizes, missing, unanswered, ready)
        for record in silent:
            reason = failed.get(record.key, "the answer of its holder did not mention it")
            text = f"SerializationError: input {record.key!r} cannot be sent: {reason}"
            for run in self.inputs.give_up(record, "fetch failed"):
                if run.run_id in self.runs:
                    self.run_erred(run, ErrorInfo("SerializationError", text), 0)
        self._start(ready)
        self.inputs.plan_fetches()
        return kept

    def fetch_broken(self, request: int) -> None:
        """A peer could not be reached: other holders are tried, or the scheduler is told."""
        self.inputs.fetch_broken(request)
        self.inputs.plan_fetches()

    def data_put(self, keys: Sequence[Key], sizes: Sequence[int]) -> None:
        """Values that a client or peer put into the store."""
        ready: list[Run] = []
        for key, size in zip(keys, sizes, strict=True):
            self.inputs.hold(key, size, ready)
        self.outbox.ops.append(DataAdded(list(keys), list(sizes)))
        self._start(ready)

    def tick(self) -> None:
        """About every second: forgets what was announced and never used."""
        self.inputs.tick()

    # --- transitions ------------------------------------------------------------------------------------------------

    def _start(self, runs: list[Run]) -> None:
        """Hands runs over whose last input has arrived, unless another one was freed meanwhile."""
        started = []
        for run in runs:
            if run.state is RunState.WAITING and not self.inputs.gone_inputs(run):
                self._change(run, RunState.READY, "inputs arrived")
                started.append(run)
        if started:
            self.outbox.instructions.append(StartRuns(started))

    def _drop(self, run: Run, dropped: list[int]) -> None:
        if run.state not in _MAY_DROP:
            raise self._invalid(run, RunState.DROPPED, "dropped")
        run.state = RunState.DROPPED
        del self.runs[run.run_id]
        self._forget_stories([run.run_id])
        if run.records:
            self.inputs.release(run)
        dropped.append(run.run_id)

    def _change(self, run: Run, finish: RunState, stimulus: str) -> None:
        if finish not in RUN_TRANSITIONS[run.state]:
            raise self._invalid(run, finish, stimulus)
        if self._stories is not None:
            self._stories.setdefault(run.run_id, []).append(f"{run.state.value} -> {finish.value} ({stimulus})")
        run.state = finish

    def _invalid(self, run: Run, finish: RunState, stimulus: str) -> Exception:
        story = "" if self._stories is None else "; story: " + ", ".join(self._stories.get(run.run_id, []))
        return invalid_run_transition(run, finish, stimulus, story)

    def _forget_stories(self, run_ids: list[int]) -> None:
        if self._stories is not None:
            for run_id in run_ids:
                self._stories.pop(run_id, None)

    @property
    def executing(self) -> int:
        """Runs that are known to have started."""
        return sum(run.state in _STARTED for run in self.runs.values())
