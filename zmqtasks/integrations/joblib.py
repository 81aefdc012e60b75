"""joblib on a cluster: `joblib.parallel_config("zmqtasks")` sends the calls of `joblib.Parallel` to the default client.

Importing this module makes the name known to joblib; a client does so by itself when it finds joblib imported.

>>> import joblib, zmqtasks
>>> client = zmqtasks.Client()
>>> with joblib.parallel_config("zmqtasks"):
...     joblib.Parallel()(joblib.delayed(pow)(n, 2) for n in range(4))
[0, 1, 4, 9]
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import joblib
from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, register_parallel_backend

from zmqtasks import sessions
from zmqtasks.client import Client
from zmqtasks.errors import ConfigError
from zmqtasks.future import Future
from zmqtasks.protocol.sizeof import sizeof

SCATTERED_BYTES = 64 << 10
"""Arguments of this size go to the workers as data, once for all calls that have them, instead of with each call."""

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class ZmqTasksBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Batches of calls are tasks of a cluster.

    `client`: of which cluster; the default one, or inside of a task the one that runs it. `scatter`: a list of objects that go to
    all workers before the first call, and whose place they take in arguments. `wait_for_workers_timeout`: seconds to wait for
    the first worker. Other options are those of `Client.submit`: `workers`, `resources`, `priority`, `retries`, ...
    """

    MIN_IDEAL_BATCH_DURATION = 0.05
    MAX_IDEAL_BATCH_DURATION = 0.5
    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(
        self,
        client: Client | None = None,
        scatter: Sequence[Any] | None = None,
        wait_for_workers_timeout: float = 10.0,
        nesting_level: int = 0,
        **options: Any,
    ) -> None:
        if scatter is not None and not isinstance(scatter, (list, tuple)):
            raise ConfigError(
                f"scatter is {type(scatter).__name__}; it must be a list or tuple of objects: scatter=[X, y]"
            )
        super().__init__(nesting_level=nesting_level)
        self._chosen = client
        self._options = options
        self._wait_s = wait_for_workers_timeout
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._given = list(scatter or ())
        self._data: dict[
            int, tuple[Any, Future[Any]]
        ] = {}  # by id: the object, or a weak reference to it, and its place

    def __reduce__(self) -> Any:
        return type(self), (None, None, self._wait_s, self.nesting_level)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Called by each `Parallel`, in the thread that makes it: later ones know nothing of the task that they work for."""
        self._client = self._client_here()
        self.parallel = parallel
        return self.effective_n_jobs(n_jobs)

    def _client_here(self) -> Client:
        return self._chosen if self._chosen is not None else sessions.get_client()

    def get_nested_backend(self) -> tuple[Any, int]:
        """For `Parallel` inside of calls: the same cluster."""
        return ZmqTasksBackend(wait_for_workers_timeout=self._wait_s, nesting_level=self.nesting_level + 1), -1

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """`n_jobs`, but -1 is all threads of the cluster, -2 all but one."""
        if n_jobs is not None and n_jobs > 0:
            return n_jobs
        client = self._client_here()
        threads: int = sum(client.nthreads().values())
        if not threads:
            client.wait_for_workers(1, timeout=self._wait_s)
            threads = sum(client.nthreads().values())
        return max(1, threads + 1 + (-1 if n_jobs is None else n_jobs))

    def start_call(self) -> None:
        if self._given:
            for value, future in zip(self._given, self._client.scatter(self._given, broadcast=True), strict=True):
                self._data[id(value)] = value, future

    def stop_call(self) -> None:
        with self._lock:
            self._data.clear()
            self._running.clear()

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> Future[list[Any]]:
        """One batch of calls; gives a future of the list of their results."""
        calls = [self._with_data(call) for call in func.items]
        nested, jobs = self.get_nested_backend()
        future = self._client.submit(_run, calls, nested, jobs, **self._options)
        with self._lock:
            self._running.add(future)

        def done(ended: Future[list[Any]]) -> None:
            with self._lock:
                self._running.discard(ended)
            if callback is not None and not ended.cancelled():
                callback(ended)

        future.add_done_callback(done)
        return future

    def retrieve_result_callback(self, out: Future[list[Any]]) -> list[Any]:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        with self._lock:
            running, self._running = list(self._running), set()
        if running:
            self._client.cancel(running)

    def terminate(self) -> None:
        self.abort_everything(ensure_ready=False)

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """A call that waits for its own calls leaves its thread's slot to them."""
        with contextlib.ExitStack() as stack:
            if sessions.in_task():
                stack.enter_context(sessions.worker_client())
            yield

    def _with_data(self, call: _Call) -> _Call:
        function, args, kwargs = call
        return (
            function,
            tuple(self._data_of(value) for value in args),
            {name: self._data_of(value) for name, value in kwargs.items()},
        )

    def _data_of(self, value: Any) -> Any:
        """A large argument's place on the workers; other values as they are."""
        known = self._data.get(id(value))
        if known is not None:
            holder, future = known
            if holder is value or (isinstance(holder, weakref.ref) and holder() is value):
                return future
        if isinstance(value, Future) or sizeof(value) < SCATTERED_BYTES:
            return value
        number, data = id(value), self._data
        try:
            holder = weakref.ref(value, lambda _: data.pop(number, None))
        except TypeError:  # a list or the like: nobody would tell that another object has its id
            return value
        future = self._client.scatter([value], hash=False)[0]
        data[number] = holder, future
        return future


def _run(calls: list[_Call], backend: ZmqTasksBackend, jobs: int) -> list[Any]:
    with joblib.parallel_config(backend=backend, n_jobs=jobs):
        return [function(*args, **kwargs) for function, args, kwargs in calls]


register_parallel_backend("zmqtasks", ZmqTasksBackend)
