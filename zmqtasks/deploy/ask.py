"""One question to a scheduler, without the weight of a client."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import msgspec

from zmqtasks.config import Config
from zmqtasks.errors import RemoteProtocolError, TaskTimeoutError, ZmqTasksError
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Channel, open_channel
from zmqtasks.protocol.ops import ClientIntroduction, Op, Query, QueryAnswered, SchedulerToClient
from zmqtasks.security import Security

REQUEST = 1


class _Asker:
    """Waits for the one answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[QueryAnswered] = asyncio.get_running_loop().create_future()

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        for op in ops:
            if isinstance(op, QueryAnswered) and op.request == REQUEST and not self.answer.done():
                self.answer.set_result(op)

    def link_lost(self, channel: Channel, error: Exception) -> None:
        self.channel_ended(channel, error)

    def link_resumed(self, channel: Channel) -> None:
        pass

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(error or ZmqTasksError("the scheduler left before it answered"))


async def ask(address: str, what: str, *, security: Security, config: Config, timeout_s: float = 10.0) -> Any:
    """The answer to a query (see `nodes.scheduler.queries`).

    Raises ConnectError and its like when there is no scheduler at `address`, TaskTimeoutError when it does not answer.
    """
    asker = _Asker()
    channel = await open_channel(
        address,
        ClientIntroduction("a question", os.getpid(), socket.gethostname()),
        asker,
        incoming=SchedulerToClient,
        security=security,
        config=config,
        instance_id=new_instance_id(),
    )
    try:
        channel.send([Query(REQUEST, what)])
        answered = await asyncio.wait_for(asker.answer, timeout_s)
    except TimeoutError:
        raise TaskTimeoutError(f"the scheduler at {address} did not answer within {timeout_s:g} s") from None
    finally:
        await channel.close()
    if answered.error:
        raise RemoteProtocolError(f"the scheduler at {address} cannot answer {what!r}: {answered.error}")
    return msgspec.msgpack.decode(answered.answer, strict=False)
