"""The processors of both ends while round trips are measured."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.network.placement import apart, halves

PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def threads_of(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def processors_of(pid: int) -> set[int]:
    return set().union(*(os.sched_getaffinity(thread) for thread in threads_of(pid)))


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="there is one processor, or nobody can be told which to use")
def test_both_ends_are_apart_and_free_again_afterwards():
    over = threading.Event()
    command = [sys.executable, "-c", "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with apart():
            threading.Thread(target=over.wait).start()
            here, there = processors_of(os.getpid()), processors_of(child.pid)
        assert here
        assert there
        assert not here & there
        assert all(
            os.sched_getaffinity(thread) == PROCESSORS for pid in (os.getpid(), child.pid) for thread in threads_of(pid)
        )
        over.set()
        child.communicate()


@pytest.mark.skipif(not PROCESSORS, reason="nobody can be told which processors to use")
def test_nothing_is_placed_where_there_is_no_other_process():
    code = "import os; from bench.network.placement import apart\nwith apart(): print(os.sched_getaffinity(0))"
    command = [sys.executable, "-c", code]  # this process may have some: the tests are spread over several
    assert subprocess.check_output(command, text=True).strip() == str(PROCESSORS)


def system(folder: Path, caches: list[str], cores: list[str]) -> Path:
    """What the kernel tells about processors, for each: which share its last cache, and which its core."""
    for number, (cache, core) in enumerate(zip(caches, cores, strict=True)):
        for name, text in (
            ("cache/index0/shared_cpu_list", core),
            ("cache/index3/shared_cpu_list", cache),
            ("topology/thread_siblings_list", core),
        ):
            file = folder / f"cpu{number}" / name
            file.parent.mkdir(parents=True)
            file.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("caches", "cores", "processors", "expected"),
    [
        (["0-3"] * 4, ["0", "1", "2", "3"], {0, 1, 2, 3}, ({0, 1}, {2, 3})),
        (["0-3"] * 4, ["0,2", "1,3", "0,2", "1,3"], {0, 1, 2, 3}, ({0, 2}, {1, 3})),
        (["0,2", "1,3", "0,2", "1,3"], ["0", "1", "2", "3"], {0, 1, 2, 3}, ({0}, {2})),
        (["0-3"] * 4, ["0", "1", "2", "3"], {1, 3}, ({1}, {3})),
        (["0-2"] * 3, ["0", "1", "2"], {0, 1, 2}, ({0}, {1, 2})),
        (["0-1"] * 2, ["0-1"] * 2, {0, 1}, ({0}, {1})),
        (["0", "1"], ["0", "1"], {0, 1}, ({0}, {1})),
        (["0-1"] * 2, ["0", "1"], {1}, ({1}, {1})),
        ([], [], {0, 1, 5}, ({0}, {1, 5})),
    ],
    ids=["cores", "threads", "sockets", "allowed", "odd", "one core", "no shared cache", "one", "nothing known"],
)
def test_halves(tmp_path, caches, cores, processors, expected):
    assert halves(processors, system(tmp_path, caches, cores)) == expected
