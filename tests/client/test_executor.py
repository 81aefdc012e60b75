"""`client.get_executor()` as programs know the executors of `concurrent.futures`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION
from pathlib import Path
from typing import Any

import client_tasks as tasks
import executor_tasks as own
import pytest

from zmqtasks import Client, KilledWorker, LocalCluster
from zmqtasks.executor import ClientExecutor, _exit

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture
def pool(client: Client) -> Iterator[ClientExecutor]:
    with client.get_executor() as pool:
        yield pool


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Tasks wait until it is there; it opens at the end of each test."""
    path = tmp_path / "gate"
    yield path
    path.touch()


# submit


def test_calls_and_their_arguments(pool: ClientExecutor) -> None:
    assert pool.submit(pow, 2, 10).result() == 1024
    assert pool.submit(tasks.keywords, 1, self=2, fn=3, client=4).result() == ((1,), {"self": 2, "fn": 3, "client": 4})
    with pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pool.submit(arg=1)  # type: ignore[call-arg]


def test_results_and_errors_with_time_limits(pool: ClientExecutor, gate: Path) -> None:
    future = pool.submit(tasks.wait_for, str(gate), "value")
    for ask in (future.result, future.exception):
        with pytest.raises(concurrent.futures.TimeoutError):
            ask(timeout=0.01)
    assert not future.done()
    gate.touch()
    assert future.result(timeout=10) == "value"
    assert future.exception(timeout=0) is None
    assert future.done()
    assert not future.running()
    assert not future.cancelled()


def test_errors_come_with_the_frames_of_the_worker(pool: ClientExecutor) -> None:
    error = pool.submit(tasks.fail, "bad").exception()
    assert isinstance(error, ValueError)
    assert error.args == ("bad",)
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert frames[-2:] == ["fail", "_inner"]


def test_an_error_that_is_false_is_an_error(pool: ClientExecutor) -> None:
    with pytest.raises(own.FalseError):
        pool.submit(own.raise_false).result()
    assert isinstance(pool.submit(own.raise_false).exception(), own.FalseError)
    with pytest.raises(own.FalseError):
        list(pool.map(lambda _: own.raise_false(), [1]))


def test_what_cannot_be_pickled_is_an_error_of_its_future(pool: ClientExecutor) -> None:
    given = pool.submit(id, own.Unpicklable())
    with pytest.raises(TypeError, match="never pickled"):
        given.result()
    assert not given.cancel()
    with pytest.raises(Exception, match="never pickled"):
        pool.submit(own.make_unpicklable).result()
    with pytest.raises(Exception, match="never opened"):
        pool.submit(id, own.Unopenable()).result()
    with pytest.raises(Exception, match="never opened"):
        pool.submit(own.make_unopenable).result()
    assert pool.submit(tasks.inc, 1).result() == 2


def test_a_call_goes_on_when_nobody_holds_its_future(
    pool: ClientExecutor, tmp_path: Path, eventually: Eventually
) -> None:
    gate, first, others = tmp_path / "open", tmp_path / "first", [str(tmp_path / f"{i}") for i in range(9)]
    pool.submit(tasks.wait_for, str(gate)).add_done_callback(lambda _: first.touch())
    pool.map(tasks.touch, others)
    gc.collect()
    gate.touch()
    pool.shutdown()
    eventually(first.exists)  # callbacks have a thread of their own
    assert all(Path(path).exists() for path in others)


def test_futures_keep_nothing_of_a_call_that_has_ended(pool: ClientExecutor, eventually: Eventually) -> None:
    """Neither its function and arguments, nor its result on the cluster, nor themselves by a cycle."""
    thing = own.Thing()
    gone = weakref.ref(thing)
    future = pool.submit(thing.method)
    failed = pool.submit(tasks.fail)
    assert future.result() is None
    assert failed.exception() is not None
    del thing
    assert gone() is None
    eventually(lambda: not pool._given)
    assert not pool._mapped
    assert not _exit.unfinished
    eventually(lambda: not any(pool._client.has_what().values()))
    gc.collect()
    gc.disable()
    try:
        ends = [weakref.ref(future), weakref.ref(failed)]
        del future, failed
        eventually(lambda: [end() for end in ends] == [None, None])
    finally:
        gc.enable()


# map


