"""The listening side of links: strangers knock, nodes of the cluster come in, lost channels resume.

Everything before the proof of the cluster key is bounded: the size of messages by the comm's limits, the time by
`handshake_timeout_s`, the number of half-open handshakes by `HALF_OPEN` (the oldest goes first, so that strangers who
say nothing never keep nodes out), the log by a line rate. No coroutine or task exists per stranger while it is inside.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zmqtasks.config import Config
from zmqtasks.errors import CommError, ConfigError, ZmqTasksError
from zmqtasks.ids import InstanceId, SessionId
from zmqtasks.nodes.links import PeerInfo, link_settings_at
from zmqtasks.nodes.session import Channel, ChannelHandler
from zmqtasks.nodes.versions import own_versions, same_python, version_warnings
from zmqtasks.protocol.compression import check_mode, own_codecs
from zmqtasks.protocol.frames import CONTROL_LIMITS, DATA_LIMITS, Frames
from zmqtasks.protocol.handshake import (
    NONCE_BYTES,
    AcceptorHandshake,
    LinkRequest,
    RefusalCode,
    Role,
    Welcome,
    role_of,
)
from zmqtasks.protocol.ops import DataIntroduction, Introduction
from zmqtasks.security import LinkIdentity, Security
from zmqtasks.transports import registry
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Comm, Listener

_log = logging.getLogger(__name__)

HALF_OPEN = 4096
"""More handshakes at the same time than any cluster that starts at once brings, at some KiB each."""
CLOSINGS = 1024
"""Peers being told why they were turned away; more are turned away without a word."""
REMEMBERED_ENDS = 1024
LINES_PER_PERIOD = 10
PERIOD_S = 10.0


class DataHandler(Protocol):
    """What takes over data links, as `DataServer` does."""

    def serve(self, comm: Comm, theirs: Sequence[str] = (), compression: str = "auto") -> None:
        """A comm whose handshake is done; see `DataServer.serve`."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A new node may come in.

    For a control link: `handler` gets its ops (`incoming`: their union), `number` is what the node is told that it is
    called, and `opened` gets the channel before anything comes from it. For a data link: `data_handler` serves it.
    """

    handler: ChannelHandler | None = None
    incoming: Any = None
    number: int = 0
    opened: Callable[[Channel], None] | None = None
    data_handler: DataHandler | None = None
    warnings: tuple[str, ...] = ()
    """Lines for people at the other end."""
    setups: int = 0
    """See `Welcome`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A new node may not come in; the reason is told to it."""

    reason: str


Admit = Callable[[Introduction, PeerInfo], Admission | Refusal]


class Acceptor:
    """Listens at one or more addresses; hands new nodes to `admit`, and broken channels back to their sessions.

    A channel whose link is lost is kept until its owner calls `forget` or `Channel.abort`, or more than
    `config.replay_bytes` wait for it.
    """

    def __init__(
        self, *, security: Security, config: Config, epoch: int, instance_id: InstanceId, admit: Admit
    ) -> None:
        """Raises ConfigError when this node lacks what `config` asks for."""
        check_mode(config.compression)
        self._security = security
        self._config = config
        self._epoch = epoch
        self._instance_id = instance_id
        self._admit = admit
        self._listeners: list[Listener] = []
        self._sessions: dict[bytes, Channel] = {}
        self._ends: OrderedDict[bytes, str] = OrderedDict()
        self._inside: OrderedDict[_Entrance, None] = OrderedDict()
        self._closings: set[asyncio.Task[None]] = set()
        self._strangers = _LineRate()
        self._closed = False

    @property
    def addresses(self) -> list[str]:
        """Where it listens, in the order of `listen`."""
        return [listener.address for listener in self._listeners]

    @property
    def channels(self) -> list[Channel]:
        """Channels that have not ended, with or without a link at the moment."""
        return list(self._sessions.values())

    async def listen(self, address: str) -> str:
        """Listens at `address` too; returns it with the real port.

        Raises AddressError, ConnectError (taken, not of this host), SecurityError (no key, and others can reach it).
        """
        scheme, _ = split_scheme(address)
        transport = registry.get_transport(scheme)
        crosses = transport.capabilities.crosses_processes
        identity = self._security.link_identity(address, crosses)

        def on_comm(comm: Comm) -> None:
            self._on_comm(comm, identity, crosses)

        settings = link_settings_at(address, transport, self._config, self._security)
        listener = await transport.listen(address, on_comm, settings)
        self._listeners.append(listener)
        return listener.address

    def forget(self, session_id: SessionId, reason: str = "its grace time is over") -> None:
        """Ends the session: its channel is aborted, and the node is refused with the reason when it dials again."""
        if channel := self._sessions.get(session_id):
            channel.abort(reason)
            self._ends[session_id] = reason

    async def close(self) -> None:
        """Stops listening, turns away who is in the handshake; channels live on, but can't resume. Idempotent."""
        self._closed = True
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()
        self._clear_entrances()
        if self._closings:
            await asyncio.wait(self._closings)
        self._strangers.flush()

    def stop(self) -> None:
        """Like `close`, without waiting; over transports whose listeners can stop so only."""
        self._closed = True
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.stop()
        self._clear_entrances()

    # -- handshakes

    def _clear_entrances(self) -> None:
        for entrance in list(self._inside):
            entrance.drop("the node is closing")

    def _on_comm(self, comm: Comm, identity: LinkIdentity, crosses_processes: bool) -> None:
        if self._closed:
            comm.abort("refused")
            return
        entrance = _Entrance(self, comm, identity, crosses_processes)
        self._inside[entrance] = None
        if len(self._inside) > HALF_OPEN:
            oldest = next(iter(self._inside))
            oldest.drop(f"{HALF_OPEN} handshakes are under way")
        entrance.begin(self._config.handshake_timeout_s)

    def left(self, entrance: _Entrance) -> None:
        """A handshake is over, one way or the other."""
        self._inside.pop(entrance, None)

    def note_stranger(self, address: str, reason: str) -> None:
        """One line about a peer that did not get in."""
        self._strangers.warning(f"turned away {address}: {reason}")

    def close_soon(self, comm: Comm) -> None:
        """Closes a comm after what was sent is out; with many of them under way, at once."""
        if len(self._closings) >= CLOSINGS:
            comm.abort("turned away")
            return
        task = asyncio.get_running_loop().create_task(_close_and_abort(comm))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    # -- admission

    def introduced(self, request: LinkRequest, comm: Comm, handshake: AcceptorHandshake, crosses: bool) -> str:
        """Decides about a node that holds the key; returns why it was refused, empty when it was taken."""
        role = role_of(request.introduction)
        if role is not Role.DATA and request.resuming:
            return self._resume(request, comm, handshake)
        if request.session in self._sessions:
            return _refuse(comm, handshake, RefusalCode.PROTOCOL, "its session exists, and it does not ask to resume")
        ours = own_versions()
        warnings = version_warnings(f"the {role.name.lower()} {request.introduction.name}", request.versions, ours)
        if not self._config.allow_other_python and not same_python(request.versions, ours):
            return _refuse(comm, handshake, RefusalCode.NOT_ADMITTED, f"{warnings[0]} (allow_other_python is off)")
        peer = PeerInfo(
            role=role,
            address=comm.peer_address,
            instance_id=InstanceId(request.instance),
            session_id=SessionId(request.session),
            versions=request.versions,
            warnings=warnings,
            crosses_processes=crosses,
        )
        admission = self._admit(request.introduction, peer)
        if isinstance(admission, Refusal):
            return _refuse(comm, handshake, RefusalCode.NOT_ADMITTED, admission.reason)
        if role is not Role.DATA:
            for warning in warnings:
                _log.warning("%s", warning)
        self._take(request, peer, admission, comm, handshake)
        return ""

    def _take(
        self, request: LinkRequest, peer: PeerInfo, admission: Admission, comm: Comm, handshake: AcceptorHandshake
    ) -> None:
        warnings = [*peer.warnings, *admission.warnings]
        welcome = self._welcome(request, admission.number, warnings, setups=admission.setups)
        if peer.role is Role.DATA:
            if admission.data_handler is None:
                raise ConfigError("admit() took a data link and named no data_handler for it")
            _send(comm, handshake.accept(welcome))
            comm.set_limits(DATA_LIMITS)
            introduction = request.introduction
            theirs = introduction.codecs if isinstance(introduction, DataIntroduction) else []
            admission.data_handler.serve(comm, theirs, self._config.compression)
            return
        if admission.handler is None or admission.incoming is None:
            raise ConfigError("admit() took a control link and named no handler or incoming union for it")
        channel = Channel(
            session_id=peer.session_id,
            peer_instance=peer.instance_id,
            handler=admission.handler,
            incoming=admission.incoming,
            config=self._config,
            introduction=request.introduction,
            bounded=True,
            on_ended=self._channel_ended,
        )
        channel.number = admission.number
        self._sessions[peer.session_id] = channel
        _send(comm, handshake.accept(welcome))
        comm.set_limits(CONTROL_LIMITS)
        channel.attach(comm, 0)
        if admission.opened is not None:
            admission.opened(channel)
        channel.receive()

    def _resume(self, request: LinkRequest, comm: Comm, handshake: AcceptorHandshake) -> str:
        if request.epoch != self._epoch:
            text = f"the scheduler was started again since (epoch {self._epoch}, the session is of {request.epoch})"
            return _refuse(comm, handshake, RefusalCode.OTHER_EPOCH, f"the session cannot be resumed: {text}")
        channel = self._sessions.get(request.session)
        if channel is None or channel.peer_instance != request.instance:
            reason = self._ends.get(request.session, "it is not known here")
            text = f"the session cannot be resumed: {reason}"
            return _refuse(comm, handshake, RefusalCode.SESSION_UNKNOWN, text)
        channel.detach("replaced: the peer dialled again")
        if channel.ended:  # its owner gave it up in link_lost
            return _refuse(comm, handshake, RefusalCode.SESSION_UNKNOWN, "the session has just ended")
        welcome = self._welcome(request, channel.number, [], resumed=True, last_seq=channel.last_seq)
        _send(comm, handshake.accept(welcome))
        comm.set_limits(CONTROL_LIMITS)
        channel.attach(comm, request.last_seq)
        _log.info("%s is back", channel.peer_address)
        channel.resumed()
        channel.receive()
        return ""

    def _welcome(
        self,
        request: LinkRequest,
        number: int,
        warnings: list[str],
        resumed: bool = False,
        last_seq: int = 0,
        setups: int = 0,
    ) -> Welcome:
        return Welcome(
            cluster_id=self._security.cluster_id,
            epoch=self._epoch,
            session=request.session,
            resumed=resumed,
            last_seq=last_seq,
            number=number,
            instance=self._instance_id,
            warnings=warnings,
            versions=own_versions(),
            codecs=own_codecs() if isinstance(request.introduction, DataIntroduction) else [],
            setups=setups,
        )

    def _channel_ended(self, channel: Channel, error: Exception | None) -> None:
        if self._sessions.pop(channel.session_id, None) is not None:
            self._ends[channel.session_id] = "it has ended" if error is None else str(error)
            while len(self._ends) > REMEMBERED_ENDS:
                self._ends.popitem(last=False)


