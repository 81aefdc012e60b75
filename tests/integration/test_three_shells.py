"""Three shells: a scheduler, two workers and a script, over each transport and kind of address."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.shells import Shell, start_scheduler

SCRIPT = """
    import os, sys
    from zmqtasks import Client

    def square(x):
        return x * x, os.getpid()

    if sys.argv[1] == "--scheduler-file":
        client = Client(scheduler_file=sys.argv[2])
    else:
        client = Client(sys.argv[1])
    client.wait_for_workers(2, timeout=30)
    results = client.gather(client.map(square, range(200)))
    workers = client.scheduler_info()["workers"]
    print(sum(value for value, _ in results), len(workers), sorted({address.split(":")[0] for address in workers}))
    total = client.submit(sum, client.map(abs, range(-10, 0)))
    print("total", total.result())
    client.close()
"""
ANSWER = sum(x * x for x in range(200))


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return str(path)


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("scheduler_options", "worker_options", "data_scheme"),
    [
        pytest.param([], [], "tcp", id="tcp"),
        pytest.param(["--protocol", "zmq"], [], "zmq", id="zmq"),
        pytest.param(["--host", "::1"], [], "tcp", id="tcp-ipv6"),
        pytest.param(["--host", "::1", "--protocol", "zmq"], [], "zmq", id="zmq-ipv6"),
        pytest.param(["--host", "localhost"], [], "tcp", id="name"),
        pytest.param(["--protocol", "unix"], [], "unix", id="unix"),
        pytest.param([], ["--protocol", "zmq"], "zmq", id="data-over-zmq"),
        pytest.param([], ["--protocol", "unix"], "unix", id="data-over-unix"),
        pytest.param(["--protocol", "zmq"], ["--protocol", "tcp"], "tcp", id="data-over-tcp"),
    ],
)
def test_scheduler_workers_and_script(script, scheduler_options, worker_options, data_scheme):
    scheduler, address = start_scheduler(*scheduler_options)
    options = ["--nthreads", "1", *worker_options]
    with scheduler, Shell("worker", address, *options) as one, Shell("worker", address, *options) as two:
        output = run_script(script, address)
        assert f"{ANSWER} 2 ['{data_scheme}']" in output
        assert "total 55" in output
        one.stop(signal.SIGINT)
        two.stop(signal.SIGTERM)
        scheduler.stop(signal.SIGINT)


def test_by_scheduler_file(script, tmp_path):
    path = tmp_path / "scheduler.json"
    # Workers wait for the file; and the key travels in it, so nobody needs the key file.
    with Shell("worker", "--scheduler-file", str(path), "--nworkers", "2", "--nthreads", "1") as workers:
        scheduler, address = start_scheduler("--scheduler-file", str(path), "--key-file", str(tmp_path / "own.key"))
        with scheduler:
            assert json.loads(path.read_text())["address"] == address
            assert f"{ANSWER} 2 ['tcp']" in run_script(script, "--scheduler-file", str(path))
            workers.stop(signal.SIGTERM)
            scheduler.stop(signal.SIGTERM)
    assert not path.exists()


def test_workers_end_when_the_scheduler_is_stopped(script):
    scheduler, address = start_scheduler()
    with scheduler, Shell("worker", address, "--nthreads", "1") as worker:
        worker.wait_for("1 worker with 1 thread")
        scheduler.stop(signal.SIGTERM)
        assert worker.wait_exit() == 0, worker.output
        assert "Traceback" not in worker.output


def test_a_worker_in_the_foreground_without_nanny(script):
    scheduler, address = start_scheduler()
    options = ["--no-nanny", "--nthreads", "1"]
    with scheduler, Shell("worker", address, *options) as one, Shell("worker", address, *options) as two:
        assert f"{ANSWER} 2 ['tcp']" in run_script(script, address)
        one.stop(signal.SIGINT)
        two.stop(signal.SIGTERM)
        scheduler.stop(signal.SIGTERM)
