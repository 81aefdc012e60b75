"""Subjects that are compared take turns: what disturbs the machine for some seconds disturbs all of them.

Each is measured in a process of its own (`worker`), and only one of these computes at a time: it goes on until it comes to
the next figure, or within one to its next burst, or to the end of a run of round trips; then it says how far it is, and waits
until it is told to go on. The suite tells that to whoever is least far, in turn where some are equally far (`suite`). So the
same figure of all of them is taken at the same time, in pieces of up to a tenth of a second. All measure the figures that they have
in the same order: latency by size, bandwidth by size, all else.

Nothing of this happens until `wait_by` is called; then a figure waits where it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """How far a subject is in its round."""

    kind: int
    """Of the figure: latency, bandwidth, anything else."""
    size: int = 0
    """Of its messages."""


LATENCY, BANDWIDTH, REST = range(3)

_place = Place(LATENCY)
_wait: Callable[[Place], None] | None = None
_waited_s = 0.0


def wait_by(wait: Callable[[Place], None] | None) -> None:
    """`wait` returns when this process is to go on; None: it never waits."""
    global _wait, _place
    _wait = wait
    _place = Place(LATENCY)


def each_in_turn(kind: int, sizes: Sequence[int]) -> Iterator[int]:
    """The sizes of messages, each when it is its turn; what is measured after the last is of `REST`."""
    global _place
    for size in sizes:
        _place = Place(kind, size)
        take_turn()
        yield size
    _place = Place(REST)


def take_turn() -> bool:
    """Waits until this process is to go on; blocks the thread, and so the event loop. False: there is nobody to wait for."""
    global _waited_s
    if _wait is None:
        return False
    began = time.perf_counter()
    _wait(_place)
    _waited_s += time.perf_counter() - began
    return True


def clock() -> float:
    """Seconds in which this process was not waiting for its turn."""
    return time.perf_counter() - _waited_s
