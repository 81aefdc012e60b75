"""A thread that looks after leases whose link is over, and gives idle memory back; it lives while there is something to do.

No event loop is needed: the one of a link may be closed long before the last array that came over it is gone.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.transports.shm.arena import Arena
from zmqtasks.transports.shm.channel import Channel

_log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How soon the thread takes up what is new."""

_lock = threading.Lock()
_bell = threading.Event()
"""Something is to be done at once; heard while there are no channels to listen to."""
_orphans: dict[int, Channel] = {}  # by descriptor
_arenas: set[Arena] = set()
_thread: threading.Thread | None = None


def adopt(channel: Channel) -> None:
    """Looks after the leases of a channel whose comm has ended, until the last is back."""
    with _lock:
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
    while True:
        with _lock:
            arenas = list(_arenas)
            channels = dict(_orphans)
            if not arenas and not channels:
                _thread = None
                return
        if channels:
            _listen(channels)
            channels.clear()
        else:
            _bell.wait(_LOOK_S)
        _bell.clear()
        now = time.monotonic()
        for arena in arenas:
            if not arena.trim(now):
                with _lock:
                    _arenas.discard(arena)


def _listen(channels: dict[int, Channel]) -> None:
    readable = select.poll()
    for descriptor in channels:
        readable.register(descriptor, select.POLLIN)
    for descriptor, _ in readable.poll(_LOOK_S * 1000):
        _receive(descriptor, channels[descriptor])


def _receive(descriptor: int, channel: Channel) -> None:
    try:
        going_on = channel.receive_untrusted() and bool(channel.leases)
    except RemoteProtocolError as exc:
        # What it still has cannot be known: its blocks stay out of use until its process is gone.
        _log.warning("a peer whose link is over does not return memory in good order: %s", exc)
        return
    if not going_on:
        with _lock:
            _orphans.pop(descriptor, None)


def _forget_after_fork() -> None:
    """A child has none of its parent's threads, and its leases are none of the child's business."""
    global _lock, _bell, _thread
    _lock, _bell, _thread = threading.Lock(), threading.Event(), None
    _orphans.clear()
    _arenas.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
