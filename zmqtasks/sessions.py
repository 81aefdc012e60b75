"""Which client is meant: the default one, or inside of tasks the one of the worker's process."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zmqtasks.client import Client

_CONTEXT = "zmqtasks.nodes.worker.context"
_DASK = "zmqtasks.integrations.dask"
_JOBLIB = "zmqtasks.integrations.joblib"


class _Receiving(threading.local):
    client: Client | None = None


receiving = _Receiving()
"""The client whose results this thread is opening: futures inside them are its own."""

_lock = threading.Lock()
_open: dict[int, Client] = {}
"""Clients that were made and not closed; they close at exit."""
_defaults: list[Client] = []
"""The last one is the default."""
_task_clients: dict[str, Client] = {}
"""By scheduler address: one for all tasks of this process."""


def opened(client: Client, as_default: bool) -> None:
    """A client has connected."""
    with _lock:
        _open[id(client)] = client
        if as_default:
            _defaults.append(client)
    _tell_dask()
    if "joblib.parallel" in sys.modules and _JOBLIB not in sys.modules:
        importlib.import_module(_JOBLIB)  # which makes the backend known by its name


def closed(client: Client) -> None:
    """A client is closed."""
    with _lock:
        _open.pop(id(client), None)
        if client in _defaults:
            _defaults.remove(client)
    _tell_dask()


def _tell_dask() -> None:
    """A program that has imported dask computes its collections on the default client, unasked."""
    if "dask.base" in sys.modules and (_defaults or _DASK in sys.modules or in_worker_process()):
        importlib.import_module(_DASK).refresh()


def defaults() -> list[Client]:
    """Open clients that were made to be the default, the last one first in line for it."""
    return list(_defaults)


def client_of_scheduler(scheduler_id: bytes) -> Client | None:
    """An open client of the scheduler with this instance id."""
    with _lock:
        return next((c for c in _open.values() if c.usable and c._node.scheduler_id == scheduler_id), None)


def in_worker_process() -> bool:
    """Whether tasks of a cluster run in this process with clients of their own."""
    return bool(_task_clients)


def in_task() -> bool:
    """Whether this code is run by a task, in its own thread."""
    return _current_worker() is not None


def default_client() -> Client:
    """The client that was made last and is still open; raises ValueError when there is none."""
    clients = list(_defaults)
    if not clients:
        raise ValueError("there is no client here: make one with Client(...)")
    return next((client for client in reversed(clients) if client.usable), clients[-1])


def get_client(address: str | None = None, timeout: float | str | None = None, resolve_address: bool = True) -> Client:
    """The client to use at this place.

    Inside a task: a client of the worker's process, connected to the scheduler of that task, with which the task can submit
    tasks of its own and wait for them (its slot is free for others meanwhile). Elsewhere: the default client. Raises
    ValueError when there is neither.

    >>> def total(n):
    ...     client = get_client()
    ...     return sum(client.gather(client.map(pow, range(n), [2] * n)))
    """
    worker = _current_worker() or _calling_worker()
    if worker is None:
        if address is not None and (not _defaults or _defaults[-1].address != address):
            from zmqtasks.client import Client

            return Client(address, timeout=timeout)
        return default_client()
    return _client_of(worker, timeout)


@contextmanager
def worker_client(timeout: float | str | None = None, separate_thread: bool = True) -> Iterator[Client]:
    """Inside a task: the client of `get_client`, as a context; with `separate_thread` the task leaves its slot meanwhile.

    >>> def total(n):
    ...     with worker_client() as client:
    ...         return sum(client.gather(client.map(pow, range(n), [2] * n)))
    """
    worker = _current_worker()
    if worker is None:
        raise ValueError("worker_client() works inside of tasks only; elsewhere use get_client()")
    client = _client_of(worker, timeout)
    if not separate_thread:
        yield client
        return
    context = sys.modules[_CONTEXT]
    context.secede()
    try:
        yield client
    finally:
        context.rejoin()


def _current_worker() -> Any:
    context = sys.modules.get(_CONTEXT)
    if context is None:
        return None
    thread = context.current_thread()
    return None if thread is None else thread.executor.worker


def _calling_worker() -> Any:
    """The worker that calls this code outside of tasks: `Client.run`, plugins."""
    context = sys.modules.get(_CONTEXT)
    return None if context is None else context.local.worker


def _client_of(worker: Any, timeout: float | str | None) -> Client:
    address: str = worker.scheduler_address
    with _lock:
        client = _task_clients.get(address)
        if client is not None and client.usable:
            return client
    with _connecting:  # not under _lock: connecting takes time, and closing others must go on meanwhile
        client = _task_clients.get(address)
        if client is None or not client.usable:
            from zmqtasks.client import Client

            client = Client(
                address,
                security=worker.security,
                config=worker.config,
                name=f"tasks of {worker.name}",
                timeout=timeout,
                set_as_default=False,
                shows_output=False,
                worker=worker.instance_id,
            )
            _task_clients[address] = client
            departures = sys.modules[_CONTEXT].departures
            if _worker_left not in departures:
                departures.append(_worker_left)
            _tell_dask()
        return client


def _worker_left(worker: Any) -> None:
    """With the last worker of a cluster in this process goes the client of its tasks."""
    address: str = worker.scheduler_address
    if any(other.scheduler_address == address for other in sys.modules[_CONTEXT].workers):
        return
    with _lock:
        client = _task_clients.pop(address, None)
    if client is not None:
        _tell_dask()
        threading.Thread(target=client.close, name="zmqtasks-closing", daemon=True).start()


_connecting = threading.Lock()


@atexit.register
def _close_all() -> None:
    for client in list(_open.values()):
        try:
            client._close_at_exit()
        except Exception:  # nobody is left to tell
            pass
    if (loops := sys.modules.get("zmqtasks.nodes.client.loop")) is not None:
        loops.stop_shared_loop()


def _forked() -> None:
    global _lock, _connecting
    _lock = threading.Lock()
    _connecting = threading.Lock()
    _open.clear()
    _defaults.clear()
    _task_clients.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
