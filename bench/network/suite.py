"""Runs the suite on one machine: every subject, round after round, into one document.

A baseline and what it stands beside are measured together, burst by burst in turn (`turns`); the others one after the other.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import msgspec
import psutil

from . import machine
from .data_links import can_compress
from .document import Report, Skipped
from .figures import GIB, KIB, MIB, RATES, Plan
from .processes import Child, MeasuringError
from .subjects import Measured, compared, find_subjects
from .turns import Place
from .wording import size_text
from .worker import Answer

_WORKER = f"{__package__}.worker"
_SIZES = (1, 64, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
_QUICK_SIZES = (KIB, 64 * KIB, MIB, 64 * MIB)
_DATA_SIZES = (64 * KIB, MIB, 16 * MIB, 64 * MIB)
"""Larger values come as fast as those of 64 MiB, and would take a third of the time of data links."""
COMPRESSIONS = ("off", "auto", "lz4")
_COPIES = 8
"""Of one message that both ends of what is measured together, and the kernel, may hold at the same time, with some to spare."""


@dataclass(frozen=True, slots=True)
class Suite:
    """What a run does; `quick` and `full` have the usual ones."""

    plan: Plan
    gil_plan: Plan
    rounds: int
    rate_rounds: int
    """Rounds that measure the rates as well."""
    gil_rounds: int
    data_rounds: int
    """Rounds that measure data links, too."""
    compressions: tuple[str, ...]
    encrypted_data: bool
    """Whether data links are measured encrypted as well."""
    too_large: tuple[int, ...] = ()
    """Sizes that were wanted and for which there is no memory."""

    @property
    def data_plan(self) -> Plan:
        """For data links: sizes of data, some of them: there are many combinations of settings."""
        large = tuple(size for size in self.plan.sizes if size in _DATA_SIZES) or (max(self.plan.sizes),)
        return replace(self.plan, sizes=large, latency_sizes=(1,), tail_s=0.0, rates=())


def quick(
    sizes: Collection[int] | None = None,
    peers: int | None = None,
    rounds: int | None = None,
    compressions: Collection[str] | None = None,
) -> Suite:
    """Some five minutes for all transports: enough to see what is what, not to see some per cent."""
    wanted = sizes or _QUICK_SIZES
    plan = Plan(sizes=_fitting(wanted), latency_sizes=(1, 64 * KIB), time_s=0.04, tail_s=0.4, peers=peers or 2)
    count = rounds or 3
    return Suite(
        plan,
        _with_gil(plan, 0.2, (64 * MIB,)),
        rounds=count,
        rate_rounds=min(count, 3),
        gil_rounds=1,  # most of such a round is the start of both processes, which has to wait for its turns as well
        data_rounds=1,
        compressions=_compressions(compressions),
        encrypted_data=False,
        too_large=_too_large(wanted, plan),
    )


def full(
    sizes: Collection[int] | None = None,
    peers: int | None = None,
    rounds: int | None = None,
    compressions: Collection[str] | None = None,
) -> Suite:
    """Some 25 minutes for all transports and settings."""
    latency_sizes = (1, KIB, 16 * KIB, 256 * KIB, 4 * MIB)
    wanted = sizes or _SIZES
    plan = Plan(
        sizes=_fitting(wanted),
        latency_sizes=latency_sizes,
        round_trips=5000,
        time_s=0.1,
        tail_s=1.5,
        peers=peers or 8,
    )
    count = rounds or 3
    return Suite(
        plan,
        _with_gil(plan, 0.25, (MIB, 64 * MIB)),
        rounds=count,
        rate_rounds=min(count, 2),
        gil_rounds=min(count, 3),
        data_rounds=min(count, 2),
        compressions=_compressions(compressions),
        encrypted_data=True,
        too_large=_too_large(wanted, plan),
    )


def _compressions(wanted: Collection[str] | None) -> tuple[str, ...]:
    if not can_compress():
        return ("off",)
    return tuple(wanted or COMPRESSIONS)


def _with_gil(plan: Plan, time_s: float, sizes: tuple[int, ...]) -> Plan:
    """A thread in the way makes everything take turns of 5 ms: fewer figures, more time for each."""
    held = tuple(size for size in plan.sizes if size in sizes) or (max(plan.sizes),)
    return replace(plan, sizes=held, latency_sizes=(1,), time_s=time_s, tail_s=0.0, rates=(), hold_gil=True)


def _fitting(sizes: Collection[int]) -> tuple[int, ...]:
    """Those for which there is memory."""
    available = psutil.virtual_memory().available
    fitting = tuple(sorted(size for size in set(sizes) if size * _COPIES <= available))
    if not fitting:
        raise MeasuringError(f"there is no memory to send {min(sizes)} bytes: {available} are available")
    return fitting


def _too_large(wanted: Collection[int], plan: Plan) -> tuple[int, ...]:
    return tuple(sorted(set(wanted) - set(plan.sizes)))


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the suite is about to do, for a progress bar."""

    text: str
    number: int
    of: int


