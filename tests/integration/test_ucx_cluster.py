"""A cluster whose links are ucx: in a process of its own, as UCX keeps descriptors and threads for the rest of one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

installed = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: pip install 'zmqtasks[ucx]'"
)
UCX = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "ZMQTASKS_SHARED_MEMORY": "0"}
TRUSTING = {"ZMQTASKS_ENCRYPTION": "off"}
"""Without shared memory, which nodes of one host take otherwise."""


@installed
def test_arrays_go_between_workers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **UCX, **TRUSTING, "UCX_PROTO_INFO": "y", "UCX_LOG_FILE": str(tmp_path / "ucx-%p.log")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all is right" in done.stdout
    # What UCX says of a worker's sends: large frames went by it, and not on the stream.
    said = [line for file in tmp_path.glob("ucx-*.log") for line in file.read_text().splitlines()]
    assert any("rendezvous" in line and "tcp/lo" in line for line in said), said[-50:]


PROGRAM = """
import numpy as np
from zmqtasks import Client, LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol="ucx") as cluster, Client(cluster) as client:
        workers = sorted(client.scheduler_info()["workers"])
        assert len(workers) == 2 and all(address.startswith("ucx://127.0.0.1:") for address in workers), workers
        made = client.submit(np.arange, 4_000_000, workers=[workers[0]])
        total = client.submit(np.sum, made, workers=[workers[1]])
        assert int(total.result(30)) == 7999998000000
        assert np.array_equal(made.result(30), np.arange(4_000_000))
    print("all is right")
"""


@pytest.mark.parametrize("command", ["scheduler", "worker"])
def test_without_the_package_the_extra_is_named(command: str, tmp_path: Path) -> None:
    arguments = ["--port", "0"] if command == "scheduler" else ["ucx://127.0.0.1:1"]
    code = "import sys; sys.modules['ucxx'] = None; from zmqtasks.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--protocol", "ucx", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "zmqtasks[ucx]" in done.stdout
    assert "Traceback" not in done.stdout


@installed
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_only_without_encryption(host: str) -> None:
    """Also on loopback: UCX's own sockets listen at all addresses, and take anybody at his word."""
    code = "from zmqtasks.cli.main import main; import sys; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "scheduler", "--protocol", "ucx", "--host", host, "--port", "0"],
        env={**os.environ, **UCX},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "--encryption off" in done.stdout
