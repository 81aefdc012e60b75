"""A lock under which Ctrl-C waits: what is done there is done whole.

Python calls the handler of a signal in the main thread, between any two of its calls. A KeyboardInterrupt in the middle of a
submission would leave records without their tasks, or a batch without its number, which ends the session: all futures of
the client would be lost to one key. So while the main thread has the lock, SIGINT is only noted, and happens right after. It takes
two system calls; the functions of `signal` itself, which turn numbers into enumerations and back, would take ten times as long.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import threading
from _thread import get_ident
from types import FrameType
from typing import Any

_SIGINT = int(_signal.SIGINT)


class UninterruptedLock:
    """As `threading.Lock`, for `with` only. Not reentrant."""

    __slots__ = ("_former", "_lock", "_noted")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._former: Any = None  # the main thread's handler, while it is replaced
        self._noted = False

    def locked(self) -> bool:
        """Whether some thread has it."""
        return self._lock.locked()

    def __enter__(self) -> None:
        if get_ident() == threading.main_thread().ident:
            self._put_off()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._former is not None and get_ident() == threading.main_thread().ident:
            former, self._former = self._former, None
            _signal.signal(_SIGINT, former)
            if self._noted:
                _signal.raise_signal(_SIGINT)

    def _put_off(self) -> None:
        former = _signal.getsignal(_SIGINT)
        if former is None:  # not Python's, and could not be put back
            return
        self._noted = False
        try:
            _signal.signal(_SIGINT, self._note)
        except ValueError:  # another interpreter of this process has the signals
            return
        self._former = former

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
