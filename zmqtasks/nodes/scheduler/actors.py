"""What is special about the tasks that make actors and those that call them: they happen once.

An actor is the result of a task that stays on one worker: what goes to others merely stands for it. A call is a task whose
last input is the actor: `Placement` sends it to that worker at once, in the order in which calls become ready, and beside the
tasks there. Neither is done again when something is lost, since it has had its effects: the task fails instead, and the error
says so. A client's retry makes an actor anew.
"""

from __future__ import annotations

from zmqtasks.nodes.scheduler.placement import MAKES_ACTOR
from zmqtasks.nodes.scheduler.state import TaskState, WorkerState
from zmqtasks.protocol.ops import ErrorInfo


def makes_actor(ts: TaskState) -> bool:
    """Whether the result of the task is an actor."""
    return ts.spec is not None and ts.spec.options.actor == MAKES_ACTOR


def actor_lost(ts: TaskState, worker: WorkerState, cause: str) -> ErrorInfo:
    """The error of an actor whose worker is gone."""
    text = (
        f"the actor {ts.name} is lost with its worker {worker.name} at {worker.address}: {cause}; "
        "client.retry(future) makes a new one"
    )
    return _error(ts, text, worker)


def happened_already(ts: TaskState) -> ErrorInfo | None:
    """Why a task cannot be computed again; None for all that can."""
    if ts.spec is None or not ts.spec.options.actor or ts.rare is None or ts.rare.home is None:
        return None
    if makes_actor(ts):
        text = (
            f"the actor {ts.name} was released, and is not made again by itself; client.retry(future) makes a new one"
        )
    else:
        text = (
            f"the result of {ts.name} is lost, and methods of actors are not called again: call it once more yourself"
        )
    return _error(ts, text, ts.rare.home)


def _error(ts: TaskState, text: str, worker: WorkerState) -> ErrorInfo:
    return ErrorInfo("ActorLostError", text, key=ts.key, name=ts.spec.name if ts.spec else "", worker=worker.address)
