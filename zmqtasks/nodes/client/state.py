"""What a client remembers of a key: one record, shared by all futures of the key.

Theory of operation
-------------------
A record is PENDING from its making until the scheduler tells the fate of its key. `TRANSITIONS` lists the steps that change
it from then on; CANCELLED and LOST are final. Records are touched under the lock of the client only, except that anybody may
read `status` and `value` of a settled one: `value` is written first.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import msgspec

from zmqtasks.ids import Key
from zmqtasks.protocol.ops import ErrorInfo


class Status(Enum):
    """The fate of a key, as users read it in `Future.status`."""

    PENDING = "pending"
    FINISHED = "finished"
    ERROR = "error"
    CANCELLED = "cancelled"
    LOST = "lost"


PENDING, FINISHED, ERROR, CANCELLED, LOST = Status

TRANSITIONS: dict[tuple[Status, Status], str] = {
    (PENDING, FINISHED): "KeysInMemory",
    (PENDING, ERROR): "KeysErred",
    (PENDING, CANCELLED): "cancelled by this client, KeysCancelled, or the client was closed",
    (PENDING, LOST): "KeysCancelled of a kind that nobody asked for, or the scheduler is gone",
    (FINISHED, FINISHED): "KeysInMemory again: it was computed a second time",
    (FINISHED, PENDING): "KeysRecomputing",
    (FINISHED, ERROR): "KeysErred: the second computation failed",
    (FINISHED, CANCELLED): "cancelled by this client, or KeysCancelled",
    (FINISHED, LOST): "KeysCancelled: the last replica is gone",
    (ERROR, PENDING): "retried by this client, or KeysRecomputing: another one has retried it",
    (ERROR, FINISHED): "KeysInMemory: another client has retried it",
    (ERROR, ERROR): "KeysErred: another client has retried it, in vain",
    (ERROR, CANCELLED): "cancelled by this client, or KeysCancelled",
    (ERROR, LOST): "KeysCancelled",
}
"""Every step of a record, and what causes it. What the scheduler says of a final record came too late, and is dropped."""


class Waiter(Protocol):
    """Somebody who waits for records. Called under the lock of the client: it must neither block nor call back."""

    def settled(self, state: FutureState) -> None:
        """`state` has left PENDING; called once for each time that the waiter was added to it."""


class Fault(msgspec.Struct, frozen=True, gc=False):
    """Why a record is cancelled or lost: the name of a class in `zmqtasks.errors`, and the reason."""

    kind: str
    reason: str


class FutureState(msgspec.Struct, eq=False, gc=False):
    """One key. A struct without collector: a client makes one for each task, in about 0.12 us."""

    key: Key
    owner: Any
    """The node of the client; opaque to the machine."""
    name: str = ""
    refs: int = 1
    """Futures that were made and not yet found dropped."""
    status: Status = PENDING
    value: bytes | ErrorInfo | Fault | None = None
    """FINISHED: the inline result, or None when it is to be fetched. ERROR: the error. CANCELLED, LOST: the fault."""
    size: int = 0
    wanted: bool = True
    """The scheduler counts this client as holding the key on account of this record."""
    fence: int = 0
    """Until the answer to this request, what is told of the key is about a former record."""
    spec: bytes = b""
    """For named keys: a digest of what was submitted, to tell a repetition from a conflict."""
    waiters: list[Waiter] | None = None
