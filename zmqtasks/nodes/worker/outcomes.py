"""What task threads report to the node's loop, in the order in which it happened in each thread."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from zmqtasks.nodes.worker.instructions import Finished
from zmqtasks.nodes.worker.state import Run
from zmqtasks.protocol.ops import ErrorInfo


class Erred(msgspec.Struct, gc=False, eq=False):
    """A run raised."""

    run: Run
    error: ErrorInfo
    duration_us: int


class NotStarted(msgspec.Struct, gc=False, eq=False):
    """A thread took a run that had been cancelled."""

    run: Run


class Blocked(msgspec.Struct, gc=False, eq=False):
    """A run waits for a future."""

    run: Run


class Resumed(msgspec.Struct, gc=False, eq=False):
    """A run has a slot again."""

    run: Run


class Seceded(msgspec.Struct, gc=False, eq=False):
    """A run left the slots."""

    run: Run


Outcome: TypeAlias = Finished | Erred | NotStarted | Blocked | Resumed | Seceded
