"""Waiting for a lock that somebody else releases, such that Ctrl-C is always heard.

CPython's main thread looks for signals, releases the GIL, and only then goes to sleep. A signal in between does not wake it:
its handler runs when the wait ends, which may be never. On a busy machine another thread may take over just there, which makes
the moment long. So a wait looks up now and then.
"""

from __future__ import annotations

import threading
import time
from _thread import LockType
from collections.abc import Callable

LOOK_S = 0.5
"""How late Ctrl-C may be heard."""


def closed_gate() -> LockType:
    """A lock that is taken: who waits at it passes when it is released."""
    gate = threading.Lock()
    gate.acquire()
    return gate


def open_gate(gate: LockType) -> None:
    """Lets the one who waits pass, now or when it comes; further calls do nothing."""
    try:
        gate.release()
    except RuntimeError:  # open already
        pass


def pass_gate(gate: LockType, timeout_s: float | None) -> bool:
    """Whether the gate was opened in time. Ctrl-C raises KeyboardInterrupt in the main thread."""
    return in_slices(lambda slice_s: gate.acquire(timeout=slice_s), timeout_s)


def in_slices(wait: Callable[[float], bool], timeout_s: float | None) -> bool:
    """Whether `wait`, which gets the seconds it may take and tells whether it is over, was over in time."""
    if timeout_s is None:
        while not wait(LOOK_S):
            pass
        return True
    end = time.monotonic() + min(timeout_s, threading.TIMEOUT_MAX)
    while timeout_s > LOOK_S:
        if wait(LOOK_S):
            return True
        timeout_s = end - time.monotonic()
    return wait(max(timeout_s, 0.0))
