"""The nanny's control link: what the scheduler asks, and what it is told of worker processes.

Apart from `node`, because a nanny starts its worker processes before it loads what links need.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Protocol

from zmqtasks.config import Config
from zmqtasks.errors import CommError, SchedulerLostError
from zmqtasks.ids import InstanceId
from zmqtasks.nodes.channel import Channel, open_channel
from zmqtasks.nodes.nanny.memory import is_stopped
from zmqtasks.nodes.nanny.process import WorkerProcess
from zmqtasks.protocol.ops import (
    CallFinished,
    CallFunction,
    CheckWorker,
    Goodbye,
    NannyIntroduction,
    NannyToScheduler,
    Op,
    RestartWorkers,
    SchedulerToNanny,
    StopNanny,
    WorkerChecked,
    WorkerExited,
    WorkerStarted,
)
from zmqtasks.security import Security

logger = logging.getLogger(__name__)

_REMEMBERED_EXITS = 256


class Owner(Protocol):
    """What the link asks of its nanny."""

    workers: dict[bytes, WorkerProcess]

    def restart(self, instances: list[bytes]) -> None:
        """Ends worker processes in order to start new ones."""

    def end(self, error: Exception | None) -> None:
        """The nanny has nothing more to do."""


class ControlLink:
    """The channel of a nanny to its scheduler."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._exits: dict[bytes, WorkerExited] = {}

    async def open(
        self, address: str, name: str, *, security: Security, config: Config, instance_id: InstanceId
    ) -> None:
        """Connects; raises what `open_channel` raises."""
        self._channel = await open_channel(
            address,
            NannyIntroduction(name or f"nanny-{os.getpid()}", os.getpid(), socket.gethostname()),
            self,
            incoming=SchedulerToNanny,
            security=security,
            config=config,
            instance_id=instance_id,
        )

    async def close(self, reason: str) -> None:
        """Says goodbye."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close(reason)

    def worker_started(self, worker: WorkerProcess) -> None:
        """Tells of a new process."""
        self._send(WorkerStarted(worker.instance_id, worker.pid))

    def worker_exited(self, worker: WorkerProcess, restarting: bool) -> None:
        """Tells why a process has ended, and what it was executing."""
        report = WorkerExited(
            worker.instance_id,
            worker.exit_code,
            worker.cause,
            worker.executing,
            expected=worker.expected,
            restarting=restarting,
        )
        self._exits[worker.instance_id] = report
        if len(self._exits) > _REMEMBERED_EXITS:
            del self._exits[next(iter(self._exits))]
        self._send(report)

    def _send(self, op: NannyToScheduler) -> None:
        if self._channel is not None:
            with contextlib.suppress(CommError, SchedulerLostError):  # it has ended; channel_ended says the rest
                self._channel.send((op,))

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        """Does what the scheduler asks."""
        for op in ops:
            match op:
                case CheckWorker(instance):
                    self._check(instance)
                case RestartWorkers(instances):
                    self._owner.restart(instances or list(self._owner.workers))
                case StopNanny(reason):
                    logger.info("the nanny was told to end%s", f": {reason}" if reason else "")
                    self._owner.end(None)
                case CallFunction():
                    from zmqtasks.nodes.worker.calls import call_in_thread  # needs what opens user objects

                    call_in_thread(op, self._owner, "dask_nanny", self._call_finished)
                case Goodbye():
                    pass
                case _:
                    logger.error("the scheduler sent a %s to a nanny", type(op).__name__)

    def link_lost(self, channel: Channel, error: Exception) -> None:
        """Workers go on."""

    def link_resumed(self, channel: Channel) -> None:
        """Nothing was lost."""

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        """Without a scheduler there is nothing left to do."""
        if self._channel is not None:
            if error is not None:
                logger.error("the nanny ends: %s", error)
            self._owner.end(error)

    def _check(self, instance: bytes) -> None:
        worker = self._owner.workers.get(instance)
        if worker is not None:
            self._send(WorkerChecked(instance, is_stopped(worker.pid)))
        else:
            unknown = WorkerExited(instance, 0, "not a worker of this nanny", [])
            self._send(self._exits.get(instance, unknown))

    def _call_finished(self, answer: CallFinished) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._send, answer)
