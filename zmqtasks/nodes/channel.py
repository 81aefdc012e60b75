"""Ops over links between nodes: what scheduler, workers, nannies and clients use.

Control links are channels that survive a broken link (`open_channel` dials, `Acceptor` listens; see `session`). Data
links break for good, and the request is made again (`DataPool` asks, `DataServer` answers; see `data`, `data_asking`,
`data_server`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import msgspec

from zmqtasks.config import Config
from zmqtasks.errors import (
    AddressError,
    AuthenticationError,
    CommError,
    ProtocolError,
    SchedulerLostError,
    SecurityError,
    VersionMismatchError,
)
from zmqtasks.ids import InstanceId, SessionId, new_session_id
from zmqtasks.nodes.acceptor import Acceptor, Admission, Refusal
from zmqtasks.nodes.data import DataPool
from zmqtasks.nodes.data_asking import Fetched
from zmqtasks.nodes.data_server import DataServer
from zmqtasks.nodes.links import Dialed, PeerInfo, dial
from zmqtasks.nodes.session import Channel, ChannelHandler
from zmqtasks.nodes.versions import own_versions
from zmqtasks.protocol.frames import CONTROL_LIMITS
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.ops import Introduction
from zmqtasks.security import Security

__all__ = [
    "Acceptor",
    "Admission",
    "Channel",
    "ChannelHandler",
    "DataPool",
    "DataServer",
    "Fetched",
    "PeerInfo",
    "Refusal",
    "open_channel",
]

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


async def open_channel(
    address: str,
    introduction: Introduction,
    handler: ChannelHandler,
    *,
    incoming: Any,
    security: Security,
    config: Config,
    instance_id: InstanceId,
) -> Channel:
    """A channel to the acceptor at `address`, which keeps itself connected until it ends.

    `incoming` is the union of ops that the other side sends. The handler is called only after this has returned. When
    the link breaks it is dialled again, with growing pauses, until `config.grace_s` is over; then, or when the acceptor
    no longer knows the session, the handler gets `channel_ended(SchedulerLostError)`.

    Raises AddressError, SecurityError, ConnectError (refused, timed out, ...), VersionMismatchError or
    AuthenticationError; each names the address. After failure or cancellation nothing is left open.
    """
    session_id = new_session_id()
    request = LinkRequest(introduction, instance_id, session_id, versions=own_versions())
    dialed = await dial(address, request, security=security, config=config, limits=CONTROL_LIMITS)
    welcome = dialed.welcome
    redialer = _Redialer(address, request, dialed, security, config)
    channel = Channel(
        session_id=SessionId(welcome.session),
        peer_instance=InstanceId(welcome.instance),
        handler=handler,
        incoming=incoming,
        config=config,
        welcome=welcome,
        on_lost=redialer.link_lost,
        on_ended=redialer.channel_ended,
    )
    channel.number = welcome.number
    redialer.channel = channel
    for warning in welcome.warnings:
        _log.warning("%s", warning)
    channel.attach(dialed.comm, welcome.last_seq)
    asyncio.get_running_loop().call_soon(redialer.receive, dialed)
    return channel


class _Redialer:
    """Brings the link of one channel back."""

    channel: Channel

    def __init__(self, address: str, request: LinkRequest, dialed: Dialed, security: Security, config: Config) -> None:
        self._address = address
        self._request = msgspec.structs.replace(request, resuming=True, epoch=dialed.welcome.epoch)
        self._security = security
        self._config = config
        self._task: asyncio.Task[None] | None = None

    def receive(self, dialed: Dialed) -> None:
        """Lets the channel take over a comm's callbacks."""
        self.channel.receive(dialed.arrived.messages, dialed.arrived.ended)

    def link_lost(self, error: Exception) -> None:
        _log.info("the link to %s is lost (%s): dialling again for %g s", self._address, error, self._config.grace_s)
        self._task = asyncio.get_running_loop().create_task(self._bring_back(error))

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def _bring_back(self, cause: Exception) -> None:
        request = msgspec.structs.replace(self._request, last_seq=self.channel.last_seq)
        remaining_s = self._config.grace_s
        pause_s = 0.0
        last: Exception = cause
        loop = asyncio.get_running_loop()
        while remaining_s > 0:
            started = loop.time()
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(remaining_s):
                    dialed = await dial(
                        self._address, request, security=self._security, config=self._config, limits=CONTROL_LIMITS
                    )
            except (SchedulerLostError, AuthenticationError, VersionMismatchError, SecurityError, AddressError) as exc:
                self._give_up(exc)
                return
            except (CommError, ProtocolError, TimeoutError) as exc:
                last = exc
            else:
                self._resume(dialed)
                return
            # Time in which this process was stopped, or its loop busy, does not count against the other side.
            most_s = pause_s + self._config.connect_timeout_s + self._config.handshake_timeout_s
            remaining_s -= min(loop.time() - started, most_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)
        self._give_up(
            SchedulerLostError(
                f"the link to {self._address} did not come back within {self._config.grace_s:g} s (grace_s); "
                f"it was lost because: {cause}; the last attempt: {last}"
            )
        )

    def _resume(self, dialed: Dialed) -> None:
        welcome, channel = dialed.welcome, self.channel
        if not welcome.resumed or welcome.session != channel.session_id:
            dialed.comm.abort("given up")
            self._give_up(SchedulerLostError(f"{self._address} took this node for a new one instead of resuming"))
            return
        channel.attach(dialed.comm, welcome.last_seq)
        _log.info("the link to %s is back", self._address)
        channel.resumed()
        self.receive(dialed)

    def _give_up(self, error: Exception) -> None:
        if not isinstance(error, SchedulerLostError):
            lost = SchedulerLostError(f"the link to {self._address} could not be resumed: {error}")
            lost.__cause__ = error
            error = lost
        self.channel.give_up(error)
