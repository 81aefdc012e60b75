"""The listening end: one ROUTER socket that all comms of a listener share.

Who is who: ZeroMQ's routing id names a peer in both directions, and no other while it lives; the file descriptor of the
connection, which a part carries and the monitor names, tells of the peer's death and lets this side hang up.

Strangers. ZeroMQ reads on behalf of anybody, so a connection is watched until it has a comm whose limits were raised:
how many bytes the kernel has received for it (TCP_INFO) against those that have been seen here. What a stranger can
make ZeroMQ hold is thus bounded, also by a message whose parts never end, which the application would never see.

Closing. Ending a ZeroMQ bind would end all connections made through it. So a listener that is closed while comms live
stays bound, turns newcomers away, and takes up its work again when the same process listens at the address again; with
its last comm it is really closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

import zmq

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol.frames import Limits
from zmqtasks.transports.address import format_host_port
from zmqtasks.transports.base import Comm, LinkSettings
from zmqtasks.transports.zeromq.comm import LENT_BYTES, ZmqComm, full_window, window_for
from zmqtasks.transports.zeromq.connection import Connection
from zmqtasks.transports.zeromq.control import (
    UNIT_BYTES,
    VERSION,
    Abort,
    Accept,
    Hello,
    Refuse,
    decode_control_untrusted,
    encode_control,
    largest_part,
)
from zmqtasks.transports.zeromq.curve import protect_listener
from zmqtasks.transports.zeromq.sockets import (
    DONTWAIT,
    LINGER_MS,
    MORE_DONTWAIT,
    MonitoredSocket,
    make_routing_ids_unpredictable,
    receive_control,
    source_fd,
)

_log = logging.getLogger(__name__)

_MESSAGES_PER_TURN = 128
_BYTES_PER_TURN = 4 << 20
_MOST_STRANGERS = 2048
"""Connections that have not authenticated; for more, the oldest without a hello goes, and hellos are refused."""

_STRANGER_BYTES = 64 << 10
"""What may come by a connection before its hello, the ZMTP handshake included."""

_MESSAGE_OVERHEAD_BYTES = 128  # of ZMTP: 9 for each part, and the empty first part of control; 33 for each by CURVE
_HEARTBEAT_BYTES = 128  # more than pings take between two looks
_WATCH_S = 0.01
_WATCH_SHARE = 20  # a look at all strangers may take 1/20 of the time
_HELLO_S = 3.0
"""A hello follows the connection without the caller's Python having a part in it: this is long."""

_HANG_UP_S = 1.0
_CUT_WAIT_S = 1.0

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class RouterComm(ZmqComm):
    """A comm that the peer asked for."""

    def __init__(self, router: Router, routing_id: bytes, connection: Connection, hello: Hello) -> None:
        super().__init__(router.loop, router.settings)
        self.local_address = router.address
        self.peer_address = router.address_of(connection.name)
        self.routing_id = routing_id
        self.connection = connection
        self.encrypted = router.secret is not None
        self.same_host = connection.stays_on_host()
        self._router = router
        self._set_peer_window(hello.window)

    def set_limits(self, limits: Limits) -> None:
        super().set_limits(limits)
        if not self._released and self.trusted:
            self._router.unwatch(self.connection)

    @property
    def trusted(self) -> bool:
        """Whether the limits are so wide that watching the peer is of no use."""
        return self._window == full_window(self._settings)

    @property
    def granted_bytes(self) -> int:
        """The most that may have come for this comm and was not seen yet."""
        return self._window * UNIT_BYTES + largest_part(self._window)

    def _push(self, part: bytes | memoryview) -> None:
        sock = self._router.socket
        sock.send(self.routing_id, MORE_DONTWAIT)
        sock.send(part, DONTWAIT, len(part) < LENT_BYTES)
        sock.look_again()

    def _push_control(self, data: bytes) -> None:
        self._router.push_control(self.routing_id, data)

    def _release(self, *, hard: bool) -> None:
        if hard and not self._loop.is_closed():
            with contextlib.suppress(zmq.ZMQError):  # it is gone already
                self._push_control(encode_control(Abort(str(self._ended))))
        self._router.forget(self)

    def _greeted(self, control: object) -> None:
        raise RemoteProtocolError(f"{self.peer_address} sent {type(control).__name__} in an open link")


