"""How users say what workers may take of the machine."""

from __future__ import annotations

import pytest

from zmqtasks.deploy.resources import (
    available_cpus,
    available_memory_bytes,
    parse_memory_limit,
    parse_resources,
    split_threads,
)
from zmqtasks.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5kB", 1_500),
        ("2T", 2 * 10**12),
        ("64Mi", 64 << 20),
        ("1000", 1_000),
        ("1e9", 10**9),
        ("0", 0),
        (0, 0),
        (None, 0),
        (123_456, 123_456),
        (1 << 33, 1 << 33),
    ],
)
def test_memory_limits_are_read_as_people_write_them(text, expected):
    assert parse_memory_limit(text) == expected


def test_parts_of_the_machine():
    total = available_memory_bytes()
    assert parse_memory_limit(0.5) == parse_memory_limit("0.5") == int(total * 0.5)
    assert parse_memory_limit(1.0) == total
    assert parse_memory_limit("auto", nthreads=1, n_workers=2) <= total // 2
    assert parse_memory_limit("auto", nthreads=available_cpus(), n_workers=1) == total


@pytest.mark.parametrize("text", ["", "lots", "4 GiBs", "-1", -1, float("nan"), float("inf"), "1..5GB", "GiB"])
def test_other_memory_limits_are_refused(text):
    with pytest.raises(ConfigError, match="memory limit"):
        parse_memory_limit(text)


def test_resources():
    assert parse_resources("GPU=2,foo=1.5") == {"GPU": 2.0, "foo": 1.5}
    assert parse_resources("GPU=2 foo=1") == {"GPU": 2.0, "foo": 1.0}
    assert parse_resources("") == {}


@pytest.mark.parametrize("text", ["GPU", "GPU=", "=2", "GPU=two", "GPU=-1", "GPU=nan"])
def test_other_resources_are_refused(text):
    with pytest.raises(ConfigError, match="GPU=2"):
        parse_resources(text)


@pytest.mark.parametrize(("cpus", "expected"), [(1, (1, 1)), (4, (4, 1)), (8, (4, 2)), (36, (6, 6)), (7, (7, 1))])
def test_processes_and_threads_for_a_machine(cpus, expected):
    assert split_threads(cpus) == expected
