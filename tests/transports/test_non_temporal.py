"""What a nanny says to the C library of its workers, and when it says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from zmqtasks.transports import non_temporal

NAME = "glibc.cpu.x86_non_temporal_threshold"
TUNABLES = "GLIBC_TUNABLES"
on_glibc = pytest.mark.skipif(
    platform.machine() != "x86_64" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="a setting of glibc on x86"
)


@on_glibc
@pytest.mark.parametrize("before", [None, "", "glibc.malloc.tcache_count=0"])
def test_a_child_uses_and_knows_what_was_chosen(before: str | None) -> None:
    """Its C library says so itself, and the size is no larger than the cache."""
    environment = {} if before is None else {TUNABLES: before}
    non_temporal.set_for_child(environment)
    assert environment[TUNABLES].startswith(before or NAME)
    code = "from zmqtasks.transports import non_temporal; print(non_temporal.threshold())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    known = int(done.stdout)
    assert f"{NAME}={known:#x}" in environment[TUNABLES]
    told = subprocess.run([_loader(), "--list-tunables"], env=environment, capture_output=True, text=True, check=True)
    assert f"{NAME}: {known:#x} " in told.stdout
    cache = non_temporal._last_cache()
    assert cache is None or known <= cache


def _loader() -> str:
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "/ld-linux" in line)


def test_what_the_user_has_set_stays() -> None:
    environment = {TUNABLES: f"glibc.malloc.tcache_count=0:{NAME}=99999"}
    non_temporal.set_for_child(environment)
    assert environment == {TUNABLES: f"glibc.malloc.tcache_count=0:{NAME}=99999"}


@pytest.mark.parametrize(
    ("tunables", "expected"),
    [
        ("", None),
        (f"{NAME}=0x1000000", 1 << 24),
        (f"glibc.malloc.tcache_count=0:{NAME}=99999", 99999),
        (f"{NAME}=much", None),
        (NAME, None),
        ("glibc.malloc.tcache_count=0", None),
    ],
)
def test_what_a_process_was_started_with(tunables: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNABLES, tunables)
    assert non_temporal.threshold() == expected
