"""What the garbage collector finds in cycles may still be looked at: no lease ends before the last look.

Each case is a process of its own, so that memory that goes too early ends that one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("lease_cycles.py")


@pytest.mark.parametrize("kind", ["borrowed", "allocated"])
@pytest.mark.parametrize("case", ["finalizers", "threads", "reentrant"])
def test_memory_lives_as_long_as_anybody_may_look(case: str, kind: str) -> None:
    done = subprocess.run([sys.executable, PROGRAM, case, kind], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
