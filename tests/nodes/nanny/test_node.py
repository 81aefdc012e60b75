"""A nanny and its worker processes: real processes, signals, memory; the peer speaks the scheduler's side."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.scheduler_stub import CONFIG, DEADLINE_S, Link, SchedulerStub, scheduler
from zmqtasks.errors import ConnectError, NodeStartError
from zmqtasks.nodes.nanny.node import NannyNode
from zmqtasks.protocol.failures import load_exception
from zmqtasks.protocol.ops import (
    CallFinished,
    CallFunction,
    CheckWorker,
    LogMessages,
    LogRecord,
    RestartWorkers,
    RunsExecuting,
    StopNanny,
    StopWorker,
    TaskErred,
    TasksFinished,
    WorkerChecked,
    WorkerExited,
    WorkerStarted,
)
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports import non_temporal


def on_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@asynccontextmanager
async def nursery(n_workers: int = 1, **options: Any) -> AsyncIterator[tuple[SchedulerStub, Link, NannyNode]]:
    """A scheduler's stub with a nanny whose workers are up."""
    async with scheduler() as (stub, address):
        nanny = NannyNode(address, security=stub.security, config=CONFIG, n_workers=n_workers, **options)
        try:
            await nanny.start()
            await stub.wait_workers(n_workers)
            yield stub, stub.nannies[0], nanny
        finally:
            await nanny.close("the test is over")
            assert not nanny.workers


def state_of(pid: int) -> str:
    """As in /proc: T is stopped, Z a zombie; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def gone(pid: int) -> bool:
    return state_of(pid) in ("", "Z")


async def wait_state(states: str, *pids: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not all(state_of(pid) in states for pid in pids):
            await asyncio.sleep(0.01)


@on_loop
async def test_workers_run_tasks_in_processes_of_their_own() -> None:
    async with nursery(2, name="box", nthreads=3) as (stub, link, nanny):
        started = [await link.take(WorkerStarted) for _ in range(2)]
        assert {op.pid for op in started} == {worker.introduction.pid for worker in stub.workers}
        assert {op.instance for op in started} == {worker.instance for worker in stub.workers}
        assert sorted(worker.introduction.name for worker in stub.workers) == ["box-0", "box-1"]
        assert {worker.introduction.nanny for worker in stub.workers} == {nanny.instance_id}

        def look() -> Any:
            print("to stdout")
            sys.stderr.write("to stderr")
            return os.getpid(), os.environ["OMP_NUM_THREADS"], sys.stdin.read(), os.environ.get("GLIBC_TUNABLES")

        worker = stub.workers[0]
        worker.compute(look, [1])
        result = deserialize_inline((await worker.take(TasksFinished)).values)
        tunables: dict[str, str] = dict(os.environ)
        non_temporal.set_for_child(tunables)
        assert result == (worker.introduction.pid, "3", "", tunables.get("GLIBC_TUNABLES"))
        lines: list[LogRecord] = []
        while len(lines) < 2:  # the thread tells its results itself, and has its lines told by the loop
            lines += (await worker.take(LogMessages)).records
        assert [(record.level, record.text) for record in lines] == [(0, "to stdout"), (1, "to stderr")]


@on_loop
async def test_a_killed_worker_is_reported_with_what_it_executed_and_started_again() -> None:
    async with nursery() as (stub, link, _):
        await link.take(WorkerStarted)
        worker = stub.workers[0]
        worker.compute(lambda: time.sleep(60), [11, 12])
        assert (await worker.take(RunsExecuting)).run_ids == [11]
        began = time.monotonic()
        os.kill(worker.introduction.pid, signal.SIGKILL)
        exited = await link.take(WorkerExited)
        assert time.monotonic() - began < 1
        assert exited == WorkerExited(worker.instance, -9, "killed by SIGKILL", [11], expected=False, restarting=True)
        started = await link.take(WorkerStarted)
        await stub.wait_workers(2)
        assert stub.workers[1].instance == started.instance != worker.instance
        link.send(CheckWorker(worker.instance))
        assert (await link.take(WorkerExited)).cause == "killed by SIGKILL"


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: ctypes.string_at(0), "killed by SIGSEGV"),
    ],
)
def test_the_cause_of_a_death_is_named(end: Callable[[], None], cause: str) -> None:
    async def test() -> None:
        async with nursery() as (stub, link, _):
            stub.workers[0].compute(end, [1])
            exited = await link.take(WorkerExited)
            assert (exited.cause, exited.executing) == (cause, [1])

    asyncio.run(test())


@on_loop
async def test_a_worker_over_its_memory_limit_is_ended_with_figures() -> None:
    def grow() -> None:
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 10)) * 4096)
            time.sleep(0.002)

    async with nursery(memory_limit_bytes=300 << 20) as (stub, link, _):
        stub.workers[0].compute(grow, [1])
        exited = await link.take(WorkerExited)
        assert exited.cause.startswith("over its memory limit (")
        assert exited.cause.endswith(" MiB of 300.0 MiB)")
        assert (exited.exit_code, exited.executing, exited.restarting) == (-9, [1], True)


@on_loop
async def test_a_frozen_worker_and_one_that_holds_the_interpreter_are_told_apart_from_dead_ones() -> None:
    async with nursery() as (stub, link, _):
        worker = stub.workers[0]
        link.send(CheckWorker(worker.instance))
        assert await link.take(WorkerChecked) == WorkerChecked(worker.instance, False)
        os.kill(worker.introduction.pid, signal.SIGSTOP)
        try:
            await wait_state("T", worker.introduction.pid)
            link.send(CheckWorker(worker.instance))
            assert await link.take(WorkerChecked) == WorkerChecked(worker.instance, True)
        finally:
            os.kill(worker.introduction.pid, signal.SIGCONT)
        worker.compute(lambda: 1, [1])
        await worker.take(TasksFinished)
        link.send(CheckWorker(b"x" * 16))
        assert (await link.take(WorkerExited)).cause == "not a worker of this nanny"


@on_loop
async def test_restart_on_request_even_of_a_frozen_worker() -> None:
    async with nursery(2) as (stub, link, _):
        old = [worker.introduction.pid for worker in stub.workers]
        os.kill(old[0], signal.SIGSTOP)
        link.send(RestartWorkers())
        exits = [await link.take(WorkerExited) for _ in range(2)]
        assert all(exited.expected and exited.restarting for exited in exits)
        await stub.wait_workers(4)
        assert all(gone(pid) for pid in old)


@on_loop
async def test_it_ends_when_told_and_leaves_no_process_not_even_a_busy_one() -> None:
    async with nursery(2) as (stub, link, nanny):
        pids = [worker.introduction.pid for worker in stub.workers]
        stub.workers[0].compute(lambda: time.sleep(60), [1])
        await stub.workers[0].take(RunsExecuting)
        link.send(StopNanny("enough"))
        async with asyncio.timeout(DEADLINE_S):
            assert await nanny.finished() is None
        began = time.monotonic()
        await nanny.close("told to")
        assert time.monotonic() - began < CONFIG.termination_s
        assert all(gone(pid) for pid in pids)
        exits = [await link.take(WorkerExited) for _ in range(2)]
        assert all(exited.expected and not exited.restarting and exited.exit_code == 0 for exited in exits)


@on_loop
async def test_functions_on_the_nanny() -> None:
    async with nursery() as (_, link, nanny):
        link.send(CallFunction(1, serialize_inline((lambda dask_nanny: dask_nanny.n_workers, (), {}))))
        answer = await link.take(CallFinished)
        assert deserialize_inline(answer.result) == nanny.n_workers


@on_loop
async def test_an_exception_type_of_the_worker_process_comes_back() -> None:
    async with nursery() as (stub, _, _nanny):
        stub.workers[0].compute(lambda: sys.exit(5), [1])
        erred = await stub.workers[0].take(TaskErred)
        assert isinstance(load_exception(erred.error.payload)[0], SystemExit)


@on_loop
async def test_without_a_scheduler_the_start_fails_and_names_the_address() -> None:
    security = Security(ClusterKey.generate())
    nanny = NannyNode("tcp://127.0.0.1:1", security=security, config=CONFIG)
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:1"):
        await nanny.start()
    await nanny.close()


@on_loop
async def test_a_worker_that_cannot_start_is_an_error_with_what_it_printed() -> None:
    async with scheduler() as (stub, address):
        nanny = NannyNode(address, security=stub.security, config=CONFIG, local_directory="x")
        nanny._settings["nthreads"] = 1
        nanny._settings["config"] = {"nonsense": 1}
        with pytest.raises(NodeStartError, match="nonsense"):
            await nanny.start()
        await nanny.close()


@on_loop
async def test_workers_start_before_the_scheduler_is_known() -> None:
    async with scheduler() as (stub, address):
        known: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        nanny = NannyNode(known, security=stub.security, config=CONFIG)
        starting = asyncio.ensure_future(nanny.start())
        async with asyncio.timeout(DEADLINE_S):
            while not nanny.workers:
                await asyncio.sleep(0.001)
        known.set_result(address)
        await starting
        await stub.wait_workers(1)
        await nanny.close()


NANNY = """
import asyncio, sys
from dataclasses import replace
from zmqtasks.config import Config
from zmqtasks.nodes.nanny.node import NannyNode
from zmqtasks.security import ClusterKey, Security

