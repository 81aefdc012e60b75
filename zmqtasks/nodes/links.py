"""Making a link: dial an address, shake hands, hand over the comm; and what nodes tell each other of themselves."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field, replace

from zmqtasks.config import Config
from zmqtasks.errors import (
    AuthenticationError,
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    ProtocolError,
    SecurityError,
    ZmqTasksError,
)
from zmqtasks.ids import InstanceId, SessionId
from zmqtasks.nodes.nearby import nearby_address
from zmqtasks.protocol.frames import HELLO_LIMITS, Frames, Limits
from zmqtasks.protocol.handshake import NONCE_BYTES, ConnectorHandshake, LinkRequest, Role, Welcome
from zmqtasks.protocol.ops import DataIntroduction
from zmqtasks.security import Security
from zmqtasks.transports import registry
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Comm, LinkSettings, Transport

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What an acceptor knows of a node that has proven the cluster key."""

    role: Role
    address: str
    instance_id: InstanceId
    session_id: SessionId
    versions: dict[str, str]
    warnings: list[str]
    """Versions that differ, one line for people; also sent to the peer."""
    crosses_processes: bool
    """False: the peer lives in this process."""


@dataclass(slots=True)
class Dialed:
    """A comm whose handshake is done and whose receiving is paused, with what has come after the welcome."""

    comm: Comm
    welcome: Welcome
    arrived: Arrived


@dataclass(slots=True)
class Arrived:
    """What a comm delivered before its new handler took over: to be handled first."""

    messages: list[list[memoryview]] = field(default_factory=list)
    ended: Exception | None = None


async def dial(address: str, request: LinkRequest, *, security: Security, config: Config, limits: Limits) -> Dialed:
    """Connects to the acceptor at `address` and shakes hands.

    Raises AddressError, SecurityError, ConnectError (refused, timed out, ...), VersionMismatchError,
    AuthenticationError, SchedulerLostError (a session that cannot be resumed); each names the address. After failure
    or cancellation nothing is left open.

    A data link goes through shared memory instead when the node is on this host and offers it; when that comes to
    nothing, in half the time allowed, it is dialed at its address.
    """
    if isinstance(request.introduction, DataIntroduction) and (nearby := nearby_address(address, config)):
        try:
            return await _dial(nearby, request, security, _with_half_the_time(config), limits)
        except (ConnectError, ProtocolError, AuthenticationError) as exc:
            if not isinstance(exc, ConnectionRefusedByPeerError):
                _log.info("no shared memory for data of %s: %s", address, exc)
    return await _dial(address, request, security, config, limits)


def _with_half_the_time(config: Config) -> Config:
    """For a first way that may come to nothing, and leaves the other its time."""
    return replace(
        config, connect_timeout_s=config.connect_timeout_s / 2, handshake_timeout_s=config.handshake_timeout_s / 2
    )


async def _dial(address: str, request: LinkRequest, security: Security, config: Config, limits: Limits) -> Dialed:
    scheme, _ = split_scheme(address)
    transport = registry.get_transport(scheme)
    identity = security.link_identity(address, transport.capabilities.crosses_processes)
    comm = await transport.connect(address, link_settings_at(address, transport, config, security))
    handshake = ConnectorHandshake(
        request,
        cluster_id=identity.cluster_id,
        link_key=identity.link_key,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    greeter = _Greeter(comm, address, handshake, limits)
    try:
        async with asyncio.timeout(config.handshake_timeout_s):
            await greeter.finished
    except TimeoutError:
        comm.abort("given up on")
        raise ConnectTimeoutError(
            f"{address} took the connection and did not finish the handshake within {config.handshake_timeout_s:g} s: "
            f"is it a zmqtasks node, and is it overloaded?"
        ) from None
    except asyncio.CancelledError:
        comm.abort("given up on")
        raise
    except ZmqTasksError:
        await comm.close()
        raise
    welcome = handshake.welcome
    assert welcome is not None
    return Dialed(comm, welcome, greeter.arrived)


class _Greeter:
    """Drives the connecting side's handshake from the comm's callbacks, and holds what comes after it."""

    def __init__(self, comm: Comm, address: str, handshake: ConnectorHandshake, limits: Limits) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrived = Arrived()
        self._comm = comm
        self._address = address
        self._handshake = handshake
        self._limits = limits
        comm.start(self)
        self._send(handshake.start())

    def message_received(self, frames: list[memoryview]) -> None:
        if self.finished.done():
            if self._handshake.done:
                self.arrived.messages.append(frames)
            return
        try:
            answer = self._handshake.receive(frames)
        except ZmqTasksError as exc:
            self._fail(_with_address(exc, self._address))
            return
        if answer is not None:
            self._send(answer)
            return
        # In this very callback: what follows the welcome may already be in the receive buffer.
        self._comm.set_limits(self._limits)
        self._comm.pause_receiving()
        self.finished.set_result(None)

    def comm_ended(self, error: Exception) -> None:
        self.arrived.ended = error
        if self.finished.done():
            return
        if isinstance(error, ProtocolError):
            self._fail(ConnectError(f"{self._address} is not a zmqtasks node: {error}"))
        else:
            self._fail(ConnectionRefusedByPeerError(f"{self._address} hung up during the handshake: {error}"))

    def _fail(self, error: Exception) -> None:
        if farewell := self._handshake.farewell:
            self._send(farewell)
        self.finished.set_exception(error)

    def _send(self, frames: Frames) -> None:
        try:
            self._comm.send(frames)
        except CommError:
            pass  # comm_ended is on its way


def link_settings(config: Config, security: Security) -> LinkSettings:
    """The transports' settings for a node with this configuration: tiny limits until the handshake is done."""
    return LinkSettings(
        connect_timeout_s=config.connect_timeout_s,
        heartbeat_s=config.heartbeat_s,
        limits=HELLO_LIMITS,
        encryption=security.link_encryption(config.encryption),
    )


def link_settings_at(address: str, transport: Transport, config: Config, security: Security) -> LinkSettings:
    """`link_settings` for one address; raises SecurityError when links there would have to be encrypted, and cannot be.

    That `unix` and its like never leave the host is taken from what they are. Of a transport that leaves it and does not
    encrypt, no address is safe: UCX listens by itself, at all of them, whatever the address of the link is.
    """
    settings = link_settings(config, security)
    able = transport.capabilities
    if able.crosses_hosts and not able.encrypts and settings.encryption.secret is not None:
        raise SecurityError(
            f"{address}: {transport.scheme} does not encrypt: use tcp, or, if everybody who reaches this host is trusted, "
            f"--encryption off (ZMQTASKS_ENCRYPTION=off)"
        )
    return settings


def _with_address(error: ZmqTasksError, address: str) -> ZmqTasksError:
    return type(error)(f"{address}: {error}")