class _Entrance:
    """One peer between its connection and its welcome."""

    def __init__(self, acceptor: Acceptor, comm: Comm, identity: LinkIdentity, crosses_processes: bool) -> None:
        self._acceptor = acceptor
        self._comm = comm
        self._crosses = crosses_processes
        self._timer: asyncio.TimerHandle | None = None
        self._over = False
        self._handshake = AcceptorHandshake(
            cluster_id=identity.cluster_id, link_key=identity.link_key, nonce=secrets.token_bytes(NONCE_BYTES)
        )

    def begin(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_s, self._timed_out, timeout_s)
        self._comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        if self._over:
            return
        handshake, comm = self._handshake, self._comm
        try:
            answer = handshake.receive(frames)
        except ZmqTasksError as exc:
            self._turn_away(str(exc), handshake.farewell)
            return
        if answer is not None:
            if handshake.proven:
                comm.set_limits(CONTROL_LIMITS)  # an introduction lists what a worker holds
            _send(comm, answer)
            return
        request = handshake.request
        assert request is not None
        self._leave()
        try:
            reason = self._acceptor.introduced(request, comm, handshake, self._crosses)
        except Exception:
            _log.exception("admitting %s failed", comm.peer_address)
            self._close(handshake.refuse(RefusalCode.NOT_ADMITTED, "an error on the accepting side: see its log"))
        else:
            if reason:
                _log.warning("refused %s: %s", comm.peer_address, reason)
                self._acceptor.close_soon(comm)

    def comm_ended(self, error: Exception) -> None:
        if not self._over:
            self._leave()
            self._acceptor.note_stranger(self._comm.peer_address, f"it left during the handshake: {error}")

    def drop(self, reason: str) -> None:
        """Ends the handshake without a word."""
        if not self._over:
            self._leave()
            self._acceptor.note_stranger(self._comm.peer_address, reason)
            self._comm.abort("turned away")

    def _turn_away(self, reason: str, farewell: list[bytes] | None) -> None:
        self._leave()
        self._acceptor.note_stranger(self._comm.peer_address, reason)
        self._close(farewell)

    def _close(self, farewell: list[bytes] | None) -> None:
        if farewell is None:
            self._comm.abort("turned away")
            return
        _send(self._comm, farewell)
        self._acceptor.close_soon(self._comm)

    def _timed_out(self, timeout_s: float) -> None:
        self.drop(f"the handshake was not finished within {timeout_s:g} s")

    def _leave(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._acceptor.left(self)


class _LineRate:
    """Logs at most `LINES_PER_PERIOD` warnings per period, then how many more there were."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._lines = 0
        self._left_out = 0

    def warning(self, text: str) -> None:
        now = time.monotonic()
        if now - self._since >= PERIOD_S:
            self.flush()
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES_PER_PERIOD:
            _log.warning("%s", text)
        else:
            self._left_out += 1

    def flush(self) -> None:
        """Says how many lines were left out."""
        if self._left_out:
            _log.warning("turned away %d more peers in %d s", self._left_out, time.monotonic() - self._since)
            self._left_out = 0


def _refuse(comm: Comm, handshake: AcceptorHandshake, code: RefusalCode, text: str) -> str:
    _send(comm, handshake.refuse(code, text))
    return text


async def _close_and_abort(comm: Comm) -> None:
    try:
        await comm.close()
    finally:
        comm.abort("turned away")  # a stranger that does not close keeps no descriptor here


def _send(comm: Comm, frames: Frames) -> None:
    """Sends on a comm that may have ended: its handler learns of that next."""
    try:
        comm.send(frames)
    except CommError:
        pass
