"""ZeroMQ sockets in an event loop: the process's private context, options, monitors, and reading without a hang.

libzmq's file descriptor (ZMQ_FD) tells of *changes* only, and any call on the socket may swallow one: so a socket is
read until it says EAGAIN, and looked at again, or asked whether it should be, after every send.

A socket is not for several threads at once; one after another may use it, with a lock in between. So a DEALER, by which
other threads send too, is used under the lock of its `MonitoredSocket`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import TypeAlias

import zmq

from zmqtasks.transports.base import LinkSettings
from zmqtasks.transports.zeromq.control import CONTROL_BYTES, PART_BYTES

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ZmqContext: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
ZmqSocket: TypeAlias = "zmq.Socket[bytes]"

DONTWAIT = int(zmq.DONTWAIT)
"""As a plain number, and so are the others: an operation on two of pyzmq's flags takes longer than to receive."""

MORE_DONTWAIT = int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)

LINGER_MS = 1000
"""How long a closed socket goes on to send what it has; what matters was acknowledged before."""

LOOPBACK_BUFFER_BYTES = 2 << 20
"""The kernel's buffers of a connection within the host. It would find the size itself, but keeps to less, and large
messages take more processor time. Between hosts it knows best."""

CONTROL_SLACK = 32
"""Room in a receive queue for control parts, beyond the window, all of whose units may be small parts."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_HEAP_BYTES = 64 << 20
"""Free memory at the end of the C heap that is not returned to the system: some full windows of parts."""

_MOST_SOCKETS = 65_535  # ZMQ_MAX_SOCKETS takes no more
_CORES_PER_IO_THREAD = 8
_MOST_IO_THREADS = 4  # one receiving socket has one I/O thread in any case
_HEARTBEATS = 10
_HEARTBEAT_SHARE = 0.95

_EVENT = struct.Struct("=Hi")
_monitor_names = itertools.count()


class _ContextOfProcess:
    """The one context of the process, private to this transport, made for its first socket and ended with its last.

    Never `Context.instance()`: that may be a notebook kernel's, with limits and a lifetime of its own. A forked child
    gets a new one: libzmq's threads do not survive a fork.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: ZmqContext | None = None
        self._pid = 0
        self._users = 0
        self._inherited: list[ZmqContext] = []  # never touched again, nor destroyed

    def acquire(self) -> ZmqContext:
        with self._lock:
            if self._context is not None and self._pid != os.getpid():
                self._inherited.append(self._context)
                self._context = None
            if self._context is None:
                _keep_message_memory()
                self._context = zmq.Context(io_threads=_io_threads())
                self._context.set(zmq.MAX_SOCKETS, _max_sockets())
                self._pid = os.getpid()
                self._users = 0
            self._users += 1
            return self._context

    def release(self, context: ZmqContext) -> None:
        with self._lock:
            if context is not self._context:
                return
            self._users -= 1
            if self._users:
                return
            self._context = None
        # term() waits for the last sockets to linger: not in an event loop.
        threading.Thread(target=context.term, name="zmqtasks-zmq-term", daemon=True).start()


_context_of_process = _ContextOfProcess()


