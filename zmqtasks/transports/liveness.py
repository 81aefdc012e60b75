"""Tells a cut TCP link from a peer that merely does not read, without messages of our own.

Nothing of the peer's process takes part: its kernel acknowledges data, zero-window probes and keep-alives also while
the process is stopped or holds its GIL. So the kernel's own clocks tell all:

- an idle link is probed by SO_KEEPALIVE, and the kernel breaks it;
- data in flight, or probes of a closed window, that nobody acknowledges for `heartbeat_s`: the link is cut. TCP_INFO
  has it (`tcpi_unacked`, `tcpi_probes`, `tcpi_last_ack_recv`). TCP_USER_TIMEOUT is no substitute: it aborts a link
  whose window stays closed although every probe is answered (tcp(7), and net/ipv4/tcp_timer.c: tcp_probe_timer).

One timer per event loop looks at all links.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import weakref
from collections.abc import Callable
from typing import Protocol

DETECTS_CUT_LINK = sys.platform == "linux"

_TCP_INFO = getattr(socket, "TCP_INFO", 11)
_TCP_RTO_MAX_MS = 44  # since Linux 6.15; not in the socket module
_PROBES_OFFSET = 3  # struct tcp_info in linux/tcp.h: 8 bytes, then u32s; this part has not changed since 2.6
_UNACKED_OFFSET = 24
_LAST_ACK_RECV_OFFSET = 56
_TCP_INFO_BYTES = 60
_CHECKS_PER_HEARTBEAT = 6


def set_keepalive(sock: socket.socket, heartbeat_s: float) -> None:
    """Lets the kernel break the link when it is idle and the peer's kernel is silent for about `heartbeat_s`."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle_s = max(1, int(heartbeat_s / 3))
    interval_s = max(1, int(heartbeat_s / 5))
    count = max(2, round((heartbeat_s - idle_s) / interval_s))
    for name, value in (("TCP_KEEPIDLE", idle_s), ("TCP_KEEPINTVL", interval_s), ("TCP_KEEPCNT", count)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if DETECTS_CUT_LINK:
        try:
            # Else retransmissions and probes back off to 120 s: a mended link would stay silent, a cut one unnoticed.
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, max(1000, int(heartbeat_s * 1000 / 4)))
        except OSError:
            pass


class SilenceClock:
    """Decides from successive looks at TCP_INFO whether a link is cut: pure, times in seconds."""

    __slots__ = ("_heartbeat_s", "_waiting_since")

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._waiting_since: float | None = None

    def is_cut(self, now: float, unacked: int, probes: int, last_ack_age_s: float) -> bool:
        """Whether an answer has been outstanding for `heartbeat_s`, at every look since, and none came meanwhile.

        One lost probe of a closed window proves nothing, so two are wanted; data in flight is sent again by itself.
        """
        if unacked == 0 and probes < 2:
            self._waiting_since = None
            return False
        since = self._waiting_since
        if since is None or now - last_ack_age_s > since:
            self._waiting_since = now
            return False
        return now - since >= self._heartbeat_s * (1 - 1 / _CHECKS_PER_HEARTBEAT)


class Watched(Protocol):
    """A link that wants to be looked at several times per heartbeat."""

    @property
    def heartbeat_s(self) -> float: ...

    def look(self, now: float) -> None: ...


class LinkWatch:
    """Calls `on_cut` once when the TCP link under `sock` is cut, until `stop`."""

    __slots__ = ("_clock", "_loop", "_on_cut", "_sock", "heartbeat_s")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, heartbeat_s: float, on_cut: Callable[[], None]
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self._sock = sock
        self._on_cut = on_cut
        self._clock = SilenceClock(heartbeat_s)
        self._loop = loop
        watch(loop, self)

    def stop(self) -> None:
        """Forgets the link; idempotent."""
        unwatch(self._loop, self)

    def look(self, now: float) -> None:
        """Takes one look at the link."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            self.stop()  # the socket is closed: its end is told elsewhere
            return
        if len(info) < _TCP_INFO_BYTES:
            return
        (unacked,) = struct.unpack_from("=I", info, _UNACKED_OFFSET)
        (last_ack_age_ms,) = struct.unpack_from("=I", info, _LAST_ACK_RECV_OFFSET)
        if self._clock.is_cut(now, unacked, info[_PROBES_OFFSET], last_ack_age_ms / 1000):
            self.stop()
            self._on_cut()


class _Monitor:
    """The timer of one event loop; it runs only while there are links."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._watches: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._interval_s = 0.0

    def add(self, watched: Watched) -> None:
        interval_s = watched.heartbeat_s / _CHECKS_PER_HEARTBEAT
        if not self._watches or interval_s < self._interval_s:
            self._interval_s = interval_s
            self._schedule()
        self._watches.add(watched)

    def discard(self, watched: Watched) -> None:
        self._watches.discard(watched)
        if not self._watches and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = self._loop()
        self._timer = None if loop is None else loop.call_later(self._interval_s, self._look)

    def _look(self) -> None:
        self._timer = None
        loop = self._loop()
        if loop is None:
            return
        now = loop.time()
        for watched in tuple(self._watches):
            watched.look(now)
        if self._watches:
            self._schedule()


_monitors: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Monitor] = weakref.WeakKeyDictionary()


def watch(loop: asyncio.AbstractEventLoop, watched: Watched) -> None:
    """Has `watched.look` called by the loop several times per heartbeat, until `unwatch`."""
    monitor = _monitors.get(loop)
    if monitor is None:
        monitor = _monitors[loop] = _Monitor(loop)
    monitor.add(watched)


def unwatch(loop: asyncio.AbstractEventLoop, watched: Watched) -> None:
    """Undoes `watch`; idempotent."""
    monitor = _monitors.get(loop)
    if monitor is not None:
        monitor.discard(watched)