class Router:
    """The socket of a listener and all its comms."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        scheme: str,
        settings: LinkSettings,
        secret: bytes | None,
        on_empty: Callable[[Router], None],
    ) -> None:
        """`secret`: all links are encrypted by what is derived from it; None: none is."""
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.secret = secret
        self.address = address
        self.on_comm: Callable[[Comm], None] | None = None
        self._scheme = scheme
        self._on_empty = on_empty
        self._comms: dict[bytes, RouterComm] = {}
        self._connections: dict[int, Connection] = {}
        self._watched: dict[int, Connection] = {}  # strangers, and those to hang up on
        self._watching: asyncio.TimerHandle | None = None
        self._mismatch_told = False
        self._cut: dict[RouterComm, float] = {}  # comms without connection, and how long to look for what they sent
        self._unbound: asyncio.Future[None] = self.loop.create_future()
        host, port = sock.getsockname()[:2]
        make_routing_ids_unpredictable()
        self.socket = MonitoredSocket(
            zmq.ROUTER, settings, full_window(settings), _EVENTS, self._receive, self._on_event
        )
        try:
            if sock.family == socket.AF_INET6:
                self.socket.zmq.set(zmq.IPV6, 1)
            self.socket.zmq.set(zmq.ROUTER_MANDATORY, 1)
            if secret is not None:
                protect_listener(self.socket, secret)
            self.socket.zmq.set(zmq.USE_FD, sock.fileno())
            self._endpoint = format_host_port("tcp", host, port)
            self.socket.zmq.bind(self._endpoint)
        except BaseException:
            self.socket.close(linger_ms=0)
            raise
        self._listening_fd = sock.detach()  # ZeroMQ's from now on

    def address_of(self, name: tuple[str, int]) -> str:
        """How to write the address of a peer."""
        host = name[0].removeprefix("::ffff:") if "." in name[0] else name[0]
        return format_host_port(self._scheme, host, name[1])

    def listen(self, on_comm: Callable[[Comm], None], settings: LinkSettings) -> None:
        """Lets newcomers in, at first or again."""
        self.on_comm = on_comm
        self.settings = settings

    async def stop_listening(self) -> None:
        """Turns newcomers away; when no comm lives, frees the address before it returns."""
        self._turn_away()
        if not self._comms and not self.socket.closed:
            self.socket.zmq.unbind(self._endpoint)
            self.socket.read_events()
            try:
                await asyncio.wait((self._unbound,), timeout=_HANG_UP_S)
            finally:
                self._close()

    def stop_nowait(self) -> None:
        """Turns newcomers away; when no comm lives, ZeroMQ's thread frees the address next."""
        self._turn_away()
        self._close_if_unused()

    def push_control(self, routing_id: bytes, data: bytes) -> None:
        """Sends a control part."""
        sock = self.socket.zmq
        sock.send(routing_id, MORE_DONTWAIT)
        sock.send(b"", MORE_DONTWAIT)
        sock.send(data, DONTWAIT)
        self.socket.look_again()

    def forget(self, comm: RouterComm) -> None:
        """The comm has ended; the peer has a moment to hang up by itself."""
        del self._comms[comm.routing_id]
        self._cut.pop(comm, None)
        connection = comm.connection
        if connection.comm is comm:
            connection.comm = None
            connection.over = comm.routing_id
        if self.loop.is_closed():
            if not self._comms and self.on_comm is None:
                self._close()
            return
        if connection.comm is None and self._connections.get(connection.fd) is connection:
            connection.hang_up_at = self.loop.time() + _HANG_UP_S
            self._watch(connection)
        if not self._comms and self.on_comm is None:
            self.loop.call_soon(self._close_if_unused)

    def unwatch(self, connection: Connection) -> None:
        """The peer is no stranger any more."""
        self._watched.pop(connection.fd, None)

    # -- receiving

    def _receive(self) -> bool:
        sock = self.socket.zmq
        comms = self._comms
        messages = size = 0
        while messages < _MESSAGES_PER_TURN and size < _BYTES_PER_TURN:
            if self.socket.closed:
                return False
            if messages == 1 and not self.socket.readable_locked():  # no other thread uses this one
                return bool(self._cut) and self._end_cut()
            try:
                routing_id = sock.recv(DONTWAIT)
            except zmq.Again:
                return bool(self._cut) and self._end_cut()  # which may send, and so need another look
            part = sock.recv(DONTWAIT, copy=False)
            messages += 1
            comm = comms.get(routing_id)
            if comm is None:
                self._receive_from_stranger(routing_id, part)
            elif part.more:
                control = receive_control(sock, part)
                comm.connection.seen_bytes += len(control or b"") + _MESSAGE_OVERHEAD_BYTES
                comm.control_received_untrusted(control)
            else:
                data = part.buffer
                size += len(data)
                comm.connection.seen_bytes += len(data) + _MESSAGE_OVERHEAD_BYTES
                comm.part_received_untrusted(data)
        if self._cut:
            self._end_cut(self.loop.time())
        return True

    def _receive_from_stranger(self, routing_id: bytes, part: zmq.Frame) -> None:
        control = receive_control(self.socket.zmq, part) if part.more else None
        self.socket.read_events()  # the connection was accepted before anything came by it
        connection = self._connections.get(source_fd(part))
        if control is None or connection is None or connection.over == routing_id:
            return
        try:
            hello = decode_control_untrusted(control)
        except RemoteProtocolError:
            return
        # Whatever is no hello is passed over, and the caller hung up on when its time is over: the descriptor may be
        # another caller's by now, who has done nothing wrong.
        if isinstance(hello, Hello):
            self._on_hello(routing_id, connection, hello)

    def _on_hello(self, routing_id: bytes, connection: Connection, hello: Hello) -> None:
        refusal = None
        if self.on_comm is None:
            refusal = "the listener is closed"
        elif len(self._watched) > _MOST_STRANGERS:
            refusal = f"{_MOST_STRANGERS} callers are still to authenticate: try again later"
        elif hello.version != VERSION:
            refusal = (
                f"the caller speaks version {hello.version} of the zmq transport, the listener version {VERSION}: "
                f"run the same release of zmqtasks on both"
            )
        try:
            if refusal is not None:
                connection.over = routing_id
                connection.hang_up_at = self.loop.time() + _HANG_UP_S
                self.push_control(routing_id, encode_control(Refuse(refusal)))
                return
            window = window_for(self.settings.limits, self.settings)
            self.push_control(routing_id, encode_control(Accept(hello.session, window)))
        except zmq.ZMQError:
            return  # it is gone already
        self._make_comm(routing_id, connection, hello)

    def _make_comm(self, routing_id: bytes, connection: Connection, hello: Hello) -> None:
        comm = RouterComm(self, routing_id, connection, hello)
        if connection.comm is not None:
            # One connection has one routing id: the descriptor was used again before the first peer's hello was read.
            self._cut[connection.comm] = 0.0
        connection.comm = comm
        connection.over = None
        connection.hang_up_at = float("inf")
        self._comms[routing_id] = comm
        if comm.trusted:
            self.unwatch(connection)
        on_comm = self.on_comm
        assert on_comm is not None
        try:
            on_comm(comm)
        except Exception:
            _log.exception("on_comm of %s failed: the link from %s is aborted", self.address, comm.peer_address)
            comm.abort("refused")

    # -- connections

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._on_accepted(value)
        elif event == zmq.EVENT_DISCONNECTED:
            connection = self._connections.pop(value, None)
            if connection is not None:
                self._watched.pop(value, None)
                if connection.comm is not None:
                    self._cut[connection.comm] = self.loop.time() + _CUT_WAIT_S
                    self.socket.look_again()
                    self.loop.call_soon(self._receive_and_end_cut)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH and not self._mismatch_told:
                self._mismatch_told = True  # once: whoever tries all day does not fill the log
                came, due = ("a plain", "encrypts") if self.secret is not None else ("an encrypted", "does not")
                _log.warning(
                    "%s turned a connection away: %s link came where this side %s: --encryption must be the same on all nodes",
                    self.address,
                    came,
                    due,
                )
        elif event == zmq.EVENT_CLOSED and value == self._listening_fd and not self._unbound.done():
            self._unbound.set_result(None)

    def _on_accepted(self, fd: int) -> None:
        connection = Connection.found(fd)
        if connection is None:
            return
        connection.hang_up_at = self.loop.time() + min(_HELLO_S, self.settings.connect_timeout_s)
        self._connections[fd] = connection
        self._watch(connection)
        if len(self._watched) > _MOST_STRANGERS:
            oldest = next((known for known in self._watched.values() if known.comm is None), None)
            if oldest is not None:
                self._watched.pop(oldest.fd)
                oldest.hang_up()

    def _receive_and_end_cut(self) -> None:
        if self._cut and not self.socket.closed and self._receive():
            self.socket.look_again()

    def _end_cut(self, now: float = float("inf")) -> bool:
        """Ends the comms whose connection is gone, once all that came by it must have been received; True: there were."""
        over = [comm for comm, until in self._cut.items() if until <= now]
        for comm in over:
            self._cut.pop(comm, None)
            comm.link_lost()
        return bool(over)

    # -- strangers

    def _watch(self, connection: Connection) -> None:
        self._watched[connection.fd] = connection
        if self._watching is None:
            self._watching = self.loop.call_later(_WATCH_S, self._look_at_strangers)

    def _look_at_strangers(self) -> None:
        start = self.loop.time()
        for connection in list(self._watched.values()):
            self._look_at(connection, start)
        took = self.loop.time() - start
        self._watching = None
        if self._watched and not self.socket.closed:
            self._watching = self.loop.call_later(max(_WATCH_S, took * _WATCH_SHARE), self._look_at_strangers)

    def _look_at(self, connection: Connection, now: float) -> None:
        if now >= connection.hang_up_at:
            self._watched.pop(connection.fd, None)
            connection.hang_up()
            return
        comm = connection.comm
        granted = _STRANGER_BYTES if comm is None else comm.granted_bytes
        connection.seen_bytes += _HEARTBEAT_BYTES
        if connection.over is None and connection.received_bytes() - connection.seen_bytes > granted:
            _log.info("%s hangs up on %s: it sends more than it may", self.address, self.address_of(connection.name))
            connection.hang_up()

    def _turn_away(self) -> None:
        self.on_comm = None
        for connection in list(self._watched.values()):
            if connection.comm is None and connection.over is None:
                connection.hang_up()

    def _close_if_unused(self) -> None:
        if not self._comms and self.on_comm is None:
            self._close()

    def _close(self) -> None:
        if not self.socket.closed:
            if self._watching is not None:
                self._watching.cancel()
            self.socket.close(linger_ms=LINGER_MS)
            self._on_empty(self)