def _keep_message_memory() -> None:
    """Lets the C heap keep what libzmq frees, where the C library is glibc.

    libzmq takes memory from `malloc` for every part that it receives, and gives it back when it is read. By default glibc
    returns so large blocks to the system at once, and each part meets fresh pages: 1.2 GB/s, 1.8 when they are kept.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2 * PART_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_HEAP_BYTES)


def _io_threads() -> int:
    return min(_MOST_IO_THREADS, 1 + (os.cpu_count() or 1) // _CORES_PER_IO_THREAD)


def _max_sockets() -> int:
    """As many as the process may come to have descriptors: the default of 1,023 is met at 340 links."""
    if resource is None:
        return _MOST_SOCKETS
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_SOCKETS if hard == resource.RLIM_INFINITY else max(1024, min(hard, _MOST_SOCKETS))


class MonitoredSocket:
    """A DEALER or ROUTER socket in the running event loop, with its monitor.

    `on_readable` is called when there may be something to receive; it receives until `zmq.Again` and returns False, or
    returns True to be called again in the next turn of the loop: when it stops earlier, or has sent after that.
    `on_event(event, value)` gets the events of the monitor, for most of which `value` is a file descriptor.
    """

    def __init__(
        self,
        kind: int,
        settings: LinkSettings,
        window: int,
        events: int,
        on_readable: Callable[[], bool],
        on_event: Callable[[int, int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_readable = on_readable
        self._on_event = on_event
        self._look_pending = False
        self._looking = False
        self.context = _context_of_process.acquire()
        self.closed = False
        self.lock = threading.Lock()
        self._monitor: ZmqSocket | None = None
        try:
            self.zmq: ZmqSocket = self.context.socket(kind)
        except BaseException:
            _context_of_process.release(self.context)
            raise
        # As `zmq.send`, past pyzmq's layer in Python, which does nothing for these sockets and takes longer than the call.
        self.send: Callable[..., object] = super(zmq.Socket, self.zmq).send
        try:
            _set_options(self.zmq, settings, window)
            self._start_monitor(events)
            self._fd = get_int(self.zmq, zmq.FD)
            self._loop.add_reader(self._fd, self._look)
        except BaseException:
            self.close(linger_ms=0)
            raise

    @property
    def readable(self) -> bool:
        """Whether there is something to receive: asking takes 1.4 us, a receive that fails 3.3."""
        with self.lock:
            return self.readable_locked()

    def readable_locked(self) -> bool:
        """`readable`, for who holds the lock."""
        return bool(self.zmq.get(_EVENTS) & _POLLIN)  # type: ignore[operator]

    def needs_look_locked(self) -> bool:
        """After a send from the loop, for who holds the lock: whether `look_again` is due.

        Who sends seldom asks by this: a turn of the loop just to look costs more, most of all where a task has the GIL.
        """
        return not self._looking and self.readable_locked()

    def look_soon(self) -> None:
        """For any thread: makes the loop look."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._look)

    def look_again(self) -> None:
        """To be called after sends that may have swallowed the news of something to receive (`needs_look_locked`), or after all."""
        if not self._look_pending and not self._looking:
            self._look_pending = True
            self._loop.call_soon(self._look_after_send)

    def read_events(self) -> None:
        """Hands all events to `on_event` that have happened up to now."""
        while not self.closed and self._monitor is not None:
            try:
                head, _endpoint = self._monitor.recv_multipart(DONTWAIT)
            except zmq.Again:
                return
            self._on_event(*_EVENT.unpack(head))

    def close(self, *, linger_ms: int) -> None:
        """Closes socket and monitor; what was sent goes on its way for at most `linger_ms`. Idempotent."""
        if self.closed:
            return
        self.closed = True
        loop_lives = not self._loop.is_closed()
        if hasattr(self, "_fd") and loop_lives:
            self._loop.remove_reader(self._fd)
        if self._monitor is not None:
            if loop_lives:
                self._loop.remove_reader(self._monitor_fd)
            self.zmq.monitor(None, 0)  # first: libzmq's threads would wait for a reader of further events
            self._monitor.close(linger=0)
        with self.lock:
            self.zmq.close(linger=linger_ms)
        _context_of_process.release(self.context)

    def _start_monitor(self, events: int) -> None:
        name = f"inproc://zmqtasks-monitor-{next(_monitor_names)}"
        self.zmq.monitor(name, events)
        monitor = self.context.socket(zmq.PAIR)
        monitor.set(zmq.RCVHWM, 0)  # else 1,000 unread events make the I/O thread wait, and every link with it
        monitor.connect(name)
        self._monitor_fd = get_int(monitor, zmq.FD)
        self._monitor = monitor
        get_int(monitor, _EVENTS)  # news are told only to a reader that has looked and found nothing
        self._loop.add_reader(self._monitor_fd, self.read_events)

    def _look(self) -> None:
        if self.closed:
            return
        self._looking = True  # what is sent meanwhile needs no look of its own
        try:
            more = self._on_readable()
        finally:
            self._looking = False
        if more:
            self.look_again()

    def _look_after_send(self) -> None:
        self._look_pending = False
        if not self.closed and self.readable:
            self._look()


def _set_options(sock: ZmqSocket, settings: LinkSettings, window: int) -> None:
    heartbeat_ms = max(10, int(settings.heartbeat_s * 1000))
    silence_ms = max(1, int(heartbeat_ms * _HEARTBEAT_SHARE))
    sock.set(zmq.LINGER, LINGER_MS)
    sock.set(zmq.SNDHWM, 0)  # credits bound what is sent; a full queue would drop or hold up everybody's messages
    sock.set(zmq.RCVHWM, window + CONTROL_SLACK)
    sock.set(zmq.MAXMSGSIZE, PART_BYTES + CONTROL_BYTES)
    sock.set(zmq.RECONNECT_IVL, -1)
    sock.set(zmq.HANDSHAKE_IVL, max(1, int(settings.connect_timeout_s * 1000)))
    # Pings are answered by the peer's I/O thread, so a peer that holds its GIL is heard. When the output is blocked no
    # ping goes out and so none is missed: then the kernel's time-out for unacknowledged data takes over.
    sock.set(zmq.HEARTBEAT_IVL, max(1, heartbeat_ms // _HEARTBEATS))
    sock.set(zmq.HEARTBEAT_TIMEOUT, silence_ms)
    sock.set(zmq.TCP_MAXRT, silence_ms)


def make_routing_ids_unpredictable() -> None:
    """To be called before a ROUTER is made, which begins to number its peers at a value of C's `rand`.

    libzmq 4.3.5 never seeds that, and aborts the process by an assertion when a caller has claimed, by its Identity, a
    routing id that the ROUTER is about to make for another. ZAP does not tell of it; so guessing must be hopeless.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no C library by that name
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))


def get_int(sock: ZmqSocket, option: int) -> int:
    """The value of an option that is a number."""
    value: int = sock.get(option)  # type: ignore[assignment]
    return value


def receive_control(sock: ZmqSocket, first: zmq.Frame) -> bytes | None:
    """The rest of a message whose first part has more behind it: a control part, or None when it is no such message."""
    second = last = sock.recv(DONTWAIT, copy=False)
    parts = 2
    while last.more:
        # Nothing of this is wanted, but it must be read: what follows it is the next message.
        last = sock.recv(DONTWAIT, copy=False)
        parts += 1
    if parts > 2 or len(first) or len(second) > CONTROL_BYTES:
        return None
    return second.bytes


def source_fd(frame: zmq.Frame) -> int:
    """The file descriptor of the connection that a part came by, or -1."""
    try:
        fd = frame.get(zmq.SRCFD)
    except zmq.ZMQError:
        return -1
    return fd if isinstance(fd, int) else -1


def borrowed_socket(fd: int) -> socket.socket | None:
    """A second handle on a connection of libzmq's, to be closed soon; None when it is gone."""
    try:
        handle = os.dup(fd)
    except OSError:
        return None
    try:
        return socket.socket(fileno=handle)
    except OSError:
        os.close(handle)
        return None
