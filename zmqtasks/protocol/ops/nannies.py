"""Between the scheduler and nannies."""

from __future__ import annotations

from zmqtasks.protocol.ops.base import Op


class WorkerStarted(Op, frozen=True, tag=100):
    """A nanny has started a worker process (which introduces itself in a moment)."""

    instance: bytes
    pid: int


class WorkerExited(Op, frozen=True, tag=101):
    """A worker process has ended: the one report that counts as a death."""

    instance: bytes
    exit_code: int
    """As the process gave it; -N when signal N ended it."""
    cause: str
    """For people: `killed by SIGKILL`, `exited with code 3`, `over its memory limit (...)`, `out of memory (kernel)`."""
    executing: list[int]
    """Run ids that the process was executing at that moment."""
    expected: bool = False
    """It was asked to end."""
    restarting: bool = False


class CheckWorker(Op, frozen=True, tag=102):
    """Asks a nanny about a worker that does not answer; answered by `WorkerChecked`, or `WorkerExited`."""

    instance: bytes


class WorkerChecked(Op, frozen=True, tag=103):
    """The process lives."""

    instance: bytes
    stopped: bool
    """Frozen by SIGSTOP or a debugger."""


class RestartWorkers(Op, frozen=True, tag=104):
    """The nanny is to end its worker processes now and start new ones; empty list: all."""

    instances: list[bytes] = []


class StopNanny(Op, frozen=True, tag=105):
    """The nanny is to end its workers and itself, in good order."""

    reason: str
