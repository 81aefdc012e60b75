"""`as_completed`, `wait`, callbacks, progress: waiting for many futures."""

from __future__ import annotations

import concurrent.futures
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client_tasks as tasks
import pytest

from zmqtasks import CancelledError, Client, Future, TaskTimeoutError, as_completed, futures_of, progress, wait
from zmqtasks.errors import ConfigError
from zmqtasks.fetching import parse_timeout
from zmqtasks.protocol.ops import ErrorInfo, KeysErred

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that `wait_for` waits for."""
    return tmp_path / "go"


def test_as_completed_gives_each_once(client: Client) -> None:
    futures = client.map(tasks.inc, range(50))
    completed = as_completed(futures)
    assert completed.count() == 50
    assert {future.key for future in completed} == {future.key for future in futures}
    assert completed.is_empty()
    assert list(as_completed([])) == []


def test_as_completed_gives_what_is_ready_first(client: Client, gate: Path) -> None:
    slow, fast = client.submit(tasks.wait_for, str(gate)), client.submit(tasks.inc, 1)
    completed = as_completed([slow, fast])
    assert next(completed) is fast
    assert not completed.has_ready()
    assert completed.next_batch(block=False) == []
    gate.touch()
    assert next(completed) is slow
    with pytest.raises(StopIteration):
        next(completed)


def test_as_completed_takes_more(client: Client) -> None:
    completed = as_completed([client.submit(tasks.inc, 0)])
    seen = []
    for future in completed:
        seen.append(value := future.result())
        if value < 5:
            completed.add(client.submit(tasks.inc, value))
    assert seen == [1, 2, 3, 4, 5]
    future = client.submit(tasks.inc, 0)
    completed.update([future, future])
    assert [f.result() for f in completed] == [1, 1]


def test_as_completed_in_batches_with_results(client: Client) -> None:
    futures = client.map(tasks.inc, range(100))
    results: dict[Future[int], int] = {}
    for batch in as_completed(futures, with_results=True).batches():
        assert batch
        results.update(batch)
    assert [results[future] for future in futures] == list(range(1, 101))


def test_as_completed_and_errors(client: Client) -> None:
    bad = client.submit(tasks.fail)
    with pytest.raises(ValueError, match="no"):
        list(as_completed([bad], with_results=True))
    ((future, (kind, exc, traceback)),) = as_completed([bad], with_results=True, raise_errors=False)
    assert (future, kind, str(exc)) == (bad, ValueError, "no")
    assert traceback is not None


def test_as_completed_has_a_time_limit(client: Client, gate: Path) -> None:
    completed = as_completed([client.submit(tasks.wait_for, str(gate))], timeout=0.05)
    with pytest.raises(TaskTimeoutError, match="1 futures did not end within"):
        next(completed)
    gate.touch()


def test_a_dropped_as_completed_lets_its_futures_go(client: Client, gate: Path, eventually: Eventually) -> None:
    completed = as_completed([client.submit(tasks.wait_for, str(gate))])
    gone = weakref.ref(completed)
    del completed
    gc.collect()
    assert gone() is None
    eventually(lambda: not client._node.machine.states)
    gate.touch()


def test_wait(client: Client, gate: Path) -> None:
    slow = client.submit(tasks.wait_for, str(gate))
    fast, bad = client.submit(tasks.inc, 1), client.submit(tasks.fail)
    done, not_done = wait([slow, fast], return_when="FIRST_COMPLETED")
    assert (done, not_done) == ({fast}, {slow})
    done, _ = wait({"a": slow, "b": bad}, return_when="FIRST_EXCEPTION")
    assert done == {bad}
    with pytest.raises(TaskTimeoutError, match="1 of 3 futures"):
        wait([slow, fast, bad], timeout="50ms")
    gate.touch()
    assert wait([slow, fast, bad], timeout=10).done == {slow, fast, bad}
    assert wait([]) == (set(), set())
    with pytest.raises(ConfigError, match="return_when"):
        wait([fast], return_when="NEVER")


def test_wait_for_cancelled_futures(client: Client, gate: Path) -> None:
    slow = client.submit(tasks.wait_for, str(gate))
    slow.cancel()
    with pytest.raises(CancelledError, match="1 of 1 futures"):
        wait([slow])
    gate.touch()


def test_done_callbacks_run_in_their_own_thread(client: Client, gate: Path) -> None:
    seen: list[tuple[str, str]] = []
    both = threading.Barrier(2, timeout=10)

    def note(future: Future[Any]) -> None:
        seen.append((future.status, threading.current_thread().name))
        both.wait()

    future = client.submit(tasks.wait_for, str(gate))
    future.add_done_callback(note)
    assert seen == []
    gate.touch()
    both.wait()
    future.add_done_callback(note)
    both.wait()
    assert seen == [("finished", "zmqtasks-callbacks")] * 2


def test_a_failing_callback_is_logged(client: Client, caplog: pytest.LogCaptureFixture, eventually: Eventually) -> None:
    client.submit(tasks.inc, 1).add_done_callback(lambda future: 1 / 0)
    eventually(lambda: "a done callback of" in caplog.text)


def test_a_callback_keeps_nothing_once_it_was_called(client: Client, eventually: Eventually) -> None:
    called = threading.Event()
    future = client.submit(tasks.inc, 1)
    key = future.key
    future.add_done_callback(lambda _: called.set())
    assert called.wait(10)
    del future
    eventually(lambda: key not in client.who_has())


def test_executor_futures(client: Client, gate: Path) -> None:
    pool = client.get_executor(retries=1)
    first, second = pool.submit(tasks.wait_for, str(gate), 1), pool.submit(tasks.inc, 1)
    done, _ = concurrent.futures.wait([first, second], timeout=10, return_when="FIRST_COMPLETED")
    assert done == {second}
    assert first.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        first.result(10)
    assert first.cancelled()
    assert not second.cancel()
    gate.touch()
    pool.shutdown()


def test_progress(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    futures = client.map(tasks.inc, range(10))
    bad = client.submit(tasks.fail)
    assert progress(futures, bad) is None
    shown = capsys.readouterr().out
    assert "inc" in shown
    assert "10/10" in shown
    assert "1 failed" in shown
    assert progress() is None
    html = progress(futures, notebook=True)._repr_html_()
    assert "10 / 10" in html


def test_futures_of(client: Client) -> None:
    a, b = client.map(tasks.inc, range(2))
    assert futures_of([a, {"x": (b, 3)}]) == [a, b]


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, None), (2, 2.0), ("500ms", 0.5), ("2 min", 120.0), ("1h", 3600.0), ("3", 3.0)]
)
def test_times(text: Any, seconds: float | None) -> None:
    assert parse_timeout(text) == seconds


def test_a_failure_at_the_beginning_of_a_wait_is_not_missed(client: Client, gate: Path) -> None:
    """It comes when `gather` has seen that it is still pending, and has not begun to wait."""
    slow, bad = client.submit(tasks.wait_for, str(gate)), client.submit(tasks.wait_for, str(gate))
    node, raised = client._node, []

    def gather() -> None:
        try:
            client.gather([slow, bad])
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=gather)
    with node.lock:  # where the thread has to stop
        thread.start()
        deadline = time.monotonic() + 20
        while "_register" not in names_of_frames(thread) and time.monotonic() < deadline:
            time.sleep(0.001)
        node.machine.receive([KeysErred([bad._state.key], ErrorInfo("exception", "ValueError: no"))])
    thread.join(20)
    alive = thread.is_alive()
    gate.touch()
    thread.join(20)
    assert not alive
    assert len(raised) == 1


def names_of_frames(thread: threading.Thread) -> set[str]:
    """The functions in which a thread is."""
    names = set()
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names
