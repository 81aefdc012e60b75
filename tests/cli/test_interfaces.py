"""`--interface`: nodes listen at the address of a network interface."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.shells import Shell, start_scheduler
from zmqtasks import Client
from zmqtasks.cli.interfaces import interface_address, interface_host
from zmqtasks.errors import ConfigError
from zmqtasks.testing.netns import cable, can_make_namespaces


def test_scheduler_and_workers_listen_there():
    scheduler, address = start_scheduler("--interface", "lo")
    with scheduler:
        assert address.startswith("tcp://127.0.0.1:")
        with (
            Shell("worker", address, "--interface", "lo", "--nworkers", "1", "--nthreads", "1"),
            Shell("worker", address, "--interface", "lo", "--protocol", "zmq", "--no-nanny", "--nthreads", "1"),
            Client(address, timeout=30, set_as_default=False) as client,
        ):
            client.wait_for_workers(2, timeout=30)
            there = sorted(each.rpartition(":")[0] for each in client.scheduler_info()["workers"])
            assert there == ["tcp://127.0.0.1", "zmq://127.0.0.1"]
            client.shutdown()


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip and nft")
def test_the_address_of_an_interface():
    with cable() as wire:
        device = wire.name.replace("ztasks-", "zt") + "a"
        assert interface_host(device) == wire.here
        assert interface_address(device, None, "tcp://10.0.0.1:8786") == f"tcp://{wire.here}:0"
        assert interface_address(device, "zmq", "unix://x") == f"zmq://{wire.here}:0"
        # IPv6 where there is no IPv4, and link-local addresses are none.
        subprocess.run(["ip", "addr", "flush", "dev", device], check=True)
        with pytest.raises(ConfigError, match="no address"):
            interface_host(device)
        subprocess.run(["ip", "addr", "add", "fd00:7a::1/64", "dev", device, "nodad"], check=True)
        assert interface_address(device, "tcp", "unix://x") == "tcp://[fd00:7a::1]:0"


@pytest.mark.parametrize("command", [("scheduler", "--port", "0"), ("worker", "tcp://127.0.0.1:1")])
def test_an_interface_that_does_not_exist_is_named_with_those_that_do(command):
    done = subprocess.run(
        [sys.executable, "-m", "zmqtasks", *command, "--interface", "ib7"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "ib7: it does not exist here" in done.stderr
    assert "lo (127.0.0.1)" in done.stderr


def test_unix_uses_no_interface():
    with pytest.raises(ConfigError, match="unix uses no network interface"):
        interface_address("lo", None, "unix://somewhere")
