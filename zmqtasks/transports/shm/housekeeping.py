"""A thread that looks after leases whose link is over, in both directions, and gives idle memory back.

It lives while there is something to do.

No event loop is needed: the one of a link may be closed long before the last array that came over it is gone.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref

from zmqtasks.errors import CommBrokenError, RemoteProtocolError
from zmqtasks.transports.shm.arena import Arena
from zmqtasks.transports.shm.channel import Channel, ReturningHalf

_log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How soon the thread takes up what is new."""

_lock = threading.Lock()
_bell = threading.Event()
"""Something is to be done at once; heard while there are no channels to listen to."""
_orphans: dict[int, Channel] = {}  # by descriptor
_in_bad_order: set[int] = set()  # of them, those that have been told of
_halves: list[weakref.ref[ReturningHalf]] = []
_arenas: set[Arena] = set()
_thread: threading.Thread | None = None


def adopt(channel: Channel) -> None:
    """Looks after the leases of a channel whose comm has ended, until the last one is back that either side has."""
    half: weakref.ref[ReturningHalf] | None = None
    if (returning := channel.end()) is not None:
        returning.on_full = None
        half = weakref.ref(returning)
        del returning
        if half() is None:  # no lease is returned by it
            half = None
    if half is None and not channel.leases:
        return
    with _lock:
        if half is not None:
            _halves.append(half)
        if channel.leases:
            _orphans[channel.fileno()] = channel
        _wake()
    _bell.set()


def look_after(arena: Arena) -> None:
    """Gives idle memory of the arena back when it is time."""
    if arena not in _arenas or _thread is None:
        with _lock:
            _arenas.add(arena)
            _wake()
    if arena.unmapped:
        _bell.set()


def _wake() -> None:
    global _thread
    if _thread is None or not _thread.is_alive():
        thread = threading.Thread(target=_keep_house, name="zmqtasks-arena", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # too many threads, or the interpreter ends: the next call tries again
            return
        _thread = thread


def _keep_house() -> None:
    global _thread
    try:
        while _has_work():
            with _lock:
                channels = dict(_orphans)
            if channels:
                _listen(channels)
                channels.clear()
            else:
                _bell.wait(_LOOK_S)
            _bell.clear()
            _tell_peers()
            _trim()
    except BaseException:
        _thread = None  # the next call makes another
        raise


def _has_work() -> bool:
    """False: the thread is none any more."""
    global _thread
    with _lock:
        if not _arenas and not _orphans and not _halves:
            _thread = None
            return False
        return True


def _tell_peers() -> None:
    """Returns leases whose news found the channel full, and forgets halves whose leases are all back."""
    with _lock:
        _halves[:] = [half for half in _halves if half() is not None]
        halves = list(_halves)
    for half in halves:
        if (returning := half()) is not None and returning.has_news:
            returning.flush()


def _trim() -> None:
    with _lock:
        arenas = list(_arenas)
        _arenas.clear()  # first: who calls `look_after` from now on has seen something that this trim may not
    now = time.monotonic()
    for arena in arenas:
        if arena.trim(now):
            with _lock:
                _arenas.add(arena)


def _listen(channels: dict[int, Channel]) -> None:
    readable = select.poll()
    for descriptor in channels:
        readable.register(descriptor, select.POLLIN)
    for descriptor, _ in readable.poll(_LOOK_S * 1000):
        _receive(descriptor, channels[descriptor])


def _receive(descriptor: int, channel: Channel) -> None:
    before = len(channel.leases)
    try:
        going_on = channel.receive_untrusted() and bool(channel.leases)
    except (RemoteProtocolError, CommBrokenError) as exc:
        # What it still has cannot be known: its blocks stay out of use until its process is gone.
        if descriptor not in _in_bad_order:
            _in_bad_order.add(descriptor)
            _log.warning("a peer whose link is over does not return memory in good order: %s", exc)
        return
    with _lock:
        if not going_on:
            _orphans.pop(descriptor, None)
            _in_bad_order.discard(descriptor)
        if len(channel.leases) < before and channel.arena is not None:
            _arenas.add(channel.arena)  # what has come back is idle now


def _forget_after_fork() -> None:
    """A child has none of its parent's threads, and its leases are none of the child's business."""
    global _lock, _bell, _thread
    _lock, _bell, _thread = threading.Lock(), threading.Event(), None
    _orphans.clear()
    _in_bad_order.clear()
    _halves.clear()
    _arenas.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
