"""UCX: the conformance suite over several of its transports, each in a process, as its settings hold for a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LINKS = Path(__file__).with_name("ucx_links.py")
TIMEOUT_S = 110

installed = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: pip install 'zmqtasks[ucx]'"
)


def run_links(tls: str, expected: str, *arguments: str, **more: str) -> str:
    """Output of the tests in `ucx_links` with UCX_TLS set; fails with them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    environment |= {"UCX_TLS": tls, "UCX_NET_DEVICES": "lo", "EXPECTED_TRANSPORTS": expected, **more}
    if "tcp" not in tls:
        del environment["UCX_NET_DEVICES"]
    command = [sys.executable, "-m", "pytest", "--timeout=40", "-p", "no:cacheprovider", *arguments, str(LINKS)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
    return done.stdout


@installed
def test_conformance_over_tcp() -> None:
    run_links("tcp,self", "tcp,self")


@installed
def test_conformance_over_shared_memory() -> None:
    # What is left out is about the stream, which is the same.
    run_links("sm,tcp,self", "cma,posix,self,sysv,tcp", "-k", "not frozen and not cut_link")


@installed
@pytest.mark.parametrize(
    ("tls", "active", "carrier"),
    [
        ("tcp,self", "self,tcp", "tcp/lo"),
        ("sm,tcp,self", "cma,posix,self,sysv,tcp", "/memory"),
        ("posix,self", "posix,self", "posix/memory"),
        ("sysv,self", "self,sysv", "sysv/memory"),
    ],
)
def test_what_carries_the_bytes(tls: str, active: str, carrier: str) -> None:
    said = run_links(tls, active, "-s", "-k", "carries_large", UCX_PROTO_INFO="y")
    ways = [line for line in said.splitlines() if "rendezvous" in line or "zero-copy" in line or "fragment" in line]
    assert any(carrier in line for line in ways), said[-8000:]


def test_without_the_package() -> None:
    code = (
        "import sys; sys.modules['ucxx'] = None\n"
        "from zmqtasks.transports import get_transport\n"
        "try: get_transport('ucx')\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout
    assert said.startswith("AddressError")
    assert "zmqtasks[ucx]" in said
