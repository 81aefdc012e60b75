"""Strangers at the door: garbage of every kind never crashes a listener, hangs it, grows it, or gets anything unpickled.

`ZMQTASKS_FUZZ_CONNECTIONS` sets how many connections are made to each listener.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.links import CONFIG, Recorder, dial, run, until
from zmqtasks.errors import CommError, ZmqTasksError
from zmqtasks.ids import new_instance_id, new_session_id
from zmqtasks.nodes.channel import DataPool
from zmqtasks.nodes.links import link_settings
from zmqtasks.protocol import ops
from zmqtasks.protocol.handshake import ConnectorHandshake, LinkRequest
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports import registry
from zmqtasks.transports.stream import PREAMBLE

CONNECTIONS = int(os.environ.get("ZMQTASKS_FUZZ_CONNECTIONS", "1000"))
AT_ONCE = 32
PATIENCE_S = 0.5
"""How long a stranger waits for an answer before it hangs up."""
KEY = ClusterKey.generate()
MIB = 1 << 20

between_processes = pytest.mark.parametrize("scheme", ["tcp", "zmq"])


class Exploit:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Listener:
    """The process under test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()
        self.status = psutil.Process(process.pid)

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        with stream:
            lines.extend(iter(stream.readline, ""))

    def wait_for_address(self) -> str:
        deadline = time.monotonic() + 20
        while not any(line.startswith("listens at") for line in self.lines):
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.01)
        return self.lines[-1].split()[-1]

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(20) == 0, "".join(self.errors)
        finally:
            self.process.kill()
            self.process.wait()
            for reader in self._readers:
                reader.join()
        assert self.lines[-1] == "closed in good order\n"
        assert "Traceback" not in "".join(self.errors), "".join(self.errors)


@contextmanager
def listener_process(scheme: str) -> Iterator[tuple[Listener, str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.listener_process", scheme],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin is not None
    process.stdin.write(KEY.hex() + "\n")
    process.stdin.flush()
    listener = Listener(process)
    try:
        yield listener, listener.wait_for_address()
    finally:
        listener.finish()


async def raw(address: str, data: bytes, rng: random.Random) -> None:
    """A plain connection that sends bytes, maybe in pieces, and waits a moment for an answer."""
    host, _, port = address.partition("://")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        middle = rng.randrange(len(data) + 1)
        writer.write(data[:middle])
        await asyncio.sleep(0)
        writer.write(data[middle:])
        if rng.random() < 0.3:
            writer.transport.abort()
            return
        async with asyncio.timeout(PATIENCE_S * rng.random()):
            await writer.drain()
            while await reader.read(65536):
                pass
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


class Stranger:
    """Somebody with a good transport and bad messages."""

    def __init__(self) -> None:
        self.received: list[list[memoryview]] = []
        self.changed = asyncio.Event()
        self.ended = False

    def message_received(self, frames: list[memoryview]) -> None:
        self.received.append(frames)
        self.changed.set()

    def comm_ended(self, error: Exception) -> None:
        self.ended = True
        self.changed.set()


async def framed(address: str, messages: list[list[bytes]], rng: random.Random) -> None:
    """A comm that sends messages one after the other, each after an answer to the one before (or a while)."""
    comm = await registry.connect(address, link_settings(CONFIG, Security.none()))
    stranger = Stranger()
    comm.start(stranger)
    try:
        for message in messages:
            stranger.changed.clear()
            comm.send(message)
            async with asyncio.timeout(PATIENCE_S * rng.random()):
                await stranger.changed.wait()
    except (CommError, TimeoutError):
        pass
    finally:
        if rng.random() < 0.5:
            comm.abort()
        await comm.close()


def hello(role: ops.Introduction, key: ClusterKey = KEY, nonce: bytes = b"n" * 32) -> bytes:
    request = LinkRequest(role, new_instance_id(), new_session_id())
    return ConnectorHandshake(request, cluster_id=KEY.cluster_id, link_key=key.link_key, nonce=nonce).start()[0]


def shaken(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed) + 1)))])


