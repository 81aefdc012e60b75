"""The part of a client that looks at the cluster and steers it as a whole: who is there, who holds what, run, restart."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zmqtasks.errors import ConfigError, NoWorkerError, TaskTimeoutError, ZmqTasksError
from zmqtasks.fetching import await_on, parse_timeout, run_on, task_waiting
from zmqtasks.foreign import check_cluster
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.failures import error_to_exception
from zmqtasks.nodes.client.loop import Work
from zmqtasks.nodes.client.names import UserKey, to_user, to_wire
from zmqtasks.nodes.client.requests import QueryError
from zmqtasks.plugins import PluginRegistry
from zmqtasks.protocol.ops import ErrorInfo, RunFinished, Shutdown
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline
from zmqtasks.waiting import futures_of

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

PACKAGES = ("zmqtasks", "msgspec", "cloudpickle", "numpy")
"""Packages that `get_versions` tells of: those whose versions should be the same everywhere."""


class ClusterView(PluginRegistry):
    """Methods that ask something of the scheduler. With an asynchronous client each gives a coroutine."""

    _node: ClientNode

    def _called_asynchronously(self) -> bool:
        raise NotImplementedError

    def _sync(self, work: Work[Any]) -> Any:
        """Runs a coroutine of the node: waits for it here, or gives it to an asynchronous caller."""
        if self._called_asynchronously():
            return await_on(self._node, work())
        with task_waiting():
            return run_on(self._node, work)

    # Who holds what

    def who_has(self, futures: Any = None) -> Any:
        """The addresses of the workers that hold each result, by key; of all results when none are named.

        >>> client.who_has([future])
        {'inc-1.1': ['tcp://127.0.0.1:40123']}
        """
        return self._sync(lambda: self._who_has(futures))

    async def _who_has(self, futures: Any) -> dict[UserKey, list[str]]:
        found = await self._ask("who_has", keys=self._keys_of(futures))
        return {self._shown(key): addresses for key, addresses in found.items()}

    def has_what(self, workers: Any = None) -> Any:
        """The keys of the results that each worker holds, by address.

        >>> client.has_what()
        {'tcp://127.0.0.1:40123': ['inc-1.1']}
        """
        return self._sync(lambda: self._keys_by_worker("has_what", workers))

    def processing(self, workers: Any = None) -> Any:
        """The keys of the tasks that each worker has been given, by address."""
        return self._sync(lambda: self._keys_by_worker("processing", workers))

    async def _keys_by_worker(self, what: str, workers: Any) -> dict[str, list[UserKey]]:
        found = await self._ask(what, workers=worker_names(workers))
        return {address: [self._shown(key) for key in keys] for address, keys in found.items()}

    def nbytes(self, keys: Any = None, summary: bool = False) -> Any:
        """The size of each result in bytes, by key; with `summary`, by the name of the tasks."""
        return self._sync(lambda: self._nbytes(keys, summary))

    async def _nbytes(self, keys: Any, summary: bool) -> dict[UserKey, int]:
        found = await self._ask("nbytes", keys=self._keys_of(keys))
        if not summary:
            return {self._shown(key): size for key, size in found.items()}
        sums: dict[UserKey, int] = {}
        for key, size in found.items():
            name = str(self._shown(key)).rsplit("-", 1)[0]
            sums[name] = sums.get(name, 0) + size
        return sums

    def story(self, *keys_or_futures: Any) -> Any:
        """What the scheduler remembers of these tasks: lines for people, to find out why something is slow or stuck."""
        keys = self._keys_of(list(keys_or_futures))
        return self._sync(lambda: self._ask("story", keys=keys))

    # Who is there

    def nthreads(self, workers: Any = None) -> Any:
        """The number of threads of each worker, by address.

        >>> client.nthreads()
        {'tcp://127.0.0.1:40123': 1, 'tcp://127.0.0.1:40124': 1}
        """
        names = worker_names(workers)
        return self._sync(lambda: self._ask("nthreads", workers=names))

    ncores = nthreads

    def scheduler_info(self, n_workers: int = -1, **_: object) -> Any:
        """What the scheduler knows of itself and its workers: a dict, its `workers` by address.

        >>> list(client.scheduler_info()["workers"])
        ['tcp://127.0.0.1:40123', 'tcp://127.0.0.1:40124']
        """
        return self._sync(lambda: self._scheduler_info(n_workers))

    async def _scheduler_info(self, n_workers: int = -1) -> dict[str, Any]:
        info: dict[str, Any] = await self._ask("scheduler_info")
        info["address"] = self._node.address
        if n_workers >= 0:
            info["workers"] = dict(list(info["workers"].items())[:n_workers])
        return info

    def wait_for_workers(self, n_workers: int, timeout: float | str | None = None) -> Any:
        """Waits until the cluster has at least `n_workers` workers. Raises TaskTimeoutError.

        >>> client.wait_for_workers(2, timeout="30s")
        """
        if not isinstance(n_workers, int) or n_workers < 1:
            raise ConfigError(f"n_workers={n_workers!r}: wait for at least one")
        return self._sync(lambda: self._wait_for_workers(n_workers, timeout))

    async def _wait_for_workers(self, n_workers: int, timeout: float | str | None) -> None:
        node = self._node
        node.check_usable()
        limit_s = parse_timeout(timeout)
        try:
            async with asyncio.timeout(limit_s):
                while node.cluster.workers < n_workers:
                    await node.wait_cluster_changed()
        except TimeoutError:
            there = node.cluster.workers
            raise TaskTimeoutError(f"only {there} of {n_workers} workers came within {limit_s:g} s") from None

    def get_versions(self, check: bool = False, packages: Iterable[str] = ()) -> Any:
        """The versions of Python and of packages, here and on the workers; with `check`, raises when they differ."""
        return self._sync(lambda: self._get_versions(check, tuple(packages)))

    async def _get_versions(self, check: bool, packages: tuple[str, ...]) -> dict[str, Any]:
        here = versions_here(packages)
        workers = await self._run(versions_here, (packages,), {}, None, False, "raise")
        if check:
            other = {address: versions for address, versions in workers.items() if versions != here}
            if other:
                lines = "; ".join(f"{address}: {versions}" for address, versions in other.items())
                raise ConfigError(f"versions differ from the client's ({here}): {lines}")
        return {"client": here, "workers": workers}

    # All workers at once

    def run(
        self,
        function: Any,
        *args: Any,
        workers: Any = None,
        wait: bool = True,
        nanny: bool = False,
        on_error: str = "raise",
        **kwargs: Any,
    ) -> Any:
        """Calls a function once on each worker (or nanny), outside of any task; the results by address.

        A parameter called `dask_worker` is given the worker. `on_error`: "raise", "return" (the exception is the result) or
        "ignore" (the worker is left out). With `wait=False`: returns at once, with nothing.

        >>> client.run(os.getpid)
        {'tcp://127.0.0.1:40123': 4711, 'tcp://127.0.0.1:40124': 4712}
        """
        if on_error not in ("raise", "return", "ignore"):
            raise ConfigError(f"on_error={on_error!r}: use 'raise', 'return' or 'ignore'")
        work = partial(self._run, function, args, kwargs, workers, nanny, on_error)
        if wait:
            return self._sync(work)
        self._node.loop.call_soon_threadsafe(lambda: self._node.keep_task(work()))
        return None

    async def _run(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], workers: Any, nanny: bool, on_error: str
    ) -> dict[str, Any]:
        data = serialize_inline((function, args, kwargs))
        names = worker_names(workers)
        answers = await self._node.requests.run(data, names, nanny)
        if names and not answers:
            what = "nanny" if nanny else "worker"
            raise NoWorkerError(f"no {what} is called {' or '.join(names)}: client.nthreads() has the addresses")
        results: dict[str, Any] = {}
        for answer in answers:
            error = _error_of(answer)
            if error is None:
                results[answer.worker] = deserialize_inline(answer.result)
            elif on_error == "raise":
                raise error
            elif on_error == "return":
                results[answer.worker] = error
        return results

    @property
    def run_on_scheduler(self) -> Any:
        """Not there: the scheduler runs no user code."""
        raise AttributeError(
            "the scheduler of zmqtasks runs no user code, so there is no run_on_scheduler: use Client.run for the workers, "
            "Client.scheduler_info, who_has, has_what, processing or story to look into the scheduler"
        )

    def restart(self, timeout: float | str | None = None, wait_for_workers: bool = True) -> Any:
        """Forgets all tasks and data, and restarts all worker processes; futures are cancelled. Gives the client.

        >>> client.restart()  # doctest: +SKIP
        """
        return self._sync(lambda: self._restart(timeout, wait_for_workers))

    async def _restart(self, timeout: float | str | None, wait_for_workers: bool) -> ClusterView:
        limit_s = parse_timeout(timeout)
        try:
            await self._node.requests.restart(60.0 if limit_s is None else limit_s if wait_for_workers else 0.0)
        except QueryError as exc:
            if wait_for_workers:
                raise TaskTimeoutError(f"restart: {exc}") from None
        return self

    def shutdown(self) -> Any:
        """Ends workers and scheduler, and closes this client.

        >>> client.shutdown()  # doctest: +SKIP
        """
        raise NotImplementedError

    def _tell_shutdown(self) -> None:
        self._node.tell(Shutdown(f"client {self._node.name} asked for it"))

    @property
    def dashboard_link(self) -> str:
        """Empty: there is no dashboard yet."""
        return ""

    # For this package

    async def _ask(self, what: str, keys: Iterable[Key] = (), workers: Iterable[str] = ()) -> Any:
        return await self._node.requests.query(what, keys, workers)

    def _keys_of(self, futures: Any) -> list[Key]:
        """Keys from futures, keys, or collections of these. Raises ConfigError for futures of other clusters."""
        if futures is None:
            return []
        if isinstance(futures, Future):
            if futures._node.scheduler_id != self._node.scheduler_id:  # a client that has ended may be asked about
                check_cluster(self._node, futures._state)
            return [futures._state.key]
        if isinstance(futures, (list, set, frozenset, dict)):
            return [key for item in futures for key in self._keys_of(item)]
        if isinstance(futures, tuple) and any(isinstance(item, Future) for item in futures):
            return self._keys_of(futures_of(futures))
        return [to_wire(futures)]

    def _shown(self, key: Key) -> UserKey:
        state = self._node.machine.states.get(key)
        return to_user(key, state.name if state is not None else "")


def _error_of(answer: RunFinished) -> BaseException | None:
    if answer.error:
        return ZmqTasksError(f"{answer.worker}: {answer.error}")
    if answer.erred:
        return error_to_exception(ErrorInfo("exception", f"a call on {answer.worker} failed", answer.result))
    return None


def worker_names(workers: Any) -> list[str]:
    """Workers as users name them: a name, address or host, or a collection of these."""
    if workers is None:
        return []
    if isinstance(workers, (str, int)):
        return [str(workers)]
    if isinstance(workers, (list, tuple, set, frozenset, Mapping)):
        return [str(worker) for worker in workers]
    raise ConfigError(f"workers={workers!r}: give names, addresses or hosts")


def versions_here(packages: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Versions in this process."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version(), "os": sys.platform}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
