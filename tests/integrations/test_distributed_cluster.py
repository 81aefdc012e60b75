"""Whole clusters of dask.distributed on zmq://, started in each of the ways that its users have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed")

HERE = Path(__file__).parent
DEADLINE_S = 100.0
_TROUBLE = ("Traceback", "ERROR", "CommClosedError")
_LOGGED_TROUBLE = ("dangling", "never awaited", "was destroyed", "handler of", "Unserializable")
"""In the logs of nodes. Ends of links are there with tracebacks whatever the protocol is."""


def finish(arguments: list[str], folder: Path, **environment: str) -> str:
    """Runs Python to its end; returns what it printed, which must not tell of trouble."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert not any(word in said for word in (*_TROUBLE, *_LOGGED_TROUBLE)), said
    return said


def test_a_local_cluster(tmp_path: Path) -> None:
    finish([str(HERE / "distributed_programs.py"), "local"], tmp_path, DASK_TEMPORARY_DIRECTORY=str(tmp_path))


def test_distributed_tests_itself_with_zmq_as_its_default_scheme(tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", f"--rootdir={HERE}", "-c", os.devnull]
    said = finish(
        ["-m", "pytest", *options, str(HERE / "distributed_gen_cluster.py")],
        tmp_path,
        DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME="zmq",
        DASK_TEMPORARY_DIRECTORY=str(tmp_path),
    )
    assert "5 passed" in said


def test_a_cluster_of_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "scheduler.json")
    environment = {**os.environ, "DASK_TEMPORARY_DIRECTORY": str(tmp_path)}
    common = ["--protocol", "zmq", "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", file]
    commands = [
        ["scheduler", "--port", "0", *common],
        ["worker", "--nworkers", "1", "--nthreads", "2", *common],
    ]
    logs = [tmp_path / f"{command[0]}.log" for command in commands]
    nodes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as out:
                nodes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dask", *command], stdout=out, stderr=out, cwd=tmp_path, env=environment
                    )
                )
        finish([str(HERE / "distributed_programs.py"), "file", file], tmp_path)
        for node in nodes:
            assert node.wait(DEADLINE_S) == 0
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    for log in logs:
        said = log.read_text()
        assert "zmq://127.0.0.1:" in said
        assert not any(word in said for word in _LOGGED_TROUBLE), said