def garbage(evil: bytes) -> list[Callable[[str, random.Random], Awaitable[None]]]:
    """Every kind of visit; each is one connection."""
    client, data = ops.ClientIntroduction("x", 1, "h"), ops.DataIntroduction("x")
    zmtp = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01NULL" + b"\0" * 48
    kinds: list[Callable[[random.Random], bytes]] = [
        lambda rng: rng.randbytes(rng.randrange(200)),
        lambda rng: b"",
        lambda rng: evil,
        lambda rng: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda rng: b"\x16\x03\x01\x02\x00\x01\x00" + rng.randbytes(500),
        lambda rng: PREAMBLE + rng.randbytes(rng.randrange(300)),
        lambda rng: PREAMBLE + b"\1\0\0\0" + b"\xff" * 12 + rng.randbytes(2000),
        lambda rng: PREAMBLE + b"\1\0\0\0\1\0\0\0" + (1 << rng.randrange(17, 62)).to_bytes(8, "little") + b"x" * 1000,
        lambda rng: PREAMBLE + b"\1\0\0\0\1\0\0\0" + len(evil).to_bytes(8, "little") + evil,
        lambda rng: zmtp + rng.randbytes(rng.randrange(300)),
        lambda rng: zmtp + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER" + rng.randbytes(100),
        lambda rng: zmtp + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x02\x7f" + b"\xff" * 7 + b"x" * 5000,
    ]
    visits: list[Callable[[random.Random], list[list[bytes]]]] = [
        lambda rng: [[rng.randbytes(rng.randrange(200))]],
        lambda rng: [[evil]] * 3,
        lambda rng: [[hello(client)], [evil], [evil, evil]],
        lambda rng: [[hello(data)], [rng.randbytes(75)], [evil]],
        lambda rng: [[shaken(hello(client), rng)], [shaken(hello(client), rng)]],
        lambda rng: [[hello(client)], [hello(client)]],
        lambda rng: [[hello(client)], [b"zmqtasks\0\1\3" + rng.randbytes(64)], [b"zmqtasks\0\1\5", evil]],
        lambda rng: [[b""] * rng.randrange(1, 200)],
        lambda rng: [[b"x" * rng.randrange(60_000, 2_000_000)]],
    ]

    def sends(make: Callable[[random.Random], bytes]) -> Callable[[str, random.Random], Awaitable[None]]:
        return lambda address, rng: raw(address, make(rng), rng)

    def visits_with(
        make: Callable[[random.Random], list[list[bytes]]],
    ) -> Callable[[str, random.Random], Awaitable[None]]:
        return lambda address, rng: framed(address, make(rng), rng)

    return [*map(sends, kinds), *map(visits_with, visits)]


async def good_client(address: str) -> None:
    """A node of the cluster comes in, is answered on both kinds of links, and leaves."""
    security = Security(KEY)
    mine = Recorder()
    channel = await dial(address, mine, security=security)
    channel.send([ops.WantKeys([5])])
    await until(lambda: mine.ops)
    await channel.close()
    pool = DataPool(security=security, config=CONFIG, instance_id=new_instance_id(), name="good")
    assert (await pool.get(address, ["x"])).missing == ["x"]
    await pool.close()


@between_processes
@pytest.mark.timeout(600)
def test_listener_outlives_garbage_and_nothing_is_unpickled(scheme: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("ZMQTASKS_FUZZ_SEED", "0")) or time.time_ns()
    print(f"seed {seed}")
    evil = pickle.dumps(Exploit(tmp_path / "exploited"))
    kinds = garbage(evil)

    async def visit(address: str, numbers: Iterator[int]) -> None:
        for number in numbers:
            rng = random.Random(seed + number)
            try:
                await kinds[number % len(kinds)](address, rng)
            except ZmqTasksError:
                pass  # turned away, in words

    async def flood(address: str, numbers: range) -> float:
        """Sends strangers, and nodes of the cluster among them; how long the slowest of those took."""
        each = iter(numbers)
        visitors = asyncio.gather(*(visit(address, each) for _ in range(AT_ONCE)))
        slowest = 0.0
        while not visitors.done():
            started = time.monotonic()
            await good_client(address)
            slowest = max(slowest, time.monotonic() - started)
            await asyncio.wait([visitors], timeout=0.2)
        await visitors
        await good_client(address)
        return slowest

    with listener_process(scheme) as (listener, address):
        first = CONNECTIONS // 5
        run(flood(address, range(first)))
        memory, descriptors = listener.status.memory_info().rss, listener.status.num_fds()
        slowest = run(flood(address, range(first, CONNECTIONS)))
        assert slowest < 5, "strangers must not keep nodes of the cluster waiting"
        grown = listener.status.memory_info().rss - memory
        assert grown < 32 * MIB, f"the listener grew by {grown / MIB:.0f} MiB"
        deadline = time.monotonic() + 20
        while listener.status.num_fds() > descriptors:
            assert time.monotonic() < deadline, "connections of strangers are still open"
            time.sleep(0.05)
        peak = peak_memory(listener.process.pid)
        assert peak < 400 * MIB, f"the listener took {peak / MIB:.0f} MiB"
    unpickled = [line for line in listener.lines if line.startswith("unpickled")]
    assert unpickled == ["unpickled posix.getcwd\n"], "only the listener's own, which shows that it would be seen"
    assert not (tmp_path / "exploited").exists()
    assert len(listener.errors) < 40 + CONNECTIONS / 20, "lines about strangers are limited"


def peak_memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")
