"""LocalCluster as programs use it; that nothing of it is left is checked after every test (see conftest)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from zmqtasks import Client, LocalCluster
from zmqtasks.errors import ConfigError, NodeStartError

TWO = {"n_workers": 2, "threads_per_worker": 1}


def square(x):
    return x * x


def run_program(tmp_path: Path, program: str, **options) -> subprocess.Popen[str]:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"protocol": "tcp"}, id="tcp"),
        pytest.param({"protocol": "zmq"}, id="zmq"),
        pytest.param({"protocol": "unix"}, id="unix"),
        pytest.param({"host": "::1"}, id="ipv6"),
        pytest.param({"processes": False}, id="inproc"),
    ],
)
def test_a_cluster_runs_tasks(options):
    with LocalCluster(**TWO, **options) as cluster, Client(cluster) as client:
        assert client.gather(client.map(square, range(100))) == [x * x for x in range(100)]
        workers = client.scheduler_info()["workers"]
        assert len(workers) == 2
        assert {worker["nthreads"] for worker in workers.values()} == {1}
        scheme = cluster.scheduler_address.partition("://")[0]
        assert all(address.startswith(scheme) for address in workers)
        assert cluster.scheduler_address in repr(cluster)


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, "unix" if sys.platform == "linux" else "tcp"),
        ({"host": "127.0.0.1"}, "tcp"),
        ({"host": "localhost", "protocol": "zmq"}, "zmq"),
    ],
)
def test_links_do_not_cross_hosts_unless_a_host_is_named(options, scheme):
    with LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster:
        assert cluster.scheduler_address.partition("://")[0] == scheme


def test_workers_have_what_was_asked_for():
    with (
        LocalCluster(1, 3, memory_limit="1GiB", resources={"GPU": 2}, name="ada") as cluster,
        Client(cluster) as client,
    ):
        (worker,) = client.scheduler_info()["workers"].values()
        assert worker["nthreads"] == 3
        assert worker["memory_limit"] == 1 << 30
        assert worker["resources"] == {"GPU": 2.0}
        assert worker["name"].startswith("ada")


def test_closing_twice_and_without_a_client():
    cluster = LocalCluster(**TWO)
    assert cluster.status == "running"
    assert [worker["nthreads"] for worker in cluster.workers.values()] == [1, 1]
    cluster.close()
    cluster.close()
    assert cluster.status == "closed"


def test_asynchronous():
    async def main():
        async with LocalCluster(**TWO, asynchronous=True) as cluster, Client(cluster, asynchronous=True) as client:
            assert await client.submit(square, 7) == 49
        cluster = await LocalCluster(n_workers=1, processes=False, asynchronous=True)
        assert cluster.status == "running"
        await cluster.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "inproc", "processes": True},
        {"protocol": "carrier-pigeon"},
        {"protocol": "unix", "host": "127.0.0.1"},
        {"protocol": "unix", "scheduler_port": 8786},
        {"n_workers": -1},
        {"threads_per_worker": 0},
        {"memory_limit": "lots"},
    ],
)
def test_arguments_that_cannot_be(options):
    with pytest.raises((ConfigError, NodeStartError)):
        LocalCluster(**options)


def test_a_start_that_fails_says_why_and_leaves_nothing():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NodeStartError, match=str(port)):
            LocalCluster(**TWO, scheduler_port=port)


def test_no_main_guard_own_modules_and_no_close(tmp_path):
    (tmp_path / "helpers_of_mine.py").write_text("def triple(x):\n    return 3 * x\n")
    program = run_program(
        tmp_path,
        """
        import helpers_of_mine
        from zmqtasks import Client, LocalCluster

        def double(x):
            return 2 * x

        cluster = LocalCluster(n_workers=2, threads_per_worker=1)
        client = Client(cluster)
        print(client.submit(double, 4).result(), client.submit(helpers_of_mine.triple, 4).result())
        """,
    )
    output, errors = program.communicate(timeout=60)
    assert (output, errors, program.returncode) == ("8 12\n", "", 0)


def test_an_error_in_the_program_ends_the_cluster_too(tmp_path):
    program = run_program(
        tmp_path,
        """
        from zmqtasks import Client, LocalCluster
        client = Client(LocalCluster(n_workers=2, threads_per_worker=1))
        raise ValueError("of the user")
        """,
    )
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("ValueError: of the user")


@pytest.mark.parametrize("processes", ["True", "False"])
def test_a_killed_program_leaves_nothing(tmp_path, processes):
    program = run_program(
        tmp_path,
        f"""
        import time
        from zmqtasks import Client, LocalCluster
        client = Client(LocalCluster(n_workers=2, threads_per_worker=1, processes={processes}))
        futures = client.map(time.sleep, [0.2] * 100)
        print("started", flush=True)
        time.sleep(60)
        """,
    )
    with program:
        assert program.stdout.readline() == "started\n"
        program.kill()


def test_ctrl_c_is_for_the_program(tmp_path):
    program = run_program(
        tmp_path,
        """
        import time
        from zmqtasks import Client, LocalCluster
        with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster) as client:
            pids = client.run(lambda: __import__("os").getpid())
            try:
                print("started", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                print(client.submit(pow, 2, 10).result())
                print(client.run(lambda: __import__("os").getpid()) == pids)
        """,
        start_new_session=True,
    )
    assert program.stdout.readline() == "started\n"
    os.killpg(program.pid, signal.SIGINT)  # what a terminal does
    output, errors = program.communicate(timeout=60)
    assert (output, errors, program.returncode) == ("1024\nTrue\n", "", 0)


def test_a_forked_child_neither_closes_nor_holds_the_cluster(tmp_path):
    program = run_program(
        tmp_path,
        """
        import os, sys, time
        from zmqtasks import Client, LocalCluster
        client = Client(LocalCluster(n_workers=1, threads_per_worker=1))
        client.submit(pow, 2, 2).result()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)  # runs the exit handlers of the copy
        os.waitpid(pid, 0)
        print(client.submit(pow, 2, 10).result())
        sleeper = os.fork()
        if sleeper == 0:
            time.sleep(60)  # has a copy of every pipe
            os._exit(0)
        print(sleeper, flush=True)
        time.sleep(60)
        """,
    )
    with program:
        assert program.stdout.readline() == "1024\n"
        sleeper = int(program.stdout.readline())
        before = _children(program.pid)
        assert len(before) >= 3  # sleeper, scheduler, nanny
        program.kill()
        program.wait()
        try:
            _wait_gone(before - {sleeper})
        finally:
            os.kill(sleeper, signal.SIGKILL)


def _children(pid: int) -> set[int]:
    return {
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    }


def _wait_gone(pids: set[int]) -> None:
    import time

    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_codec_whose_package_is_missing_is_named_before_anything_starts(tmp_path):
    (tmp_path / "zstandard.py").write_text("raise ImportError('not installed')")  # found before the installed one
    program = """
        from zmqtasks import Client, LocalCluster
        from zmqtasks.config import Config
        from zmqtasks.errors import ConfigError

        zstd = Config(compression="zstd")
        for make in (
            lambda: LocalCluster(n_workers=1, config=zstd),
            lambda: LocalCluster(n_workers=1, processes=False, config=zstd),
            lambda: Client("tcp://127.0.0.1:1", config=zstd, timeout=1),
        ):
            try:
                make()
            except ConfigError as exc:
                assert "pip install 'zmqtasks[zstd]'" in str(exc), exc
            else:
                raise AssertionError("it has started")
        """
    with run_program(tmp_path, program) as running:
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
