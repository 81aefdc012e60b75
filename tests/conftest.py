"""For every test: files and keys of its own, and nothing left behind.

A test fails when it leaves a process (of any generation: they are known by a variable in their environment), a file in
the temporary directory, or an open descriptor in this process, listening sockets included. What ends a moment later is
waited for.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

MARK = "ZMQTASKS_TEST_RUN"
SETTLE_S = 5.0
"""How long what a test has ended may take to be gone."""
LASTING = ("/dev/urandom", "/dev/null", "/dev/tty")
"""Descriptors that libraries keep once they have been opened."""


def pytest_configure(config: pytest.Config) -> None:
    """Gives this run a temporary directory and a key file of its own, inherited by all processes that it starts."""
    folder = tempfile.mkdtemp(prefix="zmqtasks-tests-")
    config.stash[_FOLDER] = folder
    tempfile.tempdir = folder
    os.environ["TMPDIR"] = folder
    os.environ["XDG_CONFIG_HOME"] = os.path.join(folder, "pytest-config")
    os.environ.pop("ZMQTASKS_KEY_FILE", None)
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # of a shell's background job, and inherited: what is interrupted is deaf
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the temporary directory of the run."""
    shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


_FOLDER: pytest.StashKey[str] = pytest.StashKey()


@pytest.fixture(scope="session", autouse=True)
def shared_loop_runs() -> None:
    """The event loop that all clients of a process share is there from the beginning: it is not a leak of the first one."""
    from zmqtasks.nodes.client.loop import shared_loop

    shared_loop()


@pytest.fixture(scope="session", autouse=True)
def shared_arena_is_made() -> None:
    """So is the memory file from which a process sends over shm."""
    from zmqtasks.transports.shm.own_arena import process_arena

    process_arena()


@pytest.fixture(scope="session", autouse=True)
def zmq_lends_memory() -> None:
    """So is the thread by which pyzmq learns that ZeroMQ has sent what it was lent."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://lending")
        other.connect("inproc://lending")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a process, a file or a descriptor.

    Descriptors may stay after a test that is marked `ucx_keeps_its_worker`: a fault of ucxx, see `UcxWorker.release`.
    """
    tolerant = request.node.get_closest_marker("ucx_keeps_its_worker") is not None
    processes, files, descriptors = _pids(), _files(), _descriptors()
    yield
    deadline = time.monotonic() + SETTLE_S
    while left := [
        *_processes_since(processes),
        *(f"file {name}" for name in sorted(_files() - files)),
        *(
            f"descriptor {number} ({target})"
            for number, target in _descriptors().items()
            if number not in descriptors and not tolerant
        ),
    ]:
        if time.monotonic() > deadline:
            pytest.fail("the test left behind: " + "; ".join(left))
        gc.collect()
        time.sleep(0.01)


def _pids() -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit()}


def _processes_since(before: set[str]) -> list[str]:
    """Processes of this run, and unreaped children, that were not there before."""
    found = []
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for pid in _pids() - before:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
            state, parent = status.rpartition(")")[2].split()[:2]
            ours = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if ours or (state == "Z" and int(parent) == os.getpid()):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {pid} ({command.strip() or 'ended, not reaped'})")
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def _files() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if not name.startswith("pytest-")}


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed the directory
            continue
        if not target.startswith(LASTING):
            found[int(name)] = target
    return found
