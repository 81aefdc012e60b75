"""The client: connects to a scheduler, submits tasks, gathers results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from zmqtasks import fetching, graphs, scattering
from zmqtasks.calls import to_columns
from zmqtasks.cluster_view import worker_names
from zmqtasks.connection import Connection
from zmqtasks.errors import ConfigError
from zmqtasks.fetching import parse_timeout
from zmqtasks.functions import function_name
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.names import to_wire
from zmqtasks.nodes.client.state import FutureState
from zmqtasks.protocol.ops import TaskOptions
from zmqtasks.submission import user_keys
from zmqtasks.waiting import futures_of, states_by_client

_DEFAULT_OPTIONS = TaskOptions()


class Client(Connection):
    """Connects to a cluster and runs functions on it.

    `address` is that of a scheduler (`tcp://host:port`, `unix://name`, `zmq://host:port`; `host:port` is tcp), or a
    cluster object. Without any, and without a `scheduler_file`, a `LocalCluster` is started with the other arguments (`n_workers`,
    `threads_per_worker`, `processes`, `memory_limit`, ...) and closed with the client. The client becomes the default
    client of the process.

    With `asynchronous=True` methods that wait give coroutines, and the client lives in the running event loop: write
    `client = await Client(..., asynchronous=True)` or `async with Client(..., asynchronous=True) as client`.

    As in dask.distributed, with these differences: `pure` is False unless said otherwise (a function that is submitted twice
    runs twice), and the scheduler runs no user code.

    With a `timeout`, a scheduler (or its file, or the key) that isn't there yet is waited for; without, it must be there.

    Raises ConnectError and its kin when the scheduler can't be reached; SecurityError and
    AuthenticationError when the cluster key is missing or wrong.

    >>> client = Client(n_workers=2)
    >>> client.submit(pow, 2, 10).result()
    1024
    >>> client.gather(client.map(abs, [-1, -2]))
    [1, 2]
    """

    # Submitting

    def submit(
        self,
        func: Callable[..., Any],
        *args: Any,
        key: Any = None,
        workers: Any = None,
        resources: Mapping[str, float] | None = None,
        retries: int | None = None,
        priority: int = 0,
        fifo_timeout: object = None,
        allow_other_workers: bool = False,
        actor: bool = False,
        actors: bool = False,
        pure: bool = False,
        idempotent: bool = True,
        **kwargs: Any,
    ) -> Future[Any]:
        """Runs `func(*args, **kwargs)` on a worker; gives a future at once.

        Futures among the arguments (also in lists, tuples, dicts and sets) are replaced by their results. Arguments over
        64 KiB go straight to workers; an object that many tasks need is better scattered once.

        Args:
            key: A name of your own. The same key again must mean the same task (KeyConflictError).
            workers: Names, addresses or hosts of workers that may run it.
            resources: What it holds while it runs, as `{"GPU": 1}`.
            retries: Attempts after the first one that raises.
            priority: Higher runs earlier.
            allow_other_workers: `workers` is a wish only.
            actor: `func` is a class; the object stays on its worker, and the result is an `Actor`, whose methods can be called.
            pure: The same function with the same arguments is the same task, and runs once. False by default, unlike dask.
            idempotent: False: not run again when a worker died while it was executing.

        Raises TypeError when `func` can't be called, SerializationError for arguments that can't be pickled, and what
        ended the client, if it has ended. Waits while too much is on its way to the scheduler.

        >>> a = client.submit(pow, 2, 10)
        >>> client.submit(sum, [a, a]).result()
        2048
        """
        name = ""
        if (
            workers is None
            and resources is None
            and not retries
            and not priority
            and not allow_other_workers
            and idempotent
            and not (actor or actors)
        ):
            options = _DEFAULT_OPTIONS
        else:
            options = task_options(priority, retries, workers, allow_other_workers, resources, idempotent)
            if actor or actors:
                func, options, name = as_actor(func, options)
                pure = False
        wire_key = None if key is None else to_wire(key)
        if self.status == "newly-created":
            self._check_started()
        return self._submitter.submit(func, args, kwargs, options, wire_key, name, pure)

    def _check_started(self) -> None:
        if self.status in ("newly-created", "connecting"):
            raise ConfigError("the client is not connected yet: `await` it, or use `async with Client(...)`")

    def map(
        self,
        func: Callable[..., Any],
        *iterables: Iterable[Any],
        key: Any = None,
        workers: Any = None,
        retries: int | None = None,
        resources: Mapping[str, float] | None = None,
        priority: int = 0,
        allow_other_workers: bool = False,
        fifo_timeout: object = None,
        actor: bool = False,
        actors: bool = False,
        pure: bool = False,
        batch_size: int | None = None,
        idempotent: bool = True,
        **kwargs: Any,
    ) -> list[Future[Any]]:
        """Runs `func` on each item (or on the items of several iterables, side by side); gives a list of futures.

        `kwargs` are the same for all. `key` is a name for the tasks, or a list with a key for each. `batch_size` is how many
        tasks go to the scheduler in one op. The rest as in `submit`.

        >>> client.gather(client.map(pow, range(4), [2] * 4))
        [0, 1, 4, 9]
        """
        if not iterables:
            raise ConfigError("map needs at least one iterable")
        self._check_started()
        if not callable(func):
            raise TypeError(f"the first argument must be callable, got {func!r}")
        columns = to_columns(iterables)
        options = task_options(priority, retries, workers, allow_other_workers, resources, idempotent)
        keys: list[Key] | None = None
        name = ""
        if actor or actors:
            func, options, name = as_actor(func, options)
            pure = False
        if isinstance(key, (list, range)):
            if len(key) != len(columns[0]):
                raise ConfigError(f"{len(key)} keys for {len(columns[0])} tasks: give one for each")
            keys = user_keys(list(key))
        elif key is not None:
            name = str(key)
        if not columns[0]:
            return []
        return self._submitter.map(func, columns, kwargs, options, keys, name, pure, batch_size)

    def get(self, dsk: Any, keys: Any, *, sync: bool = True, asynchronous: bool | None = None, **options: Any) -> Any:
        """Computes a graph: a dict of keys to tasks `(callable, argument, ...)`, keys, lists of these, or plain values.

        When dask is imported, also dask's own tasks, graphs and expressions, by dask's rules; `options` as in `compute`. A plain
        dict means the same with and without dask, unless there are options or annotations.

        Gives the results of `keys` (a key, or nested lists of keys); with `sync=False` the futures.

        >>> client.get({"x": 1, "y": (pow, 2, 10), "z": (sum, ["x", "y"])}, ["z", "y"])
        [1025, 1024]
        """
        self._check_started()
        if "dask.base" in sys.modules:
            from zmqtasks.integrations import dask

            if dask.is_dasks(dsk, options):
                futures = dask.get(self, dsk, keys, **options)
                return self.gather(futures) if sync else futures
        futures = graphs.submit_graph(self._submitter, dsk, keys)
        return self.gather(futures) if sync else futures

    def compute(
        self, collections: Any, sync: bool = False, optimize_graph: bool = True, traverse: bool = True, **options: Any
    ) -> Any:
        """A future of the result of a dask collection; a list for several. With `sync`, the results.

        `options` are `workers`, `allow_other_workers`, `resources`, `retries`, `priority`, for all tasks. What is no collection
        is given back.

        >>> client.compute(dask.delayed(pow)(2, 10)).result()  # doctest: +SKIP
        1024
        """
        self._check_started()
        from zmqtasks.integrations import dask

        futures = dask.compute(self, collections, optimize_graph, traverse, **options)
        return self.gather(futures) if sync else futures

    def persist(self, collections: Any, optimize_graph: bool = True, traverse: bool = True, **options: Any) -> Any:
        """Dask collections like the given ones, whose parts are computed on the cluster and stay there while they are used.

        Returns at once. `options` as in `compute`.

        >>> x = client.persist(x)  # doctest: +SKIP
        """
        self._check_started()
        from zmqtasks.integrations import dask

        return dask.persist(self, collections, optimize_graph, traverse, **options)

    # Results

    def gather(
        self, futures: Any, errors: str = "raise", direct: bool | None = None, asynchronous: bool | None = None
    ) -> Any:
        """The results of futures, in the same nested lists, tuples, sets and dicts; an iterator gives a list.

        `errors="raise"` raises the first error, as soon as it is known; `"skip"` leaves failed ones out. `direct` is taken
        for compatibility: results always come straight from the workers.

        >>> client.gather({"a": client.submit(abs, -1), "b": [client.submit(abs, -2)]})
        {'a': 1, 'b': [2]}
        """
        if errors not in ("raise", "skip"):
            raise ConfigError(f"errors={errors!r}: use 'raise' or 'skip'")
        if isinstance(futures, Iterator):
            futures = list(futures)
        if self._called_asynchronously():
            return self._gather_async(futures, errors)
        if type(futures) is list and set(map(type, futures)) == {Future}:
            values = fetching.gather(futures, errors)
            return values if errors == "raise" else [value for value in values if value is not fetching.SKIPPED]
        found = futures_of(futures)
        return graphs.filled_in(futures, found, fetching.gather(found, errors))

    async def _gather_async(self, futures: Any, errors: str) -> Any:
        found = futures_of(futures)
        return graphs.filled_in(futures, found, await fetching.gather_async(found, errors))

    def scatter(
        self,
        data: Any,
        workers: Any = None,
        broadcast: bool | int = False,
        direct: bool | None = None,
        hash: bool = True,  # noqa: A002
        timeout: float | str | None = None,
        asynchronous: bool | None = None,
    ) -> Any:
        """Puts data on workers; gives futures of it: a list for a list (one for each item), a dict for a dict, else one.

        The data is on the workers when this returns. `broadcast` puts it on all workers (or on so many). With `hash`, data with
        the same content has the same key; that costs a pass over the bytes. `workers` are names, addresses or hosts.

        >>> table = client.scatter({"a": 1, "b": 2})["a"]
        >>> client.submit(abs, table).result()
        1
        """
        self._check_started()
        copies = -1 if broadcast is True else max(1, int(broadcast))
        prepared = scattering.prepare(self._node, data, hash)
        names, timeout_s = worker_names(workers), parse_timeout(timeout)
        return self._sync(lambda: scattering.scatter(self._node, prepared, names, copies, timeout_s))

    # Steering

    def cancel(
        self,
        futures: Any,
        asynchronous: bool | None = None,
        force: bool = False,
        reason: str | None = None,
        msg: str | None = None,
    ) -> Any:
        """Cancels futures: tasks that have not begun vanish, running ones are asked to stop, what depends on them is cancelled.

        Tasks that other clients want too go on, unless `force`.

        >>> client.cancel(future)
        >>> future.status
        'cancelled'
        """
        for node, states in states_by_client(futures_of(futures)).items():
            with node.lock:
                node.machine.cancel(states, force, msg or reason or "")
                node.wake()
        return self._nothing()

    def retry(self, futures: Any, asynchronous: bool | None = None) -> Any:
        """Tries failed tasks again, and the failed tasks that they depend on.

        >>> client.retry(future)
        """
        self._node.check_usable()
        for node, states in states_by_client(futures_of(futures)).items():
            node.check_usable()
            with node.lock:
                node.machine.retry(states)
                node.wake()
        return self._nothing()

    def get_executor(self, **options: Any) -> Any:
        """A `concurrent.futures.Executor` on this cluster; `options` are those of `submit` for all its tasks.

        >>> with client.get_executor() as pool:
        ...     list(pool.map(pow, [1, 2, 3], [2, 2, 2]))
        [1, 4, 9]
        """
        from zmqtasks.executor import ClientExecutor

        return ClientExecutor(self, **options)

    def _nothing(self) -> Any:
        """What a method without a result gives: None, or something to await."""
        return _none() if self._called_asynchronously() else None

    def _want(self, key: Key, name: str = "") -> FutureState:
        """A record of `key`, with one more future counted."""
        node = self._node
        node.check_usable()
        with node.lock:
            state = node.machine.share(key)
            if state is None:
                state = FutureState(key, node, name)
                node.machine.want(state)
                node.wake()
        return state

    def __repr__(self) -> str:
        from zmqtasks.display import client_text

        return client_text(self)

    def _repr_html_(self) -> str:
        from zmqtasks.display import client_html

        return client_html(self)

    def __reduce__(self) -> Any:
        raise TypeError("a Client cannot be pickled: inside of tasks use get_client()")


class _None:
    """Awaitable, and nothing to complain about when it isn't awaited."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


