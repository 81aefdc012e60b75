"""Task threads run real functions: results, errors, order, retraction, waiting inside of tasks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.executor import Executor, marks_needed
from zmqtasks.nodes.worker.instructions import Finished
from zmqtasks.nodes.worker.outcomes import Blocked, Erred, NotStarted, Outcome, Resumed, Seceded
from zmqtasks.nodes.worker.slots import MAX_PARKED
from zmqtasks.nodes.worker.state import Run, RunState, TaskGroup
from zmqtasks.nodes.worker.store import Entry
from zmqtasks.protocol.failures import load_exception
from zmqtasks.protocol.serialize import (
    KeyRef,
    deserialize_inline,
    dumps_function,
    note_reference,
    serialize_inline,
)

DEADLINE_S = 20.0


class Bench:
    """An executor on a loop, and what it has reported."""

    def __init__(self, nthreads: int, **options: Any) -> None:
        self.outcomes: list[Outcome] = []
        self._arrived = asyncio.Event()
        self.executor = Executor(nthreads, self._take, **options)
        self.executor.start()
        self._last = 0

    def _take(self, batch: list[Outcome]) -> None:
        self.outcomes.extend(batch)
        self._arrived.set()

    def run(self, function: Any, *inputs: Any, args: bytes = b"", priority: int = 0, name: str = "f") -> Run:
        """A run of a function, with values as inputs."""
        data = dumps_function(function)
        digest = hashlib.sha256(data).digest()
        self.executor.learn_functions([digest], [data])
        self._last += 1
        run = Run(self._last, f"key-{self._last}", priority, TaskGroup(digest, name, {}), RunState.READY, args)
        run.inputs = [Entry(value, 8) for value in inputs]
        return run

    def submit(self, function: Any, *inputs: Any, **options: Any) -> Run:
        run = self.run(function, *inputs, **options)
        self.executor.hand_over([run])
        return run

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Waits for something that outcomes bring about."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._arrived.clear()
                await self._arrived.wait()

    async def outcome(self, run: Run) -> Any:
        """How a run has ended."""

        def found() -> list[Outcome]:
            return [o for o in self.outcomes if o.run is run and isinstance(o, Finished | Erred | NotStarted)]

        await self.wait(lambda: bool(found()))
        (end,) = found()
        return end


@contextlib.contextmanager
def running(nthreads: int = 1, **options: Any) -> Iterator[Bench]:
    bench = Bench(nthreads, **options)
    try:
        yield bench
    finally:
        threads = list(bench.executor.slots.threads.values())
        bench.executor.close()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def on_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def until(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


@on_loop
async def test_results_come_back_in_the_form_that_their_size_asks_for() -> None:
    with running() as bench:
        small = await bench.outcome(bench.submit(lambda: ("a", 1)))
        large = await bench.outcome(bench.submit(lambda: bytes(10_000)))
        nothing = await bench.outcome(bench.submit(lambda: None))
        live = await bench.outcome(bench.submit(threading.Lock))
    assert deserialize_inline(small.data) == ("a", 1)
    assert small.size == len(small.data)
    assert (large.data, len(large.value)) == (None, 10_000)
    assert large.size >= 10_000
    assert deserialize_inline(nothing.data) is None
    assert live.data is None
    assert isinstance(live.value, type(threading.Lock()))


@on_loop
async def test_arguments_are_inputs_or_a_payload_that_refers_to_them() -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    with running() as bench:
        plain = await bench.outcome(bench.submit(call, 1, 2))
        args = serialize_inline((([KeyRef(1), 5], KeyRef(0)), {"x": {"y": KeyRef(1)}}))
        mixed = await bench.outcome(bench.submit(call, "a", "b", args=args))
    assert plain.value == ((1, 2), {})
    assert mixed.value == ((["b", 5], "a"), {"x": {"y": "b"}})


@on_loop
async def test_exceptions_come_back_as_themselves_with_the_frames_of_the_task() -> None:
    def inner() -> None:
        raise ValueError("bad input")

    def outer() -> None:
        inner()

    with running() as bench:
        erred = await bench.outcome(bench.submit(outer, name="outer"))
    assert erred.error.kind == "exception"
    assert (erred.error.text, erred.error.name) == ("ValueError: bad input", "outer")
    exc, trace = load_exception(erred.error.payload)
    assert isinstance(exc, ValueError)
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names == ["outer", "inner"]
    assert "taskthread.py" not in erred.error.traceback_text


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("is_async", [False, True])
def test_exceptions_that_end_programs_end_only_the_task(kind: type[BaseException], is_async: bool) -> None:
    def plain() -> None:
        raise kind("stop")

    async def coroutine() -> None:
        raise kind("stop")

    async def test() -> None:
        with running() as bench:
            erred = await bench.outcome(bench.submit(coroutine if is_async else plain))
            after = await bench.outcome(bench.submit(lambda: 1))
        assert type(load_exception(erred.error.payload)[0]) is kind
        assert after.value == 1

    asyncio.run(test())


@on_loop
async def test_an_exception_that_cannot_be_pickled_has_a_stand_in_that_names_it() -> None:
    def fail() -> None:
        class Odd(Exception):
            def __init__(self, a: int, b: int) -> None:
                super().__init__(f"{a} and {b}")

        raise Odd(1, 2)

    with running() as bench:
        erred = await bench.outcome(bench.submit(fail))
    assert erred.error.text.endswith("Odd: 1 and 2")
    exc, trace = load_exception(erred.error.payload)
    assert isinstance(exc, RuntimeError)
    assert "Odd: 1 and 2" in str(exc)
    assert "cannot be pickled" in str(exc)
    assert trace is not None


@on_loop
async def test_a_function_that_was_never_sent_is_an_error_that_names_it() -> None:
    with running() as bench:
        run = bench.run(lambda: 1)
        stranger = Run(99, "k", 0, TaskGroup(b"\x12\x34", "lost", {}), RunState.READY)
        bench.executor.hand_over([stranger, run])
        erred = await bench.outcome(stranger)
        assert (await bench.outcome(run)).value == 1
    assert "lost" in erred.error.text
    assert "1234" in erred.error.text


@on_loop
async def test_runs_start_in_order_of_priority_and_arrival() -> None:
    gate = threading.Event()
    order: list[int] = []
    context.test_gate = gate  # type: ignore[attr-defined]
    context.test_order = order  # type: ignore[attr-defined]

    def hold() -> None:
        context.test_gate.wait(20)  # type: ignore[attr-defined]

    def note(number: int) -> None:
        context.test_order.append(number)  # type: ignore[attr-defined]

    with running() as bench:
        bench.submit(hold, priority=100)
        await bench.wait_executing(1)
        runs = [bench.run(note, number, priority=priority) for number, priority in enumerate([5, 5, 7, 3, 5, 9, 3])]
        bench.executor.hand_over(runs[:3])
        bench.executor.hand_over(runs[3:])
        gate.set()
        for run in runs:
            await bench.outcome(run)
    assert order == [3, 6, 0, 1, 4, 2, 5]


async def _wait_executing(self: Bench, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while len(self.executor.executing()) != count:
            await asyncio.sleep(0.001)


Bench.wait_executing = _wait_executing  # type: ignore[attr-defined]


@on_loop
async def test_only_runs_that_no_thread_has_taken_come_back() -> None:
    gate = threading.Event()
    context.test_gate = gate  # type: ignore[attr-defined]

    def hold() -> str:
        context.test_gate.wait(20)  # type: ignore[attr-defined]
        return "held"

    with running() as bench:
        first = bench.submit(hold)
        await bench.wait_executing(1)
        others = [bench.submit(lambda: 1) for _ in range(3)]
        assert bench.executor.take_back([first, others[0], others[2]]) == [others[0], others[2]]
        assert bench.executor.take_back([others[0]]) == []
        gate.set()
        assert (await bench.outcome(first)).value == "held"
        assert (await bench.outcome(others[1])).value == 1
    assert len(bench.outcomes) == 2


@on_loop
async def test_a_cancelled_run_that_a_thread_takes_is_not_started() -> None:
    with running() as bench:
        run = bench.run(lambda: 1)
        run.cancelled = True
        bench.executor.hand_over([run])
        assert isinstance(await bench.outcome(run), NotStarted)


@on_loop
async def test_marks_name_the_runs_that_execute() -> None:
    gate = threading.Event()
    context.test_gate = gate  # type: ignore[attr-defined]

    def hold() -> None:
        context.test_gate.wait(20)  # type: ignore[attr-defined]

    marks = memoryview(bytearray(8 * marks_needed(2))).cast("q")
    with running(2, marks=marks) as bench:
        runs = [bench.submit(hold) for _ in range(3)]
        await bench.wait_executing(2)
        assert sorted(mark for mark in marks if mark) == [1, 2]
        gate.set()
        for run in runs:
            await bench.outcome(run)
        assert not any(marks)


@on_loop
async def test_async_tasks_see_their_task_and_can_be_cancelled() -> None:
    async def key() -> Any:
        await asyncio.sleep(0)
        return context.current_key()

    async def forever() -> None:
        await asyncio.Event().wait()

    with running() as bench:
        run = bench.submit(key)
        assert (await bench.outcome(run)).value == run.key
        run = bench.submit(forever)
        await bench.wait_executing(1)
        run.cancelled = True
        bench.executor.interrupt([run])
        erred = await bench.outcome(run)
        assert "CancelledError" in erred.error.text


@on_loop
async def test_a_task_that_waits_gives_its_slot_to_others_and_resumes_before_them() -> None:
    gates = {name: threading.Event() for name in "abc"}
    log: list[str] = []
    context.test_gates, context.test_log = gates, log  # type: ignore[attr-defined]

    def waiter() -> str:
        with context.waiting(), context.waiting():
            context.test_gates["a"].wait(20)  # type: ignore[attr-defined]
        context.test_log.append("resumed")  # type: ignore[attr-defined]
        return "done"

    def inner(name: str) -> None:
        context.test_gates[name].wait(20)  # type: ignore[attr-defined]
        context.test_log.append(name)  # type: ignore[attr-defined]

    with running() as bench:
        first = bench.submit(waiter)
        await bench.wait(lambda: any(isinstance(o, Blocked) for o in bench.outcomes))
        second, third = bench.submit(inner, "b"), bench.submit(inner, "c")
        await bench.wait_executing(2)
        gates["a"].set()
        slots = bench.executor.slots
        async with asyncio.timeout(DEADLINE_S):
            while not slots.needs_yield:
                await asyncio.sleep(0.001)
        gates["c"].set()
        gates["b"].set()
        for run in (first, second, third):
            await bench.outcome(run)
    assert log == ["b", "resumed", "c"]
    kinds = [type(o) for o in bench.outcomes if o.run is first]
    assert kinds == [Blocked, Resumed, Finished]


@on_loop
async def test_nested_waiting_as_deep_as_threads_allow_then_an_error() -> None:
    executor: Executor
    started: list[int] = []
    stop = threading.Event()

    def nest() -> str:
        # Each task blocks until the last one has failed for want of threads.
        started.append(1)
        try:
            with context.waiting():
                context.test_more()  # type: ignore[attr-defined]
                until(stop)
        except RuntimeError as exc:
            stop.set()
            return str(exc)
        return "waited"

    digest = b"nest"
    with running() as bench:
        executor = bench.executor
        executor.functions[digest] = nest
        loop = asyncio.get_running_loop()
        runs: list[Run] = []

        def more() -> None:
            def submit() -> None:
                run = Run(1000 + len(runs), "k", 0, TaskGroup(digest, "nest", {}), RunState.READY)
                runs.append(run)
                executor.hand_over([run])

            loop.call_soon_threadsafe(submit)

        context.test_more = more  # type: ignore[attr-defined]
        more()
        await bench.wait(stop.is_set)
        async with asyncio.timeout(DEADLINE_S):
            while len([o for o in bench.outcomes if isinstance(o, Finished)]) < len(runs):
                await asyncio.sleep(0.005)
        answers = [o.value for o in bench.outcomes if isinstance(o, Finished)]
        assert len(started) == marks_needed(1)
        assert answers.count("waited") == len(started) - 1
        assert sum("pass futures as arguments" in answer for answer in answers) == 1
        assert (await bench.outcome(bench.submit(lambda: 5))).value == 5
        assert executor.slots.free == 0
        assert sum(thread.has_slot for thread in executor.slots.threads.values()) == 1


@on_loop
async def test_a_task_that_secedes_frees_its_slot_and_may_rejoin() -> None:
    gate = threading.Event()
    context.test_gate = gate  # type: ignore[attr-defined]

    def leave(come_back: bool) -> str:
        context.secede()
        context.secede()
        context.test_gate.wait(20)  # type: ignore[attr-defined]
        if come_back:
            context.rejoin()
        return "left"

    with running() as bench:
        runs = [bench.submit(leave, False), bench.submit(leave, True)]
        assert (await bench.outcome(bench.submit(lambda: 1))).value == 1
        gate.set()
        for run in runs:
            assert (await bench.outcome(run)).value == "left"
        kinds = [[type(o) for o in bench.outcomes if o.run is run] for run in runs]
        assert kinds == [[Seceded, Finished], [Seceded, Resumed, Finished]]
        assert (await bench.outcome(bench.submit(lambda: 2))).value == 2


@on_loop
async def test_futures_inside_a_result_are_listed() -> None:
    class Live:
        key = "other"

        def __reduce__(self) -> Any:
            note_reference(self)
            return (str, ("stand-in",))

    with running() as bench:
        bench.executor.functions[b"d"] = lambda: [Live()]
        run = Run(1, "k", 0, TaskGroup(b"d", "f", {}), RunState.READY)
        bench.executor.hand_over([run])
        assert (await bench.outcome(run)).references == ["other"]


def test_outside_of_tasks_there_is_no_worker_and_waiting_does_nothing() -> None:
    with context.waiting():
        pass
    assert context.current_key() is None
    assert not context.is_cancelled()
    with pytest.raises(ValueError, match="inside of tasks only"):
        context.get_worker()
    with pytest.raises(ValueError, match=r"secede\(\)"):
        context.secede()


@on_loop
async def test_an_idle_executor_uses_no_processor_time() -> None:
    with running(4) as bench:
        await bench.outcome(bench.submit(lambda: 1))
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.05


@on_loop
async def test_many_runs_on_many_threads_are_all_answered_once() -> None:
    with running(4) as bench:
        runs = [bench.run(lambda x: x + 1, number) for number in range(5_000)]
        for start in range(0, len(runs), 500):
            bench.executor.hand_over(runs[start : start + 500])
        await bench.wait(lambda: len(bench.outcomes) >= len(runs))
    assert sorted(o.run.run_id for o in bench.outcomes) == [run.run_id for run in runs]
    assert all(isinstance(o, Finished) and o.value == o.run.run_id for o in bench.outcomes)


@on_loop
async def test_slots_bound_what_runs_at_once_whatever_blocks_and_resumes() -> None:
    lock = threading.Lock()
    busy = [0, 0]  # now, at most

    def enter() -> None:
        with lock:
            busy[0] += 1
            busy[1] = max(busy)

    def leave() -> None:
        with lock:
            busy[0] -= 1

    def work(number: int) -> int:
        rng = random.Random(number)
        enter()
        for _ in range(rng.randint(0, 3)):
            leave()
            with context.waiting():
                time.sleep(rng.random() * 0.002)
            enter()
        leave()
        return number

    with running(3) as bench:
        bench.executor.functions[b"work"] = work
        runs = [
            Run(number, "k", 0, TaskGroup(b"work", "work", {}), RunState.READY, serialize_inline(((number,), {})))
            for number in range(600)
        ]
        for start in range(0, len(runs), 50):
            bench.executor.hand_over(runs[start : start + 50])
            await asyncio.sleep(0)
        await bench.wait(lambda: sum(isinstance(o, Finished) for o in bench.outcomes) == len(runs))
        slots = bench.executor.slots
        async with asyncio.timeout(DEADLINE_S):
            while (
                slots.free + sum(thread.has_slot for thread in list(slots.threads.values())) != 3
                or len(slots.threads) > 3 + MAX_PARKED
            ):
                await asyncio.sleep(0.001)
    assert busy[1] <= 3
