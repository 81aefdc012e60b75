"""Locks that dask and xarray take for files: while a zmqtasks client computes for dask, they hold on the whole cluster.

Both libraries choose a kind of lock by the scheduler in charge, and know those of dask.distributed only; for any other they take
one that holds within a process. So three of their functions are wrapped while there is a default client. A wrapper decides at
each call, and does as before where another scheduler is in charge: a module that has imported one by its name is right after
`uninstall` too.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar
from uuid import uuid4

from dask.base import get_scheduler

from zmqtasks import sessions
from zmqtasks.client import Client
from zmqtasks.coordination import Lock


class _SlotKeepingLock(Lock):
    """A lock for which a task waits on its slot.

    Code that waits for a file often holds a lock of its process already, as HDF5's. Would it give its slot back, a second
    task could take the slot, wait for that lock, and so keep the slot from the first one for ever.
    """

    _keeps_slot = True


class FileLock:
    """A lock on the cluster of the client in charge where it is taken; where there is none, a lock of this process.

    For a name there is one object in a process, also after unpickling: xarray takes several locks in the order of their ids,
    which must be the same for all tasks.
    """

    _known: ClassVar[weakref.WeakValueDictionary[str, FileLock]] = weakref.WeakValueDictionary()
    _making = threading.Lock()

    name: str
    _local: threading.Lock
    _by_client: dict[Client, Lock]
    _held: dict[int, list[Any]]

    def __new__(cls, name: str | None = None) -> FileLock:
        name = name or f"file-{uuid4().hex}"
        with cls._making:
            found = cls._known.get(name)
            if found is None:
                found = cls._known[name] = super().__new__(cls)
                found.name = name
                found._local = threading.Lock()
                found._by_client = {}
                found._held = {}
            return found

    def acquire(self, blocking: bool = True) -> bool:
        """Takes the lock; False when it is not free now, unless `blocking`.

        A finalizer, which may run in a thread that must not wait for the scheduler, does not get it.
        """
        lock = self._lock_here()
        if isinstance(lock, Lock) and _must_not_wait(lock.client):
            if blocking:
                raise TypeError(f"{self!r} is asked for in an event loop: write files in another thread")
            return False
        if not lock.acquire(blocking):
            return False
        self._held.setdefault(threading.get_ident(), []).append(lock)
        return True

    def release(self) -> None:
        """Gives back what this thread, or else another one, has taken. Raises RuntimeError when nobody has."""
        with self._making:
            own = threading.get_ident()
            thread = own if own in self._held else next(iter(self._held), None)
            if thread is None:
                raise RuntimeError(f"{self!r} is released, and was not acquired in this process")
            lock = self._held[thread].pop()
            if not self._held[thread]:
                del self._held[thread]
        lock.release()

    def locked(self) -> bool:
        """Whether anybody holds it."""
        return bool(self._lock_here().locked())

    def _lock_here(self) -> Any:
        try:
            client = sessions.get_client()
        except ValueError:
            return self._local
        with self._making:
            if client not in self._by_client:
                self._by_client = {known: lock for known, lock in self._by_client.items() if known.usable}
                self._by_client[client] = _SlotKeepingLock(self.name, client)
            return self._by_client[client]

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> Any:
        return FileLock, (self.name,)

    def __repr__(self) -> str:
        return f"<FileLock: {self.name}>"


def _must_not_wait(client: Client) -> bool:
    loop_thread = client._node.loop_thread
    return client._called_asynchronously() or (loop_thread is not None and loop_thread.is_current())


def is_ours(scheduler: Any) -> bool:
    """Whether this is what dask calls to compute on a zmqtasks client."""
    from zmqtasks.integrations.dask.defaults import ClientScheduler

    if isinstance(scheduler, ClientScheduler):
        try:
            sessions.get_client()
        except ValueError:  # it computes on dask's threads then
            return False
        return True
    return isinstance(getattr(scheduler, "__self__", None), Client)


def _for_dask(known: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(known)
    def get_scheduler_lock(collection: Any = None, scheduler: Any = None) -> Any:
        if is_ours(get_scheduler(collections=[collection], scheduler=scheduler)):
            return FileLock()
        return known(collection, scheduler)

    return get_scheduler_lock


def _for_xarray(known: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(known)
    def get_dask_scheduler(get: Any = None, collection: Any = None) -> Any:
        # What xarray asks is whether other processes write, which then have to open the file by themselves.
        return "distributed" if is_ours(get_scheduler(get, collection)) else known(get, collection)

    return get_dask_scheduler


def _maker_for_xarray(known: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(known)
    def _get_lock_maker(scheduler: str | None = None) -> Any:
        if scheduler == "distributed" and is_ours(get_scheduler()):
            return _named_after
        return known(scheduler)

    return _get_lock_maker


def _named_after(file: str) -> FileLock:
    return FileLock(f"file-{file}")


_LOCKS, _WRITERS = "xarray.backends.locks", "xarray.backends.writers"
_WRAPPERS: dict[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    ("dask.utils", "get_scheduler_lock"): _for_dask,
    ("dask.array.core", "get_scheduler_lock"): _for_dask,
    ("dask.dataframe.io.hdf", "get_scheduler_lock"): _for_dask,
    (_LOCKS, "get_dask_scheduler"): _for_xarray,
    (_WRITERS, "get_dask_scheduler"): _for_xarray,
    (_LOCKS, "_get_lock_maker"): _maker_for_xarray,
}
_originals: dict[Any, Any] = {}
"""What was wrapped, by the wrapper: modules that import a wrapped function by name get the wrapper, and keep it."""


def install() -> None:
    """From now on, locks for files are those of the cluster; also in the parts of xarray that are imported later."""
    for module, name in _WRAPPERS:
        if module in sys.modules:
            _wrap(sys.modules[module], name)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """All is as it was before `install`."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for module, name in _WRAPPERS:
        current = getattr(sys.modules.get(module), name, None)
        if current in _originals:
            setattr(sys.modules[module], name, _originals[current])
    _originals.clear()


def _wrap(module: ModuleType, name: str) -> None:
    known = getattr(module, name, None)  # not there in some other version: nothing to be wrapped
    if known is None or known in _originals:
        return
    wrapper = next((made for made, original in _originals.items() if original is known), None)
    if wrapper is None:
        wrapper = _WRAPPERS[module.__name__, name](known)
        _originals[wrapper] = known
    setattr(module, name, wrapper)


class _Finder(MetaPathFinder):
    """Wraps functions of modules that are imported while it is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        names = [name for module, name in _WRAPPERS if module == fullname]
        spec = PathFinder.find_spec(fullname, path, target) if names else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, names)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, names: Sequence[str]) -> None:
        self._loader = loader
        self._names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for name in self._names:
            _wrap(module, name)


_finder = _Finder()
