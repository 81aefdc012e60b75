"""Between clients and the scheduler: locks, semaphores, events, variables, queues and datasets."""

from __future__ import annotations

from zmqtasks.ids import Key
from zmqtasks.protocol.ops.base import Op


class AcquireLease(Op, frozen=True, tag=50):
    """Asks for a lease of a semaphore (a lock has one); answered by `QueryAnswered`: whether it was granted.

    The lease is called by the number of this request.
    """

    request: int
    name: str
    max_leases: int = 1
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class GiveUp(Op, frozen=True, tag=51):
    """Gives back what a request was granted (a lease, values), or ends its wait, whichever it is by now.

    Answered by `QueryAnswered`, unless `request` is 0.
    """

    request: int
    number: int
    """Of the request."""


class ReadLeases(Op, frozen=True, tag=52):
    """Asks for the leases of a semaphore that are held; answered by `QueryAnswered`."""

    request: int
    name: str
    holders: bool = False
    """Answered by the names of the clients that hold them, not by their number."""


class CloseSemaphore(Op, frozen=True, tag=53):
    """Ends a semaphore: waiting and later requests for leases fail; answered by `QueryAnswered`."""

    request: int
    name: str


class SetEvent(Op, frozen=True, tag=54):
    """Sets or clears an event; answered by `QueryAnswered`."""

    request: int
    name: str
    value: bool


class WaitEvent(Op, frozen=True, tag=55):
    """Waits until an event is set; answered by `QueryAnswered`: whether it is."""

    request: int
    name: str
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class SetValue(Op, frozen=True, tag=110):
    """Gives a shared name its value; answered by `QueryAnswered`: whether it has it now."""

    request: int
    kind: str
    """`variable` or `dataset`."""
    name: str
    value: bytes
    """Inline payload."""
    keys: list[Key] = []
    """Of the futures inside: wanted for as long as the name has this value."""
    new: bool = False
    """Nothing is done when the name has a value already."""


class GetValue(Op, frozen=True, tag=111):
    """Asks for the value of a shared name, when it has one; answered by `QueryAnswered`: [value, whether it has keys], or None.

    The keys of a value that has some stay wanted until `Received`, or `GiveUp`.
    """

    request: int
    kind: str
    name: str
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class DeleteValue(Op, frozen=True, tag=112):
    """Takes the value of a shared name away; answered by `QueryAnswered`: whether there was one."""

    request: int
    kind: str
    name: str


class ListValues(Op, frozen=True, tag=113):
    """Asks which names of a kind have values; answered by `QueryAnswered`."""

    request: int
    kind: str


class PutItem(Op, frozen=True, tag=114):
    """Puts a value into a queue when it has room; answered by `QueryAnswered`: [closings, whether it is in the queue]."""

    request: int
    name: str
    value: bytes
    """Inline payload."""
    keys: list[Key] = []
    """Of the futures inside: wanted for as long as the value is in the queue."""
    maxsize: int = 0
    """How many values the queue holds; 0: as many as others have said."""
    closings: int = -1
    """As in the last answer about this queue: refused when it was closed since; -1: there was none."""
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class GetItems(Op, frozen=True, tag=115):
    """Takes values out of a queue; answered by `QueryAnswered`: [closings, values], no list when time is up.

    They are the asker's with `Received`. With `GiveUp` they go back to where they were.
    """

    request: int
    name: str
    count: int = 1
    """Waits for so many; 0: takes what is there, and waits for nothing."""
    closings: int = -1
    timeout_s: float | None = None
    """None: waits as long as it takes."""


class Received(Op, frozen=True, tag=116):
    """What was answered to a `GetValue` or `GetItems` has arrived: the asker wants the keys inside itself. Not answered."""

    number: int
    """Of the request."""


class ReadQueue(Op, frozen=True, tag=117):
    """Asks how many values a queue holds; answered by `QueryAnswered`: [closings, number]."""

    request: int
    name: str
    closings: int = -1


class CloseQueue(Op, frozen=True, tag=118):
    """Drops what is in a queue, and ends all waits for it; a later use begins anew. Answered by `QueryAnswered`."""

    request: int
    name: str