def test_map_keeps_the_order(pool: ClientExecutor) -> None:
    assert list(pool.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(pool.map(pow, range(10), range(10), chunksize=3)) == list(map(pow, range(10), range(10)))
    assert list(pool.map(pow, range(3), itertools.repeat(2))) == [0, 1, 4]
    assert list(pool.map(pow, [], [])) == []
    for size in (0, -1):
        with pytest.raises(ValueError, match="chunksize"):
            pool.map(pow, [1], [1], chunksize=size)


def test_map_raises_where_the_call_has_failed(pool: ClientExecutor) -> None:
    results = pool.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert next(results) == (0, 1)
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_the_time_of_map_begins_with_the_call(pool: ClientExecutor, gate: Path) -> None:
    gate.with_name("there").touch()
    results = pool.map(tasks.wait_for, [str(gate.with_name("there")), str(gate)], [1, 2], timeout=1)
    assert next(results) == 1
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)


def test_map_submits_before_it_is_iterated_over(pool: ClientExecutor, tmp_path: Path, eventually: Eventually) -> None:
    paths = [tmp_path / f"{i}" for i in range(3)]
    results = pool.map(tasks.touch, map(str, paths))
    eventually(lambda: all(path.exists() for path in paths))
    assert list(results) == list(map(str, paths))


def test_an_iteration_that_is_given_up_cancels_the_rest(client: Client, gate: Path, tmp_path: Path) -> None:
    there = gate.with_name("there")
    there.touch()
    markers = [tmp_path / f"{i}" for i in range(21)]
    with client.get_executor() as pool:
        results = pool.map(own.wait_then_touch, [str(there)] + [str(gate)] * 20, map(str, markers))
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        assert not pool._mapped
        client.run(int)  # it follows the cancellations to the workers, on the same links
        gate.touch()
    assert client.submit(tasks.inc, 1).result(10) == 2
    assert sum(marker.exists() for marker in markers) <= 5  # the first one, and those that were running


def test_map_with_a_buffer_takes_items_as_results_are_taken(pool: ClientExecutor) -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in itertools.count():
            taken.append(i)
            yield i

    results = pool.map(tasks.inc, items(), buffersize=4)
    assert taken == [0, 1, 2, 3]
    assert [next(results), next(results)] == [1, 2]
    assert len(taken) == 6
    results.close()  # type: ignore[attr-defined]
    assert list(pool.map(tasks.inc, range(10), buffersize=3)) == list(range(1, 11))
    assert list(pool.map(tasks.inc, [], buffersize=3)) == []
    with pytest.raises(TypeError, match="buffersize"):
        pool.map(tasks.inc, [], buffersize="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffersize"):
        pool.map(tasks.inc, [], buffersize=0)


def test_results_of_map_are_not_kept(pool: ClientExecutor) -> None:
    for thing in pool.map(own.make_thing, range(10)):
        gone = weakref.ref(thing)
        del thing
        assert gone() is None


# shutdown


def test_nothing_is_taken_after_shutdown(client: Client) -> None:
    with client.get_executor() as pool:
        assert pool.submit(tasks.inc, 1).result() == 2
    for call in (lambda: pool.submit(tasks.inc, 1), lambda: pool.map(tasks.inc, [1])):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()
    pool.shutdown()
    pool.shutdown(cancel_futures=True)


def test_shutdown_waits_for_all_or_not_at_all(client: Client, gate: Path) -> None:
    pool = client.get_executor()
    futures = [pool.submit(tasks.wait_for, str(gate), i) for i in range(10)]
    results = pool.map(tasks.wait_for, [str(gate)] * 5, range(5))
    pool.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    waiter = threading.Thread(target=pool.shutdown)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    gate.touch()
    waiter.join(20)
    assert not waiter.is_alive()
    assert [future.result(timeout=0) for future in futures] == list(range(10))
    assert list(results) == list(range(5))


def test_shutdown_cancels_what_has_not_begun(client: Client, gate: Path, eventually: Eventually) -> None:
    pool = client.get_executor()
    futures = [pool.submit(tasks.wait_for, str(gate), i) for i in range(50)]
    eventually(lambda: any(client.processing().values()))
    pool.shutdown(wait=False, cancel_futures=True)
    cancelled = [future for future in futures if future.cancelled()]
    begun = [future for future in futures if not future.cancelled()]
    assert len(cancelled) > 20
    assert begun
    assert not any(future.done() for future in begun)
    gate.touch()
    pool.shutdown()
    assert all(future.exception() is None for future in begun)


def test_a_submit_during_shutdown_is_waited_for_or_refused(client: Client) -> None:
    for _ in range(20):
        pool = client.get_executor()
        given: list[concurrent.futures.Future[int]] = []
        refused = threading.Event()

        def submit(pool: ClientExecutor = pool, given: list[Any] = given, refused: threading.Event = refused) -> None:
            try:
                while True:
                    given.append(pool.submit(tasks.inc, 1))
            except RuntimeError:
                refused.set()

        thread = threading.Thread(target=submit)
        thread.start()
        while not given:
            pass
        pool.shutdown()
        assert refused.wait(10)
        thread.join()
        assert all(future.done() for future in given)


