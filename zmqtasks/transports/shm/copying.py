"""Copying a frame into a block of the arena: piece by piece, the large ones with a second thread.

One processor alone does not fill the memory's bandwidth: it copies 12 to 14 GB/s into warm memory, two 19 to 23
(`python -m bench.shm`). So the loop copies from the front and a helper from the back, until they meet; a helper that gets no
processor leaves all to the loop. New pages are written by one alone, as the kernel lets one writer at a time into a file.

Pieces are small, so that the loop goes on and the two meet in time. Where larger ones go past the caches (`non_temporal`) they
are larger: the loop then stands still for 2 to 4 ms, and waits as much longer for a helper that loses its processor.
"""

from __future__ import annotations

import logging
import os
import queue
import threading

import numpy as np

from zmqtasks.protocol.frames import ALIGNMENT, MIB
from zmqtasks.transports import non_temporal
from zmqtasks.transports.shm.arena import Arena, Block

_log = logging.getLogger(__name__)

HELP_FROM_BYTES = 8 * MIB
"""Smaller frames are copied almost before the helper is awake."""

_CHUNK_BYTES = 2 * MIB
"""What the helper takes at a time, of small pieces: 0.2 ms."""

_LARGE_BYTES = 16 * MIB
"""Pieces from which on copies go past the caches may have this size at most; a piece is less than twice as long."""

_LAST_CHUNK_S = 0.001
"""How long the loop waits for the helper's last piece in one turn; a helper that lost its processor has it look again."""


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
            helper = _helper() if target is not None else None
            if target is not None and helper is not None:
                self._help = _Help(target, content, _large_piece(len(content)))
                helper.put(self._help)

    def is_complete(self) -> bool:
        """Whether all is there; may wait a little for the helper's last piece."""
        if self._help is not None and self._help.failed:  # the loop does it all again, alone
            self._help.stop()
            self._help = None
        return self._done == len(self._content) if self._help is None else self._help.has_met()

    def advance(self, budget: int) -> int:
        """Copies a piece and tells its size: 0 when there is nothing left to begin with. Small ones have at most `budget` bytes."""
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

    __slots__ = ("_back", "_front", "_helping", "_large", "_lock", "_source", "_target", "failed")

    def __init__(self, target: memoryview, source: memoryview, large: int) -> None:
        """`large`: how much each takes at a time; 0: small pieces."""
        self._target = np.frombuffer(target, np.uint8)
        self._source = np.frombuffer(source, np.uint8)
        self._front = 0
        self._back = len(source)
        self._large = large
        self._lock = threading.Lock()
        self._helping = threading.Lock()  # the helper has it while it copies
        self.failed = False
        """A piece was taken that may not have been copied."""

    def copy_front(self, budget: int) -> int:
        with self._lock:
            start = self._front
            left = self._back - start
            self._front = end = start + self._piece(left, min(budget, max(left // 2, _CHUNK_BYTES)))
        self._copy(start, end)
        return end - start

    def _piece(self, left: int, small: int) -> int:
        if not self._large:
            return min(small, left)
        return self._large if left >= 2 * self._large else left  # no small rest is left behind

    def has_met(self) -> bool:
        if self._front < self._back or not self._helping.acquire(timeout=_LAST_CHUNK_S):
            return False
        self._helping.release()
        return not self.failed

    def copy_back(self) -> None:
        """The helper's share."""
        with self._helping:
            while True:
                with self._lock:
                    end = self._back
                    self._back = start = end - self._piece(end - self._front, _CHUNK_BYTES)
                if start == end:
                    return
                self._copy(start, end)

    def stop(self) -> None:
        with self._lock:
            self._back = self._front
        with self._helping:
            pass

    def _copy(self, start: int, end: int) -> None:
        try:
            np.copyto(self._target[start:end], self._source[start:end])  # without the GIL
        except BaseException:
            self.failed = True
            raise


def _large_piece(size_bytes: int) -> int:
    """An even part of a frame that goes past the caches, one or several for each of the two; 0: it takes small pieces."""
    least = non_temporal.threshold() or 0
    if not _CHUNK_BYTES < least <= _LARGE_BYTES or size_bytes < 2 * least:
        return 0
    return size_bytes // (size_bytes // (2 * least) * 2) & -ALIGNMENT


_Queue = queue.SimpleQueue[_Help]
_thread: threading.Thread | None = None
_queue: _Queue = queue.SimpleQueue()
_starting = threading.Lock()


def _helper() -> _Queue | None:
    """What the helper of this process takes copies from; None when the system gives no thread."""
    global _thread
    if _thread is None:
        with _starting:
            if _thread is None:
                thread = threading.Thread(target=_run_helper, args=(_queue,), name="zmqtasks-copy", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # too many threads, or the interpreter ends
                    return None
                _thread = thread
    return _queue


def _run_helper(copies: _Queue) -> None:
    while True:
        try:
            copies.get().copy_back()
        except Exception:
            _log.exception("copying with a helper failed: the loop copies alone")


def _several_processors() -> bool:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) > 1 if affinity is not None else (os.cpu_count() or 1) > 1


def _forget_after_fork() -> None:
    """A child has no helper, and no business with what its parent was copying."""
    global _thread, _queue, _starting
    _thread, _queue, _starting = None, queue.SimpleQueue(), threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
