"""Runs dask's own tests, from the installed package, on a zmqtasks client: `python -m tests.dask_suite [PART ...] [OPTION ...]`.

Parts: bag, delayed, array, dataframe; all by default. Options go to pytest. What is expected to fail is in `expected_failures.txt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PARTS = {
    "bag": ["bag/tests"],
    "delayed": ["tests/test_delayed.py"],
    "array": ["array/tests"],
    "dataframe": ["dataframe"],
}


def main(arguments: list[str]) -> int:
    """Exit code of pytest."""
    import dask

    package = Path(dask.__file__).parent
    named = [argument for argument in arguments if argument in PARTS]
    options = [argument for argument in arguments if argument not in PARTS]
    paths = [str(package / path) for part in named or PARTS for path in PARTS[part]]
    # No configuration of this project: warnings are dask's own business. Tracebacks are Python's: for others pytest parses source,
    # which fails in CPython 3.11 while a thread of a worker parses too, as `DataFrame.eval` does, and ends the whole run.
    own = [
        "-c",
        "/dev/null",
        "--rootdir",
        str(package.parent),
        "-p",
        "tests.dask_suite.plugin",
        "-p",
        "no:cacheprovider",
    ]
    return int(pytest.main([*own, "-q", "--import-mode=importlib", "--timeout=120", "--tb=native", *options, *paths]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