def test_a_closed_client_takes_nothing(cluster: LocalCluster) -> None:
    with Client(cluster) as client:
        pool = client.get_executor()
        unfinished = pool.submit(time.sleep, 20)
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        pool.submit(tasks.inc, 1)
    with pytest.raises(concurrent.futures.CancelledError):
        unfinished.result(timeout=10)
    pool.shutdown()


PROGRAM = """
import sys, time
from zmqtasks import Client

def later(text):
    time.sleep(0.2)
    print(text, flush=True)

client = Client(n_workers=1, threads_per_worker=1, processes=False)
pool = client.get_executor()
{calls}
"""


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ("pool.submit(later, 'submitted')", "submitted"),
        ("pool.map(later, ['first', 'second'])", "first\nsecond"),
        ("pool.submit(later, 'shut down'); pool.shutdown(wait=False)", "shut down"),
        ("pool.submit(later, 'then failed'); del pool; raise SystemExit(0)", "then failed"),
        (
            "import atexit\ndef last():\n    try: pool.submit(later, 'no')\n    except RuntimeError as exc: print(exc)\n"
            "import zmqtasks.executor as e\natexit.unregister(e._exit.wait); atexit.register(last); atexit.register(e._exit.wait)",
            "cannot schedule new futures after interpreter shutdown",
        ),
    ],
    ids=["submit", "map", "shutdown", "exit", "late"],
)
def test_a_program_ends_after_its_calls(tmp_path: Path, calls: str, expected: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(calls=calls))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == expected


# cancel


def test_a_call_that_has_not_begun_is_cancelled(pool: ClientExecutor, gate: Path, tmp_path: Path) -> None:
    blocking = [pool.submit(tasks.wait_for, str(gate)) for _ in range(20)]
    marker = tmp_path / "it ran"
    future = pool.submit(tasks.touch, str(marker))
    called: list[Any] = []
    future.add_done_callback(called.append)
    assert future.cancel()
    assert future.cancel()  # again: it is
    assert future.cancelled()
    assert future.done()
    assert called == [future]
    for ask in (future.result, future.exception):
        with pytest.raises(concurrent.futures.CancelledError):
            ask()
    gate.touch()
    concurrent.futures.wait(blocking, timeout=20)
    assert not marker.exists()
    assert not blocking[0].cancel()
    assert not blocking[0].cancelled()


def test_what_others_cancel_is_cancelled(client: Client, pool: ClientExecutor, gate: Path) -> None:
    future = pool.submit(tasks.wait_for, str(gate))
    client.cancel([future._followed])  # type: ignore[attr-defined]
    done, _ = concurrent.futures.wait([future], timeout=10)
    assert done == {future}
    assert future.cancelled()


# callbacks