def run(
    suite: Suite, schemes: Collection[str] | None, command: str, on_step: Callable[[Step], None] = lambda step: None
) -> Report:
    """Measures; an interruption (Ctrl-C) ends it early, with what there is until then. Leaves no process behind."""
    measured, skipped = find_subjects(schemes, suite.compressions, encrypted_data=suite.encrypted_data)
    skipped += [
        Skipped(f"messages of {size_text(size)}", f"there is no memory for {_COPIES} of them")
        for size in suite.too_large
    ]
    began = time.monotonic()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = Report(command=command, started=now, skipped=skipped, subjects=[each.subject for each in measured])
    report.plan = {"idle": asdict(suite.plan), "gil": asdict(suite.gil_plan), "rounds": suite.rounds}
    with ExitStack() as stack:
        try:
            on_step(Step("looking at the machine", 0, 1))
            report.machine = machine.facts()
            _run_rounds(suite, measured, report, stack, on_step)
        except KeyboardInterrupt:
            report.complete = False
    report.seconds = round(time.monotonic() - began, 1)
    report.subjects = [subject for subject in report.subjects if subject.idle or subject.gil]
    return report


def _run_rounds(
    suite: Suite, measured: list[Measured], report: Report, stack: ExitStack, on_step: Callable[[Step], None]
) -> None:
    runners = {each.subject.id: stack.enter_context(Runner(each)) for each in measured}
    shares = list(_shares(suite, measured))
    for number, share in enumerate(shares):
        together = [runner for each in share.measured if not (runner := runners[each.subject.id]).failed]
        if not together:
            continue
        names = " beside ".join(runner.measured.subject.name for runner in together)
        held = ", GIL held" if share.plan.hold_gil else ""
        on_step(Step(f"round {share.round_number + 1} of {suite.rounds}: {names}{held}", number, len(shares)))
        measure_together(together, share.plan)
        report.skipped += [Skipped(runner.measured.subject.id, runner.failed) for runner in together if runner.failed]
        report.rounds = share.round_number + 1
    on_step(Step("done", len(shares), len(shares)))


class _Share(NamedTuple):
    """What is measured together, in one round."""

    round_number: int
    measured: list[Measured]
    plan: Plan


def _shares(suite: Suite, measured: list[Measured]) -> Iterator[_Share]:
    """Every second round goes backwards, so that a machine that gets slower favours nobody."""
    groups = compared(measured)
    for number in range(suite.rounds):
        plan = replace(suite.plan, rates=tuple(RATES) if number < suite.rate_rounds else ())
        for group in groups if number % 2 == 0 else [group[::-1] for group in reversed(groups)]:
            if group[0].subject.kind == "data":
                if number < suite.data_rounds:
                    yield _Share(number, group, suite.data_plan)
                continue
            yield _Share(number, group, plan)
            if number < suite.gil_rounds:  # one by one: their threads would compute while they wait
                yield from (_Share(number, [each], suite.gil_plan) for each in group)


def measure_together(runners: Sequence[Runner], plan: Plan) -> None:
    """One round of all of them, in turns if there are several."""
    if len(runners) > 1:
        plan = replace(plan, in_turns=True)
    for runner in runners:
        runner.begin(plan)
    waiting = [runner for runner in runners if runner.place is not None]
    while waiting:
        runner = min(waiting, key=_place)  # the first of those that are least far
        waiting.remove(runner)
        runner.go_on()
        if runner.place is not None:
            waiting.append(runner)


def _place(runner: Runner) -> Place:
    assert runner.place is not None
    return runner.place


class Runner:
    """The process that measures one subject, through all rounds."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self._child: Child | None = None
        self._plan = Plan()
        self.place: Place | None = None
        """Where it waits for its turn; None: the round is over."""
        self.failed = ""
        """Why there are no more figures of this subject."""

    def begin(self, plan: Plan) -> None:
        """Starts a round, up to its first turn, if it waits for any, or to its end."""
        self._plan = plan
        if self._child is None:
            task = msgspec.json.encode(self.measured.task).decode()
            self._child = Child(_WORKER, own_group=True, first_line=task)
        self._tell(self._child, msgspec.json.encode(plan).decode())

    def go_on(self) -> None:
        """Up to its next turn, or to its end."""
        assert self._child is not None
        self._tell(self._child, "")

    def _tell(self, child: Child, line: str) -> None:
        self.place = None
        try:
            child.write_line(line)
            answer = msgspec.json.decode(child.read_line(_longest_s(self._plan)), type=Answer)
        except (MeasuringError, msgspec.DecodeError) as exc:
            self.failed = str(exc)
        else:
            self.failed = answer.error
            self.place = answer.waits_at
            if answer.figures is not None:
                subject = self.measured.subject
                (subject.gil if self._plan.hold_gil else subject.idle).add(answer.figures)
        if self.failed:
            child.kill()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._child is not None:
            self._child.kill()


def _longest_s(plan: Plan) -> float:
    """Ten times what a round should take; then it hangs."""
    figures = len(plan.sizes) + len(plan.latency_sizes) + len(plan.rates)
    return 120 + 10 * 8 * plan.time_s * figures
