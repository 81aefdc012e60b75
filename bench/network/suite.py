"""Runs the suite on one machine: every subject in turn, round after round, into one document."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import msgspec
import psutil

from . import machine
from .data_links import can_compress
from .document import Report, Series, Skipped
from .figures import GIB, KIB, MIB, RATES, Plan
from .processes import Child, MeasuringError
from .subjects import Measured, find_subjects
from .wording import size_text
from .worker import Answer

_WORKER = f"{__package__}.worker"
_SIZES = (1, 64, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
_QUICK_SIZES = (KIB, 64 * KIB, MIB, 64 * MIB)
_DATA_SIZES = (64 * KIB, MIB, 16 * MIB, 64 * MIB)
"""Larger values come as fast as those of 64 MiB, and would take a third of the time of data links."""
COMPRESSIONS = ("off", "auto", "lz4")
_COPIES = 5
"""Of one message that both ends and the kernel may hold at the same time, with some to spare."""


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
    """Two or three minutes: enough to see what is what, not to see some per cent."""
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
    """Some 20 minutes for all transports and settings."""
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
    runners = {each.subject.id: stack.enter_context(_Runner(each)) for each in measured}
    turns = list(_turns(suite, measured))
    for number, (round_number, each, plan) in enumerate(turns):
        runner = runners[each.subject.id]
        if runner.failed:
            continue
        held = ", GIL held" if plan.hold_gil else ""
        on_step(Step(f"round {round_number + 1} of {suite.rounds}: {each.subject.name}{held}", number, len(turns)))
        runner.measure(plan, each.subject.gil if plan.hold_gil else each.subject.idle)
        if runner.failed:
            report.skipped.append(Skipped(each.subject.id, runner.failed))
        report.rounds = round_number + 1
    on_step(Step("done", len(turns), len(turns)))


def _turns(suite: Suite, measured: list[Measured]) -> Iterator[tuple[int, Measured, Plan]]:
    """Every second round goes backwards, so that a machine that gets slower favours nobody."""
    for number in range(suite.rounds):
        plan = replace(suite.plan, rates=tuple(RATES) if number < suite.rate_rounds else ())
        for each in measured if number % 2 == 0 else reversed(measured):
            if each.subject.kind == "data":
                if number < suite.data_rounds:
                    yield number, each, suite.data_plan
                continue
            yield number, each, plan
            if number < suite.gil_rounds:
                yield number, each, suite.gil_plan


class _Runner:
    """The process that measures one subject, through all rounds."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._child: Child | None = None
        self.failed = ""
        """Why there are no more figures of this subject."""

    def measure(self, plan: Plan, series: Series) -> None:
        """One round into `series`."""
        if self._child is None:
            task = msgspec.json.encode(self._measured.task).decode()
            self._child = Child(_WORKER, own_group=True, first_line=task)
        try:
            self._child.write_line(msgspec.json.encode(plan).decode())
            line = self._child.read_line(_longest_s(plan))
            answer = msgspec.json.decode(line, type=Answer)
        except (MeasuringError, msgspec.DecodeError) as exc:
            self.failed = str(exc)
        else:
            self.failed = answer.error
            if answer.figures is not None:
                series.add(answer.figures)
        if self.failed:
            self._child.kill()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._child is not None:
            self._child.kill()


def _longest_s(plan: Plan) -> float:
    """Ten times what a round should take; then it hangs."""
    figures = len(plan.sizes) + len(plan.latency_sizes) + len(plan.rates)
    return 120 + 10 * 8 * plan.time_s * figures
