"""What all ops are, the records inside of them, and the ops that go both ways on control links."""

from __future__ import annotations

import msgspec

from zmqtasks.ids import Key


class Op(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=False):
    """Base of all ops."""


class TaskOptions(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a user may say about tasks; one record is shared by a whole `map`."""

    priority: int = 0
    """Higher runs earlier."""
    retries: int = 0
    """Attempts after the first one that raises."""
    workers: list[str] = []
    """Names, addresses or hosts of workers that may run it; empty: any."""
    allow_other_workers: bool = False
    resources: dict[str, float] = {}
    idempotent: bool = True
    """False: not run again when a worker died while it was executing; the task fails as `KilledWorker` instead."""
    actor: int = 0
    """1: makes an actor, which stays on its worker. 2: calls the actor that is its last input, where that is."""


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a task failed."""

    kind: str
    """`exception`: raised by the task; else the name of a class in `zmqtasks.errors`, made by the scheduler."""
    text: str
    """`ValueError: message`, or the message of the scheduler's error."""
    payload: bytes = b""
    """Inline payload of (exception, pickled traceback or None, links to causes and contexts); empty when the scheduler made
    the error."""
    traceback_text: str = ""
    key: Key = 0
    """The task that failed first; others fail because they depend on it."""
    name: str = ""
    worker: str = ""


class LogRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A line that a task printed, warned or logged."""

    level: int
    """As in the logging module; 0 for stdout, 1 for stderr."""
    logger: str
    text: str
    worker: str = ""
    category: str = ""
    """For warnings: the name of the category."""


class PutFunctions(Op, frozen=True, tag=10):
    """Functions, once per link; later ops refer to them by digest."""

    digests: list[bytes]
    functions: list[bytes]


class Goodbye(Op, frozen=True, tag=11):
    """The sender leaves in good order; the session ends and is not resumed."""

    reason: str = ""


class LogMessages(Op, frozen=True, tag=12):
    """Output of tasks, on its way from a worker to every client."""

    records: list[LogRecord]
