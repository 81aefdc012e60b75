"""The one arena of a process: made when first asked for, forgotten in a child after a fork."""

from __future__ import annotations

import errno
import logging
import os
import threading

from zmqtasks.protocol.frames import GIB, MIB
from zmqtasks.transports.host_memory import available_memory_bytes
from zmqtasks.transports.shm.arena import Arena

_log = logging.getLogger(__name__)

_MEMORY_SHARE = 4
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SMALLEST_LIMIT_BYTES = 64 * MIB


def default_limit_bytes() -> int:
    """A quarter of the memory of this machine, or of this process's control group where that has less."""
    return max(available_memory_bytes() // _MEMORY_SHARE, _SMALLEST_LIMIT_BYTES)


_arena: Arena | None = None
_tried = False
_making = threading.Lock()


def process_arena() -> Arena | None:
    """The arena of this process, made when first asked for; None where the system does not give one."""
    global _arena, _tried
    with _making:
        if not _tried:
            _tried = True
            limit = default_limit_bytes()
            try:
                _arena = Arena(limit, max(4 * limit, 4 * GIB))
            except OSError as exc:
                _tried = exc.errno not in _PASSING  # then the next link tries again
                _log.warning("no shared memory for large messages, which go through the socket instead: %s", exc)
        return _arena


def lent_bytes() -> int:
    """Memory that this process's arena takes, if it has one."""
    return _arena.resident_bytes if _arena is not None else 0


def _forget_after_fork() -> None:
    """A child has no business with blocks that its parent lends."""
    global _arena, _tried, _making
    _arena, _tried, _making = None, False, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
