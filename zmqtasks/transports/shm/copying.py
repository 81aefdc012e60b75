"""Copying a frame into a block of the arena: piece by piece, the large ones with a second thread.

One processor alone does not fill the memory's bandwidth: it copies 12 GB/s into warm memory, two 16 (`python -m bench.shm`).
So the loop copies from the front and a helper from the back, until they meet: a helper that gets no processor costs
nothing. New pages are written by one alone, as the kernel lets one writer at a time into a file.
"""

from __future__ import annotations

import os
import queue
import threading

import numpy as np

from zmqtasks.protocol.frames import MIB
from zmqtasks.transports.shm.arena import Arena, Block

HELP_FROM_BYTES = 8 * MIB
"""Smaller frames are copied almost before the helper is awake."""

_CHUNK_BYTES = 2 * MIB
"""What the helper takes at a time, and so what the loop may have to wait for when they have met: 0.2 ms."""


class Copy:
    """The content of a frame on its way into `block`."""

    __slots__ = ("_arena", "_content", "_done", "_help", "block")

    def __init__(self, arena: Arena, block: Block, content: memoryview) -> None:
        self.block = block
        self._arena = arena
        self._content = content
        self._done = 0
        self._help: _Help | None = None
        if len(content) >= HELP_FROM_BYTES and _several_processors():
            target = arena.mapped(block, len(content))
            if target is not None:
                self._help = _Help(target, content)

    @property
    def complete(self) -> bool:
        """Whether all is there. May wait for the helper's last piece."""
        return self._done == len(self._content) if self._help is None else self._help.has_met()

    def advance(self, budget: int) -> int:
        """Copies a piece of at most `budget` bytes, and tells its size."""
        if self._help is not None:
            return self._help.copy_front(budget)
        piece = self._content[self._done : self._done + budget]
        self._arena.fill(self.block, self._done, piece)
        self._done += len(piece)
        return len(piece)

    def stop(self) -> None:
        """After that nobody writes to the block any more."""
        if self._help is not None:
            self._help.stop()


class _Help:
    """A copy by two threads; what is between `_front` and `_back` nobody has begun with."""

    __slots__ = ("_back", "_front", "_helping", "_lock", "_source", "_target")

    def __init__(self, target: memoryview, source: memoryview) -> None:
        self._target = np.frombuffer(target, np.uint8)
        self._source = np.frombuffer(source, np.uint8)
        self._front = 0
        self._back = len(source)
        self._lock = threading.Lock()
        self._helping = threading.Lock()  # the helper has it while it copies
        _ask_helper(self)

    def copy_front(self, budget: int) -> int:
        with self._lock:
            start = self._front
            left = self._back - start
            self._front = end = start + min(budget, left, max(left // 2, _CHUNK_BYTES))
        self._copy(start, end)
        return end - start

    def has_met(self) -> bool:
        if self._front < self._back:
            return False
        with self._helping:
            return True

    def copy_back(self) -> None:
        """The helper's share."""
        with self._helping:
            while True:
                with self._lock:
                    end = self._back
                    self._back = start = max(end - _CHUNK_BYTES, self._front)
                if start == end:
                    return
                self._copy(start, end)

    def stop(self) -> None:
        with self._lock:
            self._back = self._front
        with self._helping:
            pass

    def _copy(self, start: int, end: int) -> None:
        np.copyto(self._target[start:end], self._source[start:end])  # without the GIL


_waiting: queue.SimpleQueue[_Help] = queue.SimpleQueue()
_helper: threading.Thread | None = None
_helper_lock = threading.Lock()


def _ask_helper(copy: _Help) -> None:
    global _helper
    _waiting.put(copy)
    if _helper is None or not _helper.is_alive():  # in a forked process it is not
        with _helper_lock:
            if _helper is None or not _helper.is_alive():
                _helper = threading.Thread(target=_run_helper, name="zmqtasks-copy", daemon=True)
                _helper.start()


def _run_helper() -> None:
    while True:
        _waiting.get().copy_back()


def _several_processors() -> bool:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) > 1 if affinity is not None else (os.cpu_count() or 1) > 1
