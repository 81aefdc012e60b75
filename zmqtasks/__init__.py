"""zmqtasks: futures and task graphs on a cluster, over pluggable transports."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zmqtasks.actors import Actor, ActorFuture
    from zmqtasks.client import Client
    from zmqtasks.config import Config
    from zmqtasks.coordination import Event, Lock, Semaphore
    from zmqtasks.deploy.local import LocalCluster
    from zmqtasks.errors import (
        ActorLostError,
        CancelledError,
        KilledWorker,
        LeaseError,
        LostDataError,
        PluginError,
        QueueError,
        TaskTimeoutError,
        ZmqTasksError,
    )
    from zmqtasks.future import Future
    from zmqtasks.nodes.worker.context import get_worker, is_cancelled, print, rejoin, secede, warn  # noqa: A004
    from zmqtasks.plugins import WorkerPlugin
    from zmqtasks.progressbar import progress
    from zmqtasks.protocol.serialize import register_serialization, register_serialization_family
    from zmqtasks.security import ClusterKey, Security
    from zmqtasks.sessions import default_client, get_client, worker_client
    from zmqtasks.sharing import Queue, Variable
    from zmqtasks.waiting import as_completed, fire_and_forget, futures_of, wait

_HOMES = {
    "Actor": "actors",
    "ActorFuture": "actors",
    "ActorLostError": "errors",
    "CancelledError": "errors",
    "Client": "client",
    "ClusterKey": "security",
    "Config": "config",
    "Event": "coordination",
    "Future": "future",
    "KilledWorker": "errors",
    "LeaseError": "errors",
    "LocalCluster": "deploy.local",
    "Lock": "coordination",
    "LostDataError": "errors",
    "PluginError": "errors",
    "Queue": "sharing",
    "QueueError": "errors",
    "Security": "security",
    "Semaphore": "coordination",
    "TaskTimeoutError": "errors",
    "Variable": "sharing",
    "WorkerPlugin": "plugins",
    "ZmqTasksError": "errors",
    "as_completed": "waiting",
    "default_client": "sessions",
    "fire_and_forget": "waiting",
    "futures_of": "waiting",
    "get_client": "sessions",
    "get_worker": "nodes.worker.context",
    "is_cancelled": "nodes.worker.context",
    "print": "nodes.worker.context",
    "progress": "progressbar",
    "register_serialization": "protocol.serialize",
    "register_serialization_family": "protocol.serialize",
    "rejoin": "nodes.worker.context",
    "secede": "nodes.worker.context",
    "wait": "waiting",
    "warn": "nodes.worker.context",
    "worker_client": "sessions",
}
"""Where the public names live: each module is loaded with the first use of one of its names."""

__all__ = [
    "Actor",
    "ActorFuture",
    "ActorLostError",
    "CancelledError",
    "Client",
    "ClusterKey",
    "Config",
    "Event",
    "Future",
    "KilledWorker",
    "LeaseError",
    "LocalCluster",
    "Lock",
    "LostDataError",
    "PluginError",
    "Queue",
    "QueueError",
    "Security",
    "Semaphore",
    "TaskTimeoutError",
    "Variable",
    "WorkerPlugin",
    "ZmqTasksError",
    "__version__",
    "as_completed",
    "default_client",
    "fire_and_forget",
    "futures_of",
    "get_client",
    "get_worker",
    "is_cancelled",
    "print",
    "progress",
    "register_serialization",
    "register_serialization_family",
    "rejoin",
    "secede",
    "wait",
    "warn",
    "worker_client",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zmqtasks' has no attribute {name!r}")
    value = getattr(import_module(f"zmqtasks.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
