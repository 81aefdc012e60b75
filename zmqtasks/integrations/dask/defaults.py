"""dask's configuration while there is a default client: collections compute on it, and shuffle in a way for many nodes.

dask asks its configuration for a scheduler each time that something is computed. What stands there while a client is the default
one is a `ClientScheduler`, which asks in turn which client is meant: inside of a task that is the one of its worker.
"""

from __future__ import annotations

import threading
from typing import Any

import dask
import dask.config
from dask.base import _ensure_not_async

from zmqtasks import sessions
from zmqtasks.integrations.dask import collections, locks

SETTINGS: dict[str, Any] = {"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}
"""dask would shuffle through a disk that all share, or by the p2p method of dask.distributed. What the user has set stays."""


class ClientScheduler:
    """What dask calls to compute a graph: the client in charge here, or dask's threads when there is none."""

    def __call__(self, graph: Any, keys: Any, **options: Any) -> Any:
        try:
            client = sessions.get_client()
        except ValueError:
            from dask import threaded

            return threaded.get(checked(graph), keys, **options)
        get = _ensure_not_async(client)
        if get != client.get:  # what dask is told to use while the client is an asynchronous one
            return get(checked(graph), keys, **options)
        return client.gather(collections.get(client, graph, keys, **options))

    get = __call__

    def persist(self, collections: Any, **options: Any) -> Any:
        """Collections of futures; dask calls this for `x.persist()`."""
        return sessions.get_client().persist(collections, **options)

    def __repr__(self) -> str:
        return "<scheduler: the default client of zmqtasks>"


def checked(graph: Any) -> Any:
    """What dask's own schedulers take."""
    return graph.__dask_graph__() if hasattr(graph, "__dask_graph__") else graph


scheduler = ClientScheduler()
_lock = threading.Lock()
_replaced: dict[str, Any] = {}
"""What stood in the configuration before, by name: None where nothing did."""


def refresh() -> None:
    """After clients have come or gone: makes dask's configuration fit. Settings that somebody has changed since are left alone."""
    with _lock:
        wanted = bool(sessions.defaults()) or sessions.in_worker_process()
        if wanted and not _replaced:
            _replaced["scheduler"] = dask.config.get("scheduler", None)
            dask.config.set({"scheduler": scheduler})
            locks.install()
            for name, value in SETTINGS.items():
                if dask.config.get(name, None) is None:
                    _replaced[name] = None
                    dask.config.set({name: value})
        elif _replaced and not wanted:
            before = dict(_replaced)
            _replaced.clear()
            locks.uninstall()
            for name, value in before.items():
                ours = scheduler if name == "scheduler" else SETTINGS[name]
                if dask.config.get(name, None) is ours or dask.config.get(name, None) == ours:
                    dask.config.set({name: value})
