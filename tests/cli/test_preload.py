"""`zmqtasks worker --preload`: code of the user in worker processes, before the first task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.shells import Shell, start_scheduler
from zmqtasks import Client
from zmqtasks.security import ClusterKey, Security, default_key_path

SOURCE = """
import os, sys
ready = []

async def dask_setup(worker):
    ready.append(os.getpid())

def dask_teardown(worker):
    with open({log!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
"""


def _what_is_loaded():
    import sys

    return sys.modules["prepared"].ready


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "prepared.py"
    path.write_text(SOURCE.format(log=str(tmp_path / "ended")))
    return path


def test_setup_comes_before_tasks_also_after_a_restart_and_teardown_at_the_end(prepared, tmp_path):
    scheduler, address = start_scheduler()
    with scheduler, Shell("worker", address, "--nthreads", "1", "--preload", str(prepared)) as worker:
        worker.wait_for("1 worker with 1 thread")
        key = ClusterKey.from_hex(default_key_path().read_text().strip())
        with Client(address, security=Security(key)) as client:
            (first,) = client.submit(_what_is_loaded, pure=False).result(timeout=30)
            os.kill(first, signal.SIGKILL)
            deadline = time.monotonic() + 30
            second = first
            while second == first and time.monotonic() < deadline:
                (second,) = client.submit(_what_is_loaded, pure=False).result(timeout=30)
        assert second != first
        worker.stop()
        scheduler.stop()
    assert (tmp_path / "ended").read_text().split() == [str(second)]  # the first one was killed


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "no such file"), ("1 / 0", "ZeroDivisionError"), ("def dask_setup(worker): worker.nothing", "nothing")],
)
def test_a_preload_that_fails_ends_the_start_and_is_named(tmp_path, source, said):
    path = tmp_path / "broken.py"
    if source is not None:
        path.write_text(source)
    scheduler, address = start_scheduler()
    with scheduler:
        command = [sys.executable, "-m", "zmqtasks", "worker", address, "--preload", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        assert "preload" in done.stderr
        assert "broken.py" in done.stderr
        assert said in done.stderr
        scheduler.stop()


def test_without_a_nanny_it_is_refused():
    command = [sys.executable, "-m", "zmqtasks", "worker", "tcp://127.0.0.1:1", "--no-nanny", "--preload", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--no-nanny" in done.stderr
