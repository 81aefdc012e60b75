"""Ends and interruptions: Ctrl-C, exit, fork, a scheduler or worker that is killed, and what importing costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import client_tasks as tasks
import pytest

from zmqtasks import Client, Config, LocalCluster, wait
from zmqtasks.errors import SchedulerLostError, TaskTimeoutError

Eventually = Callable[[Callable[[], object]], None]

TIMEOUT_S = 60


def start(script: str) -> subprocess.Popen[str]:
    """A Python process that runs `script`, with warnings on."""
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must end well and say nothing on stderr."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, "")
    return out


@pytest.mark.parametrize(
    "call", ["future.result()", "client.gather([future])", "wait([future])", "next(as_completed([future]))"]
)
def test_ctrl_c_ends_a_wait_and_nothing_else(call: str) -> None:
    process = start(f"""
        import time
        from zmqtasks import Client, as_completed, wait
        with Client(processes=False, threads_per_worker=2) as client:
            future = client.submit(time.sleep, 1)
            try:
                print("waiting", flush=True)
                {call}
            except KeyboardInterrupt:
                print("interrupted", future.status, client.submit(pow, 2, 3).result(), flush=True)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert finish(process) == "interrupted pending 8\n"


@pytest.mark.parametrize("options", ["n_workers=1", "processes=False"])
def test_a_program_may_end_without_closing(options: str) -> None:
    assert (
        finish(
            start(f"""
            import time
            from zmqtasks import Client, as_completed
            client = Client({options}, threads_per_worker=2)
            futures = client.map(pow, range(100), range(100))
            pending = client.submit(time.sleep, 0.5)
            print(client.submit(pow, 2, 3).result())
            """)
        )
        == "8\n"
    )


def test_a_fork_of_the_client_says_what_to_do() -> None:
    out = finish(
        start("""
        import os, sys
        from zmqtasks import Client
        from zmqtasks.errors import ClientClosedError
        with Client(processes=False) as client:
            future = client.submit(pow, 2, 3)
            assert future.result() == 8
            pid = os.fork()
            if pid == 0:
                try:
                    client.submit(pow, 2, 3)
                except ClientClosedError as exc:
                    print(exc, flush=True)
                del future
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            print(client.submit(pow, 2, 4).result())
        """)
    )
    assert out == (
        "this process was forked from the one that made the client: make a new Client here (or spawn, don't fork)\n16\n"
    )


def test_a_killed_scheduler_ends_all_waits(tmp_path: Path) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, config=Config(grace_s=0.5)) as cluster:
        client = Client(cluster, config=Config(grace_s=0.5))
        done = client.submit(pow, 2, 3)
        assert done.result(10) == 8
        future = client.submit(tasks.wait_for, str(tmp_path / "go"))
        pid = cluster._backend._started[0].pid  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SchedulerLostError, match="is gone"):
            future.result(20)
        assert future.status == "lost"
        with pytest.raises(SchedulerLostError, match="is gone"):
            wait([done, future])
        assert done.result() == 8
        with pytest.raises(SchedulerLostError):
            client.submit(pow, 2, 3)
        with pytest.raises(SchedulerLostError):
            client.nthreads()
        assert "disconnected" in repr(client)
        client.close()


@contextmanager
def two_workers() -> Iterator[tuple[Client, dict[str, int]]]:
    """A client, and the processes of its workers by address; these are continued in the end."""
    config = Config(grace_s=2, heartbeat_s=2, shared_memory=False)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, config=config, protocol="tcp") as cluster,
        Client(cluster, config=config) as client,
    ):
        pids = client.run(os.getpid)
        try:
            yield client, pids
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGCONT)


def test_a_result_is_had_from_another_holder_than_one_that_is_stopped() -> None:
    with two_workers() as (client, pids):
        one, two = pids
        future = client.submit(bytes, 3_000_000, workers=[one], allow_other_workers=True)
        assert client.submit(len, future, workers=[two]).result(TIMEOUT_S) == 3_000_000
        assert len(future.result(TIMEOUT_S)) == 3_000_000
        os.kill(pids[one], signal.SIGSTOP)
        assert len(future.result(20)) == 3_000_000


def test_scatter_keeps_its_time_limit_when_a_worker_is_stopped() -> None:
    with two_workers() as (client, pids):
        client.scatter(bytes(8_000_000), broadcast=True)
        os.kill(next(iter(pids.values())), signal.SIGSTOP)
        with pytest.raises(TaskTimeoutError, match="within 1 s"):
            client.scatter(bytes(64_000_000), broadcast=True, timeout=1)


def test_killed_and_restarted_workers() -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster) as client:
        future = client.submit(bytes, 300_000)
        assert len(future.result(10)) == 300_000
        (holder,) = client.who_has(future)[future.key]
        os.kill(client.scheduler_info()["workers"][holder]["pid"], signal.SIGKILL)
        assert len(future.result(20)) == 300_000  # computed again
        client.wait_for_workers(2, timeout=20)
        before = client.run(os.getpid)
        assert client.restart(timeout=20) is client
        after = client.run(os.getpid)
        assert len(after) == 2
        assert not set(before.values()) & set(after.values())
        assert future.cancelled()
        assert client.submit(pow, 2, 3).result(10) == 8


def test_shutdown() -> None:
    cluster = LocalCluster(n_workers=1, threads_per_worker=1)
    client = Client(cluster)
    assert client.submit(pow, 2, 3).result(10) == 8
    client.shutdown()
    assert client.status == "closed"
    assert cluster.status == "closed"


def test_importing_loads_nothing_heavy() -> None:
    out = finish(
        start("""
        import sys
        import zmqtasks
        print(sorted(set(sys.modules) & {"asyncio", "numpy", "zmq", "uvloop", "rich", "cloudpickle", "msgspec"}))
        """)
    )
    assert out == "[]\n"
