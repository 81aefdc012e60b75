"""The demo, as `make demo` runs it."""

from __future__ import annotations

import subprocess
import sys


def test_the_demo_computes_moves_blocks_and_checks_its_answers():
    command = [sys.executable, "-m", "zmqtasks", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "Both answers are those of a plain program" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "x + x.T" in line and "MB/s" in line)
    assert " 0.0 MB" not in row
