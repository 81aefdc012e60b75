"""The connecting end: one DEALER socket with a monitor per comm."""

from __future__ import annotations

import asyncio
import contextlib
import os

import zmq

from zmqtasks.errors import ConnectError, ConnectionRefusedByPeerError, RemoteProtocolError
from zmqtasks.protocol.frames import Frames
from zmqtasks.transports.address import HostPort, format_host_port
from zmqtasks.transports.base import LinkSettings
from zmqtasks.transports.sockets import is_loopback
from zmqtasks.transports.stream import pack_message
from zmqtasks.transports.zeromq.comm import LENT_BYTES, ZmqComm, full_window
from zmqtasks.transports.zeromq.connection import Connection
from zmqtasks.transports.zeromq.control import SESSION_BYTES, VERSION, Accept, Hello, Refuse, encode_control, units
from zmqtasks.transports.zeromq.curve import protect_caller
from zmqtasks.transports.zeromq.sockets import (
    DONTWAIT,
    LINGER_MS,
    LOOPBACK_BUFFER_BYTES,
    MORE_DONTWAIT,
    MonitoredSocket,
    receive_control,
)

_MESSAGES_PER_TURN = 32

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class OtherMechanismError(Exception):
    """The listener encrypts and this side does not, or the other way round."""


class HandshakeCutError(Exception):
    """The listener hung up in the midst of the handshake; libzmq does not know why."""


class NotConnectedError(Exception):
    """The connection was not made; the kernel knows why, but ZeroMQ does not say."""


