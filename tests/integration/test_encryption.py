"""What somebody on the network between two hosts sees of a cluster, and what nodes tell in their logs. One worker is on
another host (a network namespace)."""

from __future__ import annotations

import base64
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from zmq.utils import z85

from tests.shells import Shell
from zmqtasks import Client
from zmqtasks.security import Security, load_key
from zmqtasks.testing.netns import Cable, cable, can_make_namespaces
from zmqtasks.transports import derive
from zmqtasks.transports.tls_identity import certificate_of
from zmqtasks.transports.zeromq.curve import curve_keys

needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip and nft")

ARGUMENT = "the salaries of everybody in the company"
RESULT = "and the sum of them is 12345678901"
NAME = "add_up_salaries_in_secret"
EVERYTHING = 0x0003  # ETH_P_ALL


class Sniffer:
    """All that passes an interface, from the beginning to the end of the block."""

    def __init__(self, address: str) -> None:
        device = next(name for name, found in psutil.net_if_addrs().items() if any(a.address == address for a in found))
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERYTHING))
        self._sock.bind((device, 0))
        self._sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_RCVBUFFORCE", socket.SO_RCVBUF), 64 << 20)
        self._sock.settimeout(0.2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.seen = b""

    def _read(self) -> None:
        packets = []
        while True:
            try:
                packets.append(self._sock.recv(1 << 17))
            except TimeoutError:
                if self._over.is_set():
                    break
        self.seen = b"".join(packets)

    def __enter__(self) -> Sniffer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sock.close()


@contextmanager
def cluster(wire: Cable, protocol: str, key: Path, encryption: str, shells: list[Shell]) -> Iterator[Client]:
    """Scheduler and client here, a worker there; all log everything."""
    common = ["--key-file", str(key), "--log-level", "DEBUG", "--encryption", encryption]
    with ExitStack() as stack:
        scheduler = Shell("scheduler", "--host", wire.here, "--port", "0", "--protocol", protocol, *common)
        shells.append(stack.enter_context(scheduler))
        address = scheduler.wait_for(r"listens at (\S+?);?\s")[1]
        shells.append(stack.enter_context(Shell("worker", address, "--nthreads", "1", *common, prefix=wire.prefix)))
        with Client(address, timeout=30, security=Security(load_key(key), encryption)) as client:
            client.wait_for_workers(1, timeout=30)
            yield client
            client.shutdown()
        for shell in shells:
            shell.wait_exit()


def work(client: Client) -> None:
    """A task whose name, argument and result are small, and one of each that goes past the scheduler, and resists
    compression."""
    namespace: dict[str, object] = {}
    exec(f"def {NAME}(text):\n    return {RESULT!r} + text[::-1]", namespace)
    function = namespace[NAME]
    assert client.submit(function, ARGUMENT, key=NAME).result(timeout=30) == RESULT + ARGUMENT[::-1]
    large = ARGUMENT + base64.b64encode(os.urandom(300_000)).decode()
    assert client.submit(function, large).result(timeout=30) == RESULT + large[::-1]


@needs_namespaces
@pytest.mark.parametrize("encryption", ["auto", "off"])
@pytest.mark.parametrize("protocol", ["tcp", "zmq"])
def test_nobody_on_the_way_reads_and_no_log_has_the_key(protocol, encryption, tmp_path, caplog):
    """With --encryption off the same words are found on the wire: the sniffer does see."""
    caplog.set_level(logging.DEBUG)
    key_file = tmp_path / "keys" / "cluster.key"
    shells: list[Shell] = []
    with (
        cable() as wire,
        Sniffer(wire.here) as sniffer,
        cluster(wire, protocol, key_file, encryption, shells) as client,
    ):
        work(client)
    assert len(sniffer.seen) > 600_000
    for words in (ARGUMENT, RESULT, NAME, "salaries"):
        assert (words.encode() in sniffer.seen) == (encryption == "off"), words

    assert f"made the cluster key {key_file}" in shells[0].output
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    printed = "".join(shell.output for shell in shells) + caplog.text
    assert "DEBUG" in printed
    assert ("links are not encrypted" in printed) == (encryption == "off")
    for secret in secrets_of(key_file):
        for shown in (
            secret,
            secret.hex().encode(),
            base64.b64encode(secret).rstrip(b"="),
            repr(secret)[2:-1].encode(),
        ):
            assert shown not in printed.encode()
            assert shown not in sniffer.seen


def secrets_of(key_file: Path) -> list[bytes]:
    key = load_key(key_file)
    tls = derive.derive_key(key.encryption_secret, b"zmqtasks tls identity v1")
    curve = curve_keys(key.encryption_secret)
    own = [bytes.fromhex(key.hex()), key.link_key, key.encryption_secret, tls]
    return [*own, z85.decode(curve.listener_secret), z85.decode(curve.caller_secret)]


@needs_namespaces
def test_a_worker_that_does_not_encrypt_is_told(tmp_path):
    key = tmp_path / "cluster.key"
    with cable() as wire, Shell("scheduler", "--host", wire.here, "--port", "0", "--key-file", str(key)) as scheduler:
        address = scheduler.wait_for(r"listens at (\S+?);?\s")[1]
        options = ("--key-file", str(key), "--encryption", "off", "--no-nanny")
        with Shell("worker", address, *options, prefix=wire.prefix) as worker:
            worker.wait_for(f"{re.escape(address)} .*--encryption must be the same")
            assert worker.wait_exit() == 1
        scheduler.wait_for("turned a connection away: .*--encryption must be the same on all nodes")


@needs_namespaces
def test_a_scheduler_file_says_who_encrypts(tmp_path):
    """Neither worker nor client needs another word."""
    file = tmp_path / "scheduler.json"
    key = ("--key-file", str(tmp_path / "cluster.key"))
    with (
        cable() as wire,
        Shell(
            *("scheduler", "--host", wire.here, "--port", "0", "--encryption", "off", "--scheduler-file", str(file)),
            *key,
        ) as scheduler,
    ):
        scheduler.wait_for("listens at")
        with (
            Shell("worker", "--scheduler-file", str(file), "--nthreads", "1", prefix=wire.prefix),
            Sniffer(wire.here) as sniffer,
            Client(scheduler_file=file, timeout=30) as client,
        ):
            client.wait_for_workers(1, timeout=30)
            work(client)
            client.shutdown()
        assert ARGUMENT.encode() in sniffer.seen


def test_the_certificate_is_what_key_show_tells(tmp_path):
    import hashlib
    import subprocess
    import sys

    file = tmp_path / "cluster.key"
    for arguments in (["new"], ["show"]):
        done = subprocess.run(
            [sys.executable, "-m", "zmqtasks", "key", *arguments, str(file)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    secret = load_key(file).encryption_secret
    assert hashlib.sha256(certificate_of(secret)).hexdigest() in done.stdout
