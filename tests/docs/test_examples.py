"""The examples, each as the program that a user would start: right answers, three times, nothing else, nothing left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
HELPER = "engines.py"

# By example: what its lines "answer: ..." say, in their order, and what runs it in threads.
ANSWERS: dict[str, tuple[list[str], str]] = {
    "delayed_loops.py": ([r"17984 primes below 200000"], "dask's threads"),  # a table of primes says so too
    "arrays.py": (
        [
            r"1500 means, the first is \d\.\d+, their mean (0\.99|1\.00)\d+",  # of sums of two numbers between 0 and 1
            r"the largest of 9000000 elements, persisted, is 0\.999\d+",
        ],
        "dask's threads",
    ),
    "dataframes.py": (
        [
            r"40 sensors in 160000 rows; the warmest is sensor-\d\d with 20\.\d{4}",
            r"from 8 parquet files the same: True",
        ],
        "dask's threads",
    ),
    "bags.py": ([r"([a-z]+ \d+ times(, |$)){5}"], "dask's threads"),
    "optimisation.py": ([r"stiffness 4\.(199|200|201), friction 0\.(349|350|351)"], "concurrent.futures threads"),
    "grid_search.py": (
        [r"\{'C': [\d.]+, 'gamma': [\d.]+\} is best, with 0\.9\d+ of the digits recognised"],
        "joblib's threads",
    ),
    "climate.py": (
        [r"days differ from their month by (2\.\d+) degrees in the north, (2\.\d+) in the south"],  # chance: 2 degrees
        "dask's threads",
    ),
}


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, capture_output=True, text=True, timeout=100
    )


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} - {HELPER} == set(ANSWERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_example_gives_its_answer_and_three_times(name: str, tmp_path: Path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answers, threads = ANSWERS[name]
    lines = done.stdout.splitlines()
    assert len(lines) == len(answers) + 3, done.stdout
    for line, pattern in zip(lines, answers, strict=False):
        assert re.fullmatch(f"answer: {pattern}", line), line
    for line, engine in zip(lines[len(answers) :], ("zmqtasks", threads, "dask.distributed"), strict=True):
        found = re.fullmatch(rf"{re.escape(engine)}: +(\d+\.\d\d\d) s", line)
        assert found, line
        assert float(found[1]) > 0
    assert not list(tmp_path.iterdir())


def test_a_wrong_answer_ends_an_example(tmp_path: Path):
    """What the other tests rest on: the comparison in the examples can fail, and says on which engine."""
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import numpy as np, dask, zmqtasks\n"
        "from engines import compare\n"
        "with zmqtasks.LocalCluster(processes=False, n_workers=1) as cluster:\n"
        "    compare(lambda: dask.delayed(np.ones)(3).compute(), np.array([1, 1, 1.001]), zmqtasks.Client(cluster))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "on zmqtasks" in done.stderr
    assert "Mismatched elements: 1 / 3" in done.stderr


@pytest.mark.parametrize("name", ANSWERS)
def test_an_example_is_a_notebook_in_percent_format(name: str):
    """It opens with a heading; prose stands in comments of markdown cells only, and code in the others."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    for cell in cells:
        kind, _, body = cell.partition("\n")
        assert kind in ("", " [markdown]")
        if kind:
            assert all(line.startswith("#") for line in body.splitlines() if line), body
        else:
            assert any(line and not line.startswith("#") for line in body.splitlines()), body