def test_callbacks_in_order_with_errors_logged(
    pool: ClientExecutor, gate: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    last = threading.Event()
    future = pool.submit(tasks.wait_for, str(gate), 5)
    future.add_done_callback(lambda done: seen.append(("first", done.result(timeout=0))))
    future.add_done_callback(lambda done: 1 / 0)  # type: ignore[arg-type, return-value]
    future.add_done_callback(lambda done: seen.append(("third", done is future)))
    future.add_done_callback(lambda done: last.set())
    assert seen == []
    gate.touch()
    assert last.wait(10)
    assert seen == [("first", 5), ("third", True)]
    assert "exception calling callback" in caplog.text
    future.add_done_callback(lambda done: seen.append("at once"))
    assert seen[-1] == "at once"


def test_a_callback_may_submit(pool: ClientExecutor) -> None:
    second: list[concurrent.futures.Future[int]] = []
    submitted = threading.Event()

    def go_on(done: concurrent.futures.Future[int]) -> None:
        second.append(pool.submit(tasks.inc, done.result()))
        submitted.set()

    pool.submit(tasks.inc, 1).add_done_callback(go_on)
    assert submitted.wait(10)
    assert second[0].result(timeout=10) == 3


def test_shutdown_waits_for_callbacks(client: Client) -> None:
    pool = client.get_executor()
    seen: list[int] = []
    future = pool.submit(tasks.inc, 1)
    entered, leave = threading.Event(), threading.Event()
    future.add_done_callback(lambda done: (entered.set(), leave.wait(10), seen.append(done.result())))
    assert entered.wait(10)
    threading.Timer(0.05, leave.set).start()
    pool.shutdown()
    assert seen == [2]


def test_a_callback_that_shuts_down(client: Client, gate: Path) -> None:
    pool = client.get_executor()
    seen: list[Any] = []
    told = threading.Event()

    def shut_down(_: object) -> None:
        try:
            seen.append(pool.shutdown())
        except RuntimeError as exc:
            seen.append(str(exc))
        told.set()

    pool.submit(tasks.inc, 1).add_done_callback(shut_down)
    assert told.wait(10)
    assert seen == [None]
    pool = client.get_executor()
    slow = pool.submit(tasks.wait_for, str(gate))
    told.clear()
    pool.submit(tasks.inc, 1).add_done_callback(shut_down)
    assert told.wait(10)
    assert "shutdown(wait=False)" in seen[1]
    slow.add_done_callback(lambda _: pool.shutdown())  # called by this very thread
    slow.cancel()
    pool.shutdown()


# wait and as_completed


def test_wait(pool: ClientExecutor, gate: Path, tmp_path: Path) -> None:
    slow, other = pool.submit(tasks.wait_for, str(gate)), tmp_path / "other"
    quick = pool.submit(tasks.inc, 1)
    done, pending = concurrent.futures.wait([slow, quick], timeout=10, return_when=FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    cancelled = pool.submit(tasks.wait_for, str(gate))
    cancelled.cancel()
    failing = pool.submit(tasks.fail_until, str(other))
    done, pending = concurrent.futures.wait([slow, cancelled, failing], timeout=10, return_when=FIRST_EXCEPTION)
    assert failing in done
    assert pending == {slow}
    done, pending = concurrent.futures.wait([slow, quick], timeout=0.01, return_when=ALL_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    gate.touch()
    done, pending = concurrent.futures.wait([slow, quick, cancelled, failing], timeout=10)
    assert pending == set()


def test_a_cancelled_future_is_no_exception_to_wait_for(pool: ClientExecutor, gate: Path) -> None:
    slow, cancelled = pool.submit(tasks.wait_for, str(gate)), pool.submit(tasks.wait_for, str(gate))
    cancelled.cancel()
    done, pending = concurrent.futures.wait([slow, cancelled], timeout=0.05, return_when=FIRST_EXCEPTION)
    assert (done, pending) == ({cancelled}, {slow})


def test_as_completed(pool: ClientExecutor, gate: Path) -> None:
    slow, quick, failing = pool.submit(tasks.wait_for, str(gate)), pool.submit(tasks.inc, 1), pool.submit(tasks.fail)
    coming = concurrent.futures.as_completed([slow, slow, quick, failing], timeout=10)
    assert {next(coming), next(coming)} == {quick, failing}
    gate.touch()
    assert list(coming) == [slow]
    with pytest.raises(concurrent.futures.TimeoutError):
        list(concurrent.futures.as_completed([pool.submit(time.sleep, 0.3)], timeout=0))


# workers that die, tasks, event loops


def test_a_worker_that_dies_fails_its_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "zmqtasks")
    with LocalCluster(n_workers=1, threads_per_worker=1) as cluster, Client(cluster) as client:
        pool = client.get_executor(idempotent=False)
        killing, waiting = pool.submit(own.die), pool.submit(tasks.keywords, 1)
        with pytest.raises(KilledWorker):
            killing.result(timeout=30)
        assert waiting.result(timeout=30) == ((1,), {})
        pool.shutdown()


def test_an_executor_inside_of_a_task_needs_no_slot_to_wait(client: Client) -> None:
    assert client.gather(client.map(own.by_an_executor_inside, [5] * 8)) == [30] * 8


def test_an_event_loop_runs_calls_with_it(pool: ClientExecutor, gate: Path, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        many = [loop.run_in_executor(pool, pow, i, 2) for i in range(10)]
        assert await asyncio.gather(*many) == [i * i for i in range(10)]
        with pytest.raises(ValueError, match="bad"):
            await loop.run_in_executor(pool, tasks.fail, "bad")
        blocking = [loop.run_in_executor(pool, tasks.wait_for, str(gate)) for _ in range(20)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.run_in_executor(pool, tasks.touch, str(tmp_path / "it ran")), 0.05)
        await asyncio.to_thread(gate.touch)
        await asyncio.gather(*blocking)

    asyncio.run(main())
    assert not (tmp_path / "it ran").exists()


def test_the_executor_of_an_asynchronous_client(cluster: LocalCluster, gate: Path) -> None:
    async def main() -> None:
        async with Client(cluster, asynchronous=True) as client:
            pool = client.get_executor()
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(pool, pow, 2, 10) == 1024
            with pytest.raises(ValueError, match="bad"):
                await asyncio.wrap_future(pool.submit(tasks.fail, "bad"))
            left = pool.submit(tasks.wait_for, str(gate), 1)
            with pytest.raises(RuntimeError, match="to_thread"):
                pool.shutdown()
            await asyncio.to_thread(gate.touch)
            await asyncio.to_thread(pool.shutdown)
            assert left.result(timeout=0) == 1

    asyncio.run(main())
