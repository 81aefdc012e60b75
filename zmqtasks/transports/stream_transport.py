"""Connecting and listening over stream sockets: what tcp and unix share; the comms are in `stream_comm`.

Connecting ends when the listener's preamble has come: a socket that only accepts, or speaks something else, is no peer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from zmqtasks.errors import (
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    PeerIdentityError,
    RemoteProtocolError,
)
from zmqtasks.transports.base import Comm, LinkSettings, Listener, Transport
from zmqtasks.transports.inheritance import keep_from_children
from zmqtasks.transports.stream import EncryptionFailedError, EncryptionNeededError
from zmqtasks.transports.stream_comm import StreamComm

if TYPE_CHECKING:
    from zmqtasks.transports.tls import TlsStream

_log = logging.getLogger(__name__)

_ACCEPTS_PER_TURN = 64
_ACCEPT_RETRY_S = 0.5
_STRANGERS = 4096
"""Callers that may be inside at the same time without a comm (they have said nothing yet, or TLS shakes hands)."""
_TURNED_AWAY_LINES = 100
_CLOSE_WAIT_S = 0.1

_EndpointT = TypeVar("_EndpointT", StreamComm, "TlsStream")


class StreamListener(Listener):
    """A listening socket and the turn-wise accepting from it; made by a `StreamTransport`."""

    def __init__(
        self,
        transport: StreamTransport,
        sock: socket.socket,
        address: str,
        on_comm: Callable[[Comm], None],
        settings: LinkSettings,
    ) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        keep_from_children(sock)
        self._sock = sock
        self._on_comm = on_comm
        self._settings = settings
        self._accepting: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._retry: asyncio.TimerHandle | None = None
        self._turned_away: set[str] = set()
        self._loop.add_reader(sock, self._accept)

    async def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            if self._retry is not None:
                self._retry.cancel()
        if self._accepting:  # who is done in a moment becomes a comm, strangers are hung up on
            _, strangers = await asyncio.wait(self._accepting, timeout=_CLOSE_WAIT_S)
            for stranger in strangers:
                stranger.cancel()
            if strangers:
                await asyncio.wait(strangers)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _peer = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                # Out of descriptors or memory: the backlog keeps the callers waiting meanwhile.
                _log.warning(
                    "%s cannot accept a connection: %s; trying again in %g s", self.address, exc, _ACCEPT_RETRY_S
                )
                self._loop.remove_reader(self._sock)
                self._retry = self._loop.call_later(_ACCEPT_RETRY_S, self._accept_again)
                return
            task = self._loop.create_task(self._make_comm(sock))
            self._accepting[task] = None
            task.add_done_callback(self._accepting.pop)
            if len(self._accepting) > _STRANGERS:
                next(iter(self._accepting)).cancel()

    def _accept_again(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock, self._accept)

    async def _make_comm(self, sock: socket.socket) -> None:
        try:
            comm = await self._transport.accept_comm(sock, self._settings)
        except ConnectError as exc:
            # Told once: whoever tries all day does not fill the log.
            if str(exc) not in self._turned_away and len(self._turned_away) < _TURNED_AWAY_LINES:
                self._turned_away.add(str(exc))
                _log.warning("%s turned a connection away: %s", self.address, exc)
            return
        except OSError as exc:  # the caller has hung up already
            _log.debug("a connection to %s was lost while it was accepted: %s", self.address, exc)
            return
        try:
            self._on_comm(comm)
        except Exception:
            _log.exception("on_comm of %s failed: the link from %s is aborted", self.address, comm.peer_address)
            comm.abort("refused")


class ListenerEncryptsError(ConnectError):
    """The listener takes encrypted links only, and this one was not."""


class StreamTransport(Transport):
    """Base of transports over stream sockets: subclasses make the sockets and say what an address is."""

    @abstractmethod
    async def connect_socket(self, address: str, settings: LinkSettings) -> socket.socket:
        """A socket connected to `address`; raises `OSError`, `ConnectError` or `AddressError`, and leaves nothing."""

    @abstractmethod
    def make_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        """A comm for a connected socket, with the options set that it needs; not yet attached to the event loop.

        Raises `ConnectError` when whoever is at the other end must not be, `OSError` when the connection is gone.
        """

    @abstractmethod
    def why_no_answer(self) -> str:
        """A question that leads to the cause when nothing answers."""

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        comm: StreamComm | None = None
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                sock = await self.connect_socket(address, settings)
                comm = await self.open_comm(sock, settings)
                await comm.wait_greeted()
        except TimeoutError as exc:
            if comm is not None:
                comm.abort()
            raise ConnectTimeoutError(
                f"nothing answered at {address} within {settings.connect_timeout_s:g} s: {self.why_no_answer()}"
            ) from exc
        except asyncio.CancelledError:
            if comm is not None:
                comm.abort()
            raise
        except PeerIdentityError as exc:
            raise PeerIdentityError(f"no encrypted link to {address}: {exc}") from exc
        except ConnectionRefusedError as exc:
            raise ConnectionRefusedByPeerError(f"nobody listens at {address}: is the node running?") from exc
        except EncryptionFailedError as exc:
            raise ConnectError(f"no encrypted link to {address}: {exc}") from exc
        except ConnectError:
            raise
        except OSError as exc:
            raise ConnectError(f"no link to {address}: {exc.strerror or exc}") from exc
        if isinstance(comm.ended, EncryptionNeededError):
            raise ListenerEncryptsError(f"{address} takes encrypted links only") from comm.ended
        if isinstance(comm.ended, CommError) and isinstance(comm.ended.__cause__, PeerIdentityError):
            raise PeerIdentityError(f"no encrypted link to {address}: {comm.ended.__cause__}") from comm.ended
        if isinstance(comm.ended, RemoteProtocolError):
            raise ConnectError(f"{address} is not a zmqtasks node over {self.scheme}: {comm.ended}") from comm.ended
        if isinstance(comm.ended, CommError):
            raise ConnectionRefusedByPeerError(f"{address} turned the connection away: {comm.ended}") from comm.ended
        return comm

    async def open_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        """A comm over a connected socket, which it owns from now on; on failure the socket is closed."""
        try:
            sock.setblocking(False)
            comm = self.make_comm(sock, settings)
        except BaseException:
            sock.close()
            raise
        return await self.attach(comm, sock)

    async def accept_comm(self, sock: socket.socket, settings: LinkSettings) -> StreamComm:
        """Like `open_comm`, for the listening side."""
        return await self.open_comm(sock, settings)

    async def attach(self, comm: _EndpointT, sock: socket.socket) -> _EndpointT:
        """Gives the socket to the event loop on behalf of `comm`."""
        loop = asyncio.get_running_loop()
        keep_from_children(sock)
        # Of the ways to attach a socket, this one takes every family, and serves the calling side as well. Shielded, as
        # it takes two turns of the loop and, cancelled half-way, uvloop would close a descriptor that `sock` still
        # thinks to own.
        attaching = loop.create_task(loop.connect_accepted_socket(lambda: comm, sock))
        try:
            await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(lambda done: None if done.cancelled() or done.exception() else comm.abort())
            raise
        return comm
