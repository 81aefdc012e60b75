"""Nodes in shells: logs, signals, files, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.shells import Shell, start_scheduler

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  (DEBUG|INFO|WARNING|ERROR) +\S+  \S.*")


def zmqtasks(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zmqtasks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | variables)


@pytest.mark.parametrize("protocol", ["tcp", "unix", "zmq"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_end_nodes_quietly(protocol, number):
    scheduler, address = start_scheduler("--protocol", protocol)
    with scheduler, Shell("worker", address, "--nworkers", "2", "--nthreads", "1") as workers:
        workers.wait_for("2 workers with 1 thread")
        for shell in (workers, scheduler):
            output = shell.stop(number)
            assert all(LOG_LINE.fullmatch(line) for line in output.splitlines()), output
            assert "WARNING" not in output
            assert "ERROR" not in output


def test_ctrl_c_reaches_all_of_a_terminal_at_once():
    """A terminal sends SIGINT to the nanny and to its workers: they still end in order."""
    scheduler, address = start_scheduler()
    with scheduler, Shell("worker", address, "--nworkers", "2", "--nthreads", "1", group=True) as workers:
        workers.wait_for("2 workers with 1 thread")
        workers.send(signal.SIGINT)
        assert workers.wait_exit() == 0
        assert "Traceback" not in workers.output
        assert "WARNING" not in workers.output, workers.output
        scheduler.stop()


def test_status():
    scheduler, address = start_scheduler()
    options = ["--nthreads", "3", "--memory-limit", "1GiB", "--resources", "GPU=2", "--name", "ada"]
    with scheduler, Shell("worker", address, *options) as worker:
        worker.wait_for("1 worker with 3 threads")
        text = zmqtasks("status", address)
        assert text.returncode == 0, text.stderr
        assert "1 worker, 3 threads" in text.stdout
        assert re.search(r"ada .*running +3 .*1\.0 GiB", text.stdout), text.stdout
        info = json.loads(zmqtasks("status", address, "--json").stdout)
        assert info["address"] == address
        (found,) = info["workers"].values()
        assert (found["name"], found["nthreads"], found["memory_limit"]) == ("ada", 3, 1 << 30)
        assert found["resources"] == {"GPU": 2.0}
        assert set(info["tasks"]) >= {"waiting", "processing", "memory", "erred"}
        assert "goodbye" not in scheduler.output  # a question is no event
        worker.stop()
        scheduler.stop()


def test_nobody_there():
    for command in ("status", "worker"):
        done = zmqtasks(command, "tcp://127.0.0.1:1", "--key-file", _key())
        assert done.returncode == 1
        assert "tcp://127.0.0.1:1" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_waiting_for_the_key_is_told(tmp_path):
    with Shell("worker", "tcp://127.0.0.1:1", "--key-file", str(tmp_path / "missing.key")) as worker:
        worker.wait_for("waiting up to 30 s for .*missing.key")
        worker.send(signal.SIGINT)
        assert worker.process.wait(30) == 130


def test_a_tilde_that_the_shell_left_in_the_path_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    scheduler, address = start_scheduler("--key-file=~/k")
    with scheduler, Shell("worker", address, "--key-file=~/k", "--nthreads", "1") as worker:
        worker.wait_for("1 worker with 1 thread")
        done = zmqtasks("status", address, "--key-file=~/k")
        assert "1 worker, 1 thread" in done.stdout, done.stderr
        assert zmqtasks("key", "show", "~/k").returncode == 0
        worker.stop()
        scheduler.stop()


def test_a_port_that_is_taken():
    scheduler, address = start_scheduler()
    with scheduler:
        port = address.rpartition(":")[2]
        done = zmqtasks("scheduler", "--port", port)
        assert done.returncode == 1
        assert port in done.stderr
        assert "Traceback" not in done.stderr
        scheduler.stop()


def test_the_wrong_key_is_told_on_both_sides(tmp_path):
    scheduler, address = start_scheduler()
    other = tmp_path / "other.key"
    other.touch(0o600)
    other.write_text("cd" * 32)
    with scheduler:
        for command in ("status", "worker"):
            done = zmqtasks(command, address, "--key-file", str(other))
            assert done.returncode == 1
            assert "key" in done.stderr
            assert "Traceback" not in done.stderr
        scheduler.wait_for("WARNING .*key")
        scheduler.send(signal.SIGINT)
        assert scheduler.wait_exit() == 0


def test_a_scheduler_file_of_a_scheduler_that_was_killed_is_replaced(tmp_path):
    path = tmp_path / "scheduler.json"
    scheduler, first = start_scheduler("--scheduler-file", str(path))
    with scheduler:
        scheduler.send(signal.SIGKILL)
        scheduler.wait_exit()
    assert path.exists()
    scheduler, second = start_scheduler("--scheduler-file", str(path))
    with scheduler:
        assert json.loads(path.read_text())["address"] == second != first
        assert zmqtasks("status", "--scheduler-file", str(path)).returncode == 0
        scheduler.stop()
    assert not path.exists()


def _key() -> str:
    """The key of this test run; the file is made by the first scheduler."""
    scheduler, _ = start_scheduler()
    with scheduler:
        scheduler.stop()
    from zmqtasks.security import default_key_path

    return str(default_key_path())


@pytest.mark.parametrize("command", [("scheduler", "--port", "0"), ("worker", "tcp://127.0.0.1:1")])
@pytest.mark.parametrize("by_option", [True, False], ids=["option", "variable"])
def test_a_codec_whose_package_is_missing_is_named_at_the_start(tmp_path, command, by_option):
    (tmp_path / "zstandard.py").write_text("raise ImportError('not installed')")
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    if by_option:
        command = (*command, "--compression", "zstd")
    else:
        variables["ZMQTASKS_COMPRESSION"] = "zstd"
    ended = zmqtasks(*command, **variables)
    assert ended.returncode not in (0, -9)
    assert "compression='zstd' (--compression, ZMQTASKS_COMPRESSION) needs a package" in ended.stderr
    assert "pip install 'zmqtasks[zstd]'" in ended.stderr
    assert "Traceback" not in ended.stderr
