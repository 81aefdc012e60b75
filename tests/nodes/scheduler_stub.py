"""A peer for workers and nannies: speaks the scheduler's side of real channels, and does only what the test says."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from zmqtasks.config import Config
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, Channel, PeerInfo
from zmqtasks.protocol.ops import (
    ComputeTasks,
    Introduction,
    NannyIntroduction,
    NannyToScheduler,
    Op,
    PutFunctions,
    WorkerIntroduction,
    WorkerToScheduler,
)
from zmqtasks.protocol.serialize import dumps_function
from zmqtasks.security import ClusterKey, Security

DEADLINE_S = 30.0
CONFIG = replace(Config(), metrics_interval_s=0.2, grace_s=1.0, termination_s=2.0)

OpT = TypeVar("OpT", bound=Op)


class Link:
    """One worker or nanny, seen by the scheduler."""

    def __init__(self, introduction: Introduction, instance: bytes) -> None:
        self.introduction: Any = introduction
        self.instance = instance
        self.channel: Channel
        self.ops: list[Op] = []
        self.ended = False
        self._changed = asyncio.Event()

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        self.ops.extend(ops)
        self._changed.set()

    def link_lost(self, channel: Channel, error: Exception) -> None: ...

    def link_resumed(self, channel: Channel) -> None: ...

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        self.ended = True
        self._changed.set()

    def send(self, *ops: Op) -> None:
        self.channel.send(ops)

    async def wait(self, condition: Callable[[], Any]) -> Any:
        """What `condition` gives once it is true; looked at after each message."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (value := condition()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"waited in vain; got {self.ops}") from None
        return value

    async def take(self, kind: type[OpT], where: Callable[[OpT], bool] = lambda _: True) -> OpT:
        """The first op of a kind, removed from what has come."""

        def find() -> OpT | None:
            return next((op for op in self.ops if isinstance(op, kind) and where(op)), None)

        op: OpT = await self.wait(find)
        self.ops.remove(op)
        return op

    def compute(self, function: Any, run_ids: list[int], **columns: Any) -> list[int | str]:
        """Sends a function with runs of it; keys are `k<run id>`."""
        data = dumps_function(function)
        digest = hashlib.sha256(data).digest()
        keys: list[int | str] = [f"k{run_id}" for run_id in run_ids]
        self.send(
            PutFunctions([digest], [data]),
            ComputeTasks(digest, "f", keys, run_ids, [0] * len(run_ids), **columns),
        )
        return keys


class SchedulerStub:
    """Takes workers and nannies in; `workers` and `nannies` in order of arrival."""

    def __init__(self, security: Security) -> None:
        self.security = security
        self.workers: list[Link] = []
        self.nannies: list[Link] = []
        self.changed = asyncio.Event()
        self._numbers = 0
        self._acceptor = Acceptor(
            security=security, config=CONFIG, epoch=1, instance_id=new_instance_id(), admit=self._admit
        )

    async def listen(self, address: str) -> str:
        return await self._acceptor.listen(address)

    def _admit(self, introduction: Introduction, peer: PeerInfo) -> Admission:
        link = Link(introduction, peer.instance_id)
        self._numbers += 1

        def opened(channel: Channel) -> None:
            link.channel = channel
            (self.workers if isinstance(introduction, WorkerIntroduction) else self.nannies).append(link)
            self.changed.set()

        incoming: Any = NannyToScheduler if isinstance(introduction, NannyIntroduction) else WorkerToScheduler
        return Admission(handler=link, incoming=incoming, number=self._numbers, opened=opened)

    async def wait_workers(self, count: int) -> list[Link]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.workers) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.workers

    async def close(self) -> None:
        for link in (*self.workers, *self.nannies):
            link.channel.abort("the stub ends")
        await self._acceptor.close()


@asynccontextmanager
async def scheduler(address: str = "tcp://127.0.0.1:0") -> AsyncIterator[tuple[SchedulerStub, str]]:
    """A stub that listens, and its address."""
    security = Security.none() if address.startswith("inproc") else Security(ClusterKey.generate())
    stub = SchedulerStub(security)
    try:
        yield stub, await stub.listen(address)
    finally:
        await stub.close()
