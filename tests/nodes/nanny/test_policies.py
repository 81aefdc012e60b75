"""When the nanny looks at memory, when it starts workers again, and how it names figures."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zmqtasks.nodes.nanny.memory import (
    LONGEST_LOOK_S,
    SHORTEST_LOOK_S,
    format_bytes,
    is_stopped,
    next_look_s,
    out_of_memory_kills,
    private_bytes,
)
from zmqtasks.nodes.nanny.restarts import MAX_FAILED_STARTS, SHORT_LIFE_PAUSE_S, RestartPolicy

GIB = 1 << 30


def test_a_worker_that_was_ready_is_always_started_again() -> None:
    policy = RestartPolicy()
    for _ in range(100):
        policy.became_ready()
        assert policy.died(True, 60.0) == 0
        assert policy.died(True, 0.1) == SHORT_LIFE_PAUSE_S


def test_failed_starts_get_growing_pauses_and_an_end_unless_one_succeeds() -> None:
    policy = RestartPolicy()
    pauses = [policy.died(False, 0.1) for _ in range(MAX_FAILED_STARTS)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, None]
    policy.became_ready()
    assert policy.died(False, 0.1) == 0.5


def test_memory_is_looked_at_before_it_can_be_full() -> None:
    assert next_look_s(0, 100 * GIB) == LONGEST_LOOK_S
    assert next_look_s(GIB, GIB) == SHORTEST_LOOK_S
    assert SHORTEST_LOOK_S < next_look_s(0, GIB) < GIB / (3 << 30)


@pytest.mark.skipif(sys.platform != "linux", reason="memory files are of Linux")
def test_what_a_process_lends_counts_once_and_what_it_borrows_does_not() -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name("lending.py"))], check=True, timeout=60)


def test_private_memory_of_a_process() -> None:
    before = private_bytes(os.getpid())
    # Fresh pages: an allocator may have some left from earlier tests.
    block = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(os.urandom(1 << 16) * 512)
    assert private_bytes(os.getpid()) - before > len(block) // 2
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert private_bytes(process.pid) == 0
    assert not is_stopped(os.getpid())
    assert out_of_memory_kills() >= 0


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (300 << 20, "300.0 MiB"), (3 * GIB // 2, "1.5 GiB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
