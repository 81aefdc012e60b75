"""A part of dask's own tests, on a client of ours: what is not known to fail passes (`make dask-suite` runs all)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_bags_and_delayed(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.dask_suite", "bag", "delayed", "--tb=short"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # some of them leave files
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert int(done.stdout.rpartition(" passed")[0].rpartition("\n")[2]) > 250, done.stdout[-2000:]