class DealerComm(ZmqComm):
    """A comm that was asked for by this side; `wait_accepted` tells whether it came about."""

    def __init__(self, where: HostPort, numeric_host: str, settings: LinkSettings, secret: bytes | None) -> None:
        """`secret`: the link is encrypted by what is derived from it; None: it is not."""
        loop = asyncio.get_running_loop()
        super().__init__(loop, settings)
        self.peer_address = str(where)
        self.local_address = format_host_port(where.scheme, numeric_host, 0)  # until connected
        self.encrypted = secret is not None
        self.same_host = is_loopback(numeric_host)
        self._scheme = where.scheme
        self._numeric_host = numeric_host
        self._port = where.port
        self._session = os.urandom(SESSION_BYTES)
        self._accepted: asyncio.Future[None] = loop.create_future()
        self._connected = False
        self._connection: Connection | None = None
        self._direct_rest: list[bytes | memoryview] = []  # what there was no credit for in another thread: goes first
        self._socket = MonitoredSocket(
            zmq.DEALER, settings, full_window(settings), _EVENTS, self._receive, self._on_event
        )
        try:
            if ":" in numeric_host:
                self._socket.zmq.set(zmq.IPV6, 1)
            if self.same_host:
                self._socket.zmq.set(zmq.SNDBUF, LOOPBACK_BUFFER_BYTES)
                self._socket.zmq.set(zmq.RCVBUF, LOOPBACK_BUFFER_BYTES)
            if secret is not None:
                protect_caller(self._socket, secret)
            self._socket.zmq.connect(format_host_port("tcp", numeric_host, where.port))
            with contextlib.suppress(zmq.Again):  # the connection has failed already, and the monitor tells of it
                self._push_control(encode_control(Hello(self._session, self._window)))
        except BaseException:
            self._drop(hard=True)
            raise

    async def wait_accepted(self) -> None:
        """Waits for the listener's answer; raises `ConnectError`, or one of this module's errors."""
        await self._accepted

    def _receive(self) -> bool:
        for turn in range(_MESSAGES_PER_TURN):
            if self._socket.closed or (turn == 1 and not self._socket.readable):
                return False
            control = None
            with self._socket.lock:
                try:
                    part = self._socket.zmq.recv(DONTWAIT, copy=False)
                except zmq.Again:
                    return False
                if more := part.more:
                    control = receive_control(self._socket.zmq, part)
            if more:
                self.control_received_untrusted(control)
            elif self._accepted.done():
                self.part_received_untrusted(part.buffer)
            else:
                self._fail(
                    ConnectError(f"{self.peer_address} is not a zmqtasks node over zmq: it said {part.bytes[:32]!r}")
                )
        return True

    def _push(self, part: bytes | memoryview) -> None:
        with self._socket.lock:
            self._socket.send(part, DONTWAIT, len(part) < LENT_BYTES)
            look = self._socket.needs_look_locked()
        if look:
            self._socket.look_again()

    def _push_control(self, data: bytes) -> None:
        with self._socket.lock:
            self._socket.zmq.send(b"", MORE_DONTWAIT)
            self._socket.zmq.send(data, DONTWAIT)
            look = self._socket.needs_look_locked()
        if look:
            self._socket.look_again()

    # -- sending in other threads

    @property
    def ready_for_direct(self) -> bool:
        return (
            self._ended is None
            and not self._direct_rest  # in the order in which the loop moves it on: nothing slips by
            and not self._queue
            and not self._flushing
            and self._credit() > 0
        )

    def send_direct(self, frames: Frames) -> None:
        pieces, size = pack_message(frames)
        sock = self._socket
        with sock.lock:
            if self._ended is not None:
                raise self._sending_error()
            self._messages_sent += 1
            self._bytes_sent += size
            cost = units(size)
            if size <= self._peer_part_bytes and self._credit() >= cost:
                self._units_sent += cost
                part = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                try:
                    sock.zmq.send(part, DONTWAIT)  # copied: what lends memory is made once, and not by two threads
                except zmq.ZMQError:
                    return  # the monitor tells the loop, which ends the comm
                look = sock.readable_locked()  # news of it may be swallowed
            else:
                self._direct_rest = pieces
                look = False
        if look:
            sock.look_soon()
        elif self._direct_rest:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._send_direct_rest)

    def send(self, frames: Frames) -> None:
        if self._direct_rest:
            self._send_direct_rest()
        super().send(frames)

    @property
    def queued_bytes(self) -> int:
        return super().queued_bytes + sum(map(len, self._direct_rest))

    def _mark_closed(self) -> None:
        with self._socket.lock:  # another thread has sent by now, or finds the end
            super()._mark_closed()
            rest, self._direct_rest = self._direct_rest, []
        self._queue.extend(rest)  # goes out before the goodbye
        self._queued_bytes += sum(map(len, rest))

    def _send_direct_rest(self) -> None:
        if rest := self._direct_rest:
            if self._ended is None:
                self._enqueue(rest, sum(map(len, rest)))
            self._direct_rest = []  # last: up to here no other thread sends

    def _release(self, *, hard: bool) -> None:
        # libzmq 4.3.5 aborts the process when a link breaks while its socket closes without lingering and half of a message of
        # two parts is sent. So a break is one of the connection, and the socket lingers with nothing to send by.
        if hard and self._connection is not None:
            self._connection.hang_up()
        self._socket.close(linger_ms=0 if hard and not self._connected else LINGER_MS)
        if not self._accepted.done():
            self._accepted.cancel()

    def _greeted(self, control: Hello | Accept | Refuse) -> None:
        match control:
            case Accept(session, window, version) if not self._accepted.done():
                if version != VERSION:
                    self._fail(
                        ConnectError(
                            f"{self.peer_address} speaks version {version} of the zmq transport, this side {VERSION}"
                        )
                    )
                elif session != self._session:
                    self._fail(ConnectError(f"{self.peer_address} answered for another session"))
                else:
                    self._socket.read_events()  # CONNECTED was before
                    self._set_peer_window(window)
                    self._accepted.set_result(None)
            case Refuse(reason) if not self._accepted.done():
                self._fail(ConnectionRefusedByPeerError(f"{self.peer_address} turned the link away: {reason}"))
            case _:
                error = RemoteProtocolError(f"{self.peer_address} sent {type(control).__name__} out of place")
                self._fail(ConnectError(str(error)))
                raise error

    def _fail(self, error: Exception) -> None:
        if not self._accepted.done():
            self._accepted.set_exception(error)

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._connected = True
            self._learn_addresses(value)
        elif not self._connected:
            self._fail(NotConnectedError())
        elif event == zmq.EVENT_DISCONNECTED:
            self._disconnected()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self._fail(OtherMechanismError())
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or (
            self.encrypted and event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        ):
            self._fail(HandshakeCutError())
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH):
            self._fail(ConnectError(f"{self.peer_address} is not a zmqtasks node over zmq: the ZMTP handshake failed"))

    def _disconnected(self) -> None:
        while self._receive():  # what came before the end; bounded by the window
            pass
        self._fail(ConnectionRefusedByPeerError(f"{self.peer_address} hung up: is a zmqtasks node over zmq there?"))
        self.link_lost()

    def _learn_addresses(self, fd: int) -> None:
        found = Connection.found(fd)
        if found is not None and found.name[1] == self._port:  # or it is gone, and the descriptor something else
            self._connection = found
            host, port = found.own_name
            self.same_host = self.same_host or host == self._numeric_host
            self.local_address = format_host_port(self._scheme, host, port)
