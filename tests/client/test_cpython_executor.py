"""The executor under CPython's own tests of executors.

They come with a Python that was built from its sources, and on Debian with libpython3.X-testsuite; without them these are
skipped.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from typing import Any

import cpython_tests
import pytest

from zmqtasks import Client, LocalCluster

try:
    cpython_tests.load()
except (ModuleNotFoundError, unittest.SkipTest) as exc:
    pytest.skip(f"no tests of CPython for this Python: {exc}", allow_module_level=True)

_NOT_OURS = {
    "test_max_workers_negative": "the executor has the workers of its cluster",
    "test_interpreter_shutdown": "makes Python's own executors by name; tests/client/test_executor.py has the like",
    "test_submit_after_interpreter_shutdown": "makes Python's own executors by name",
    "test_hang_gh83386": "makes Python's own executors by name",
}


@pytest.fixture
def executor(cluster: LocalCluster) -> Iterator[Any]:
    """As CPython's tests use theirs: until the end of one test."""
    with Client(cluster) as client:
        client.run(cpython_tests.load)
        with client.get_executor() as executor:
            yield executor


def _cases() -> list[Any]:
    cases = []
    for name in ("ExecutorTest", "ExecutorShutdownTest", "WaitTests", "AsCompletedTests"):
        tests = cpython_tests.mixin(name)
        for test in unittest.TestLoader().getTestCaseNames(type(name, (tests, unittest.TestCase), {})):
            reason = _NOT_OURS.get(test)
            marks = () if reason is None else (pytest.mark.skip(reason=reason),)
            cases.append(pytest.param(tests, test, id=f"{name}-{test}", marks=marks))
    return cases


@pytest.mark.parametrize(("tests", "name"), _cases())
def test_of_cpython(tests: type, name: str, executor: Any) -> None:
    class Case(tests, unittest.TestCase):  # type: ignore[misc]
        worker_count = 4

    case = Case(name)
    case.executor = executor
    getattr(case, name)()