async def main():
    key = ClusterKey.from_hex(sys.stdin.readline())
    nanny = NannyNode(sys.argv[1], security=Security(key), config=Config(), n_workers=2)
    await nanny.start()
    await nanny.finished()

asyncio.run(main())
"""


@on_loop
async def test_workers_die_with_their_nanny_even_in_a_task_that_holds_the_interpreter() -> None:
    def hold_interpreter() -> None:
        import re

        re.match("(a*)*b", "a" * 60)

    async with scheduler() as (stub, address):
        assert stub.security.key is not None
        process = subprocess.Popen([sys.executable, "-c", NANNY, address], stdin=subprocess.PIPE)
        with process:
            try:
                assert process.stdin is not None
                process.stdin.write(stub.security.key.hex().encode() + b"\n")
                process.stdin.close()
                workers = await stub.wait_workers(2)
                workers[0].compute(hold_interpreter, [1])
                nanny = stub.nannies[0]
                started = [await nanny.take(WorkerStarted) for _ in range(2)]
                async with asyncio.timeout(DEADLINE_S):
                    # The loop of the worker stands still: it has no word to say, and is busy.
                    while _cpu_ticks(workers[0].introduction.pid) < 30 + _cpu_ticks(workers[1].introduction.pid):
                        await asyncio.sleep(0.02)
            finally:
                process.kill()
        await wait_state("Z", *(op.pid for op in started))


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@on_loop
async def test_a_worker_that_the_scheduler_tells_to_end_is_not_started_again() -> None:
    async with nursery(2) as (stub, link, nanny):
        stub.workers[0].send(StopWorker("retired"))
        assert await link.take(WorkerExited) == WorkerExited(
            stub.workers[0].instance, 0, "exited with code 0", [], expected=True, restarting=False
        )
        assert len(nanny.workers) == 1
        stub.workers[1].send(StopWorker("retired"))
        async with asyncio.timeout(DEADLINE_S):
            assert await nanny.finished() is None