def _none() -> _None:
    return _None()


def as_actor(cls: Callable[..., Any], options: TaskOptions) -> tuple[Callable[..., Any], TaskOptions, str]:
    """Function, options and name of tasks that make actors."""
    from zmqtasks.actors import MAKES_ACTOR, ActorFactory

    if not callable(cls):
        raise TypeError(f"the first argument must be a class, got {cls!r}")
    return ActorFactory(cls), msgspec.structs.replace(options, actor=MAKES_ACTOR), function_name(cls)


def task_options(
    priority: int,
    retries: int | None,
    workers: Any,
    allow_other_workers: bool,
    resources: Mapping[str, float] | None,
    idempotent: bool,
) -> TaskOptions:
    """Checked options of tasks."""
    if not isinstance(priority, int):
        raise ConfigError(f"priority={priority!r}: give an integer")
    if retries is not None and (not isinstance(retries, int) or retries < 0):
        raise ConfigError(f"retries={retries!r}: give a number of attempts, 0 or more")
    if allow_other_workers and workers is None:
        raise ConfigError("allow_other_workers=True needs workers=...")
    wanted = {str(name): float(amount) for name, amount in (resources or {}).items()}
    return TaskOptions(
        priority=priority,
        retries=retries or 0,
        workers=worker_names(workers),
        allow_other_workers=allow_other_workers,
        resources=wanted,
        idempotent=idempotent,
    )
