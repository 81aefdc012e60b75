"""What tests of links share: a loop to run in, a recording handler, an acceptor, and wires that can be cut and mended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from zmqtasks.config import Config
from zmqtasks.errors import ConnectionRefusedByPeerError
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, Channel, DataServer, PeerInfo, Refusal, open_channel
from zmqtasks.protocol import ops
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports import registry
from zmqtasks.transports.base import Comm, LinkSettings
from zmqtasks.transports.inproc import InprocTransport

T = TypeVar("T")

SCHEMES = ["tcp", "zmq", "inproc"]
LISTEN = {
    "tcp": "tcp://127.0.0.1:0",
    "zmq": "zmq://127.0.0.1:0",
    "inproc": "inproc://links-test",
    "unix": "unix://",
    "shm": "shm://",
}
SECURITY = Security(ClusterKey.generate())
CONFIG = Config(connect_timeout_s=5, handshake_timeout_s=5, heartbeat_s=5, grace_s=10)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on a loop of its own, and fails when it leaves a task behind."""

    async def checked() -> T:
        result = await main
        await until(lambda: len(asyncio.all_tasks()) == 1, lambda: f"tasks left behind: {asyncio.all_tasks()}")
        return result

    return uvloop.run(checked())


async def until(
    condition: Callable[[], object], describe: Callable[[], object] = lambda: "", timeout_s: float = 20
) -> None:
    """Waits until `condition()` holds; fails after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {describe()}"
        await asyncio.sleep(0.002)


class Recorder:
    """A channel handler that keeps what it was told."""

    def __init__(self, on_ops: Callable[[Channel, list[Any]], None] | None = None) -> None:
        self.ops: list[Any] = []
        self.events: list[str] = []
        self.end: list[Exception | None] = []
        self.channel: Channel | None = None
        self._on_ops = on_ops

    def opened(self, channel: Channel) -> None:
        assert self.channel is None
        self.channel = channel

    def ops_received(self, channel: Channel, ops: list[Any]) -> None:
        assert not self.end, "ops after the end"
        self.ops += ops
        if self._on_ops is not None:
            self._on_ops(channel, ops)

    def link_lost(self, channel: Channel, error: Exception) -> None:
        assert not channel.connected
        self.events.append("lost")

    def link_resumed(self, channel: Channel) -> None:
        assert channel.connected
        self.events.append("resumed")

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        assert channel.ended
        self.events.append("ended")
        self.end.append(error)

    async def ended(self) -> Exception | None:
        """Waits for the end of the channel; what it ended with."""
        await until(lambda: self.end, lambda: self.events)
        (error,) = self.end
        return error


class Node:
    """An accepting node: each control link gets a `Recorder`, data links get `data_server`."""

    def __init__(
        self,
        *,
        config: Config = CONFIG,
        security: Security = SECURITY,
        epoch: int = 1,
        data_server: DataServer | None = None,
        make: Callable[[], Recorder] = Recorder,
    ) -> None:
        self.config = config
        self.recorders: list[Recorder] = []
        self.peers: list[PeerInfo] = []
        self.refusal = ""
        self._data_server = data_server
        self._make = make
        self.acceptor = Acceptor(
            security=security, config=config, epoch=epoch, instance_id=new_instance_id(), admit=self._admit
        )

    @property
    def channel(self) -> Channel:
        """The accepted end of the latest control link."""
        channel = self.recorders[-1].channel
        assert channel is not None
        return channel

    def _admit(self, introduction: ops.Introduction, peer: PeerInfo) -> Admission | Refusal:
        self.peers.append(peer)
        if self.refusal:
            return Refusal(self.refusal)
        if isinstance(introduction, ops.DataIntroduction):
            return Admission(data_handler=self._data_server)
        recorder = self._make()
        self.recorders.append(recorder)
        return Admission(recorder, ops.ClientToScheduler, number=len(self.recorders), opened=recorder.opened)

    async def close(self) -> None:
        await self.acceptor.close()
        for channel in self.acceptor.channels:
            channel.abort("the test is over")
        if self._data_server is not None:
            await self._data_server.close()


@contextlib.asynccontextmanager
async def listening(scheme: str, **settings: Any) -> AsyncIterator[tuple[Node, str]]:
    """A node that listens, and its address."""
    node = Node(**settings)
    try:
        yield node, await node.acceptor.listen(LISTEN[scheme])
    finally:
        await node.close()


async def dial(address: str, handler: Any, *, config: Config = CONFIG, security: Security = SECURITY) -> Channel:
    """A channel as a client makes it."""
    return await open_channel(
        address,
        ops.ClientIntroduction("test", 1, "here"),
        handler,
        incoming=ops.SchedulerToClient,
        security=security,
        config=config,
        instance_id=new_instance_id(),
    )


class Wire:
    """A way to a listener that can be cut and mended; `address` is where to dial."""

    address: str

    def cut(self) -> None:
        """Breaks every link, and makes new ones impossible."""
        raise NotImplementedError

    def mend(self) -> None:
        """Makes new links possible again."""
        raise NotImplementedError


@contextlib.asynccontextmanager
async def wire_to(address: str) -> AsyncIterator[Wire]:
    """A wire to a listener: a proxy for links over sockets, else a transport that can be told to break."""
    scheme, _, rest = address.partition("://")
    if scheme == "inproc":
        with _inproc_wire(address) as inproc:
            yield inproc
        return
    host, _, port = rest.rpartition(":")
    proxy = _Proxy(host, int(port))
    server = await asyncio.get_running_loop().create_server(lambda: _Half(proxy), "127.0.0.1", 0)
    proxy.address = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        proxy.cut()
        server.close()
        await server.wait_closed()


class _Proxy(Wire):
    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.broken = False
        self.halves: set[_Half] = set()

    def cut(self) -> None:
        self.broken = True
        for half in list(self.halves):
            half.abort()

    def mend(self) -> None:
        self.broken = False


class _Half(asyncio.Protocol):
    """One of the two connections that make a proxied one."""

    def __init__(self, proxy: _Proxy, other: _Half | None = None) -> None:
        self._proxy = proxy
        self._other = other
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._task: asyncio.Task[Any] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._proxy.broken:
            transport.abort()
            return
        self._proxy.halves.add(self)
        if self._other is None:
            self._other = _Half(self._proxy, self)
            self._task = asyncio.get_running_loop().create_task(self._connect(self._other))
        else:
            for data in self._other._early:
                transport.write(data)

    async def _connect(self, other: _Half) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, self._proxy.host, self._proxy.port)
        except OSError:
            self.abort()

    def data_received(self, data: bytes) -> None:
        assert self._other is not None
        if self._other._transport is None:
            self._early.append(data)
        else:
            self._other._transport.write(data)

    def pause_writing(self) -> None:
        if self._other is not None and self._other._transport is not None:
            self._other._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and self._other._transport is not None:
            self._other._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.halves.discard(self)
        if self._other is not None:
            self._other.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


@contextlib.contextmanager
def _inproc_wire(address: str) -> Any:
    class CuttableTransport(InprocTransport, Wire):
        """The in-process transport, with links that break on command."""

        def __init__(self) -> None:
            super().__init__()
            self.address = address
            self.broken = False
            self.comms: list[Comm] = []

        async def connect(self, address: str, settings: LinkSettings) -> Comm:
            if self.broken:
                raise ConnectionRefusedByPeerError(f"{address} is cut off")
            comm = await super().connect(address, settings)
            self.comms.append(comm)
            return comm

        def cut(self) -> None:
            self.broken = True
            for comm in self.comms:
                comm.abort("cut")
            self.comms.clear()

        def mend(self) -> None:
            self.broken = False

    original = registry.get_transport("inproc")
    wire = CuttableTransport()
    registry.register_transport(wire)
    try:
        yield wire
    finally:
        wire.cut()
        registry.register_transport(original)
