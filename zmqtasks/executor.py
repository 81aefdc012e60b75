"""A `concurrent.futures.Executor` on a cluster, for programs that know that interface."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from zmqtasks.errors import CancelledError, ConfigError, TaskTimeoutError
from zmqtasks.fetching import Deadline, task_waiting, wait_settled
from zmqtasks.future import Future

if TYPE_CHECKING:
    from zmqtasks.client import Client

_OPTIONS = frozenset(
    ("pure", "workers", "resources", "allow_other_workers", "retries", "priority", "idempotent", "key", "fifo_timeout")
)


class ClientExecutor(concurrent.futures.Executor):
    """Runs calls as tasks of a client; its futures are those of `concurrent.futures`."""

    def __init__(self, client: Client, **options: Any) -> None:
        """`options` are those of `Client.submit`, for all tasks. Raises ConfigError for others."""
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigError(
                f"get_executor has no options {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}"
            )
        self._client = client
        self._options = options
        self._lock = threading.Lock()
        self._shut_down = False
        self._running: weakref.WeakSet[_ExecutorFuture] = weakref.WeakSet()
        self._mapped: weakref.WeakSet[Future[Any]] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<ClientExecutor of {self._client!r}>"

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Runs `fn(*args, **kwargs)` on a worker. Raises RuntimeError after `shutdown`.

        >>> with client.get_executor() as pool:
        ...     pool.submit(pow, 2, 10).result()
        1024
        """
        self._check_open()
        return self._wrapped(self._client.submit(_Call(fn, kwargs) if kwargs else fn, *args, **self._options))

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **_: Any,
    ) -> Iterator[Any]:
        """The results of `fn` on the items, in order; `chunksize` is not needed here. Raises TimeoutError as they are asked for.

        >>> with client.get_executor() as pool:
        ...     list(pool.map(pow, [1, 2, 3], [2, 2, 2]))
        [1, 4, 9]
        """
        self._check_open()
        deadline = Deadline(timeout)
        futures = self._client.map(fn, *iterables, **self._options)
        with self._lock:
            self._mapped.update(futures)
        return _results(futures, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks are taken; with `wait`, returns when those that were given have ended."""
        with self._lock:
            self._shut_down = True
            running = [future for future in self._running if not future.done()]
            mapped = [future for future in self._mapped if not future.done()]
        if cancel_futures:
            for future in running:
                future.cancel()
            self._client.cancel(mapped)
        if wait:
            wait_settled(mapped)
            with task_waiting():
                concurrent.futures.wait(running)

    def _check_open(self) -> None:
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _wrapped(self, future: Future[Any]) -> concurrent.futures.Future[Any]:
        wrapped = _ExecutorFuture(future)
        with self._lock:
            self._running.add(wrapped)
        future.add_done_callback(wrapped.finish)
        return wrapped


def _results(futures: list[Future[Any]], deadline: Deadline) -> Iterator[Any]:
    try:
        futures.reverse()
        while futures:
            future = futures.pop()
            yield future.result(deadline.remaining_s())
    except TaskTimeoutError as exc:
        raise concurrent.futures.TimeoutError(str(exc)) from None
    finally:
        if futures:
            futures[0].client.cancel(futures)


class _Call:
    """A function with its keyword arguments, which might be named like options of `Client.submit`."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.kwargs = kwargs
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **self.kwargs)


class _ExecutorFuture(concurrent.futures.Future[Any]):
    """Follows a future of the client."""

    def __init__(self, future: Future[Any]) -> None:
        super().__init__()
        self._future = future
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """Whether it could be cancelled: any task that has not ended can."""
        if self.done():
            return False
        self._future.client.cancel([self._future])
        return True

    def cancelled(self) -> bool:
        return self.done() and isinstance(super().exception(), concurrent.futures.CancelledError)

    def finish(self, future: Future[Any]) -> None:
        """The task has ended; called in the thread for callbacks."""
        try:
            self.set_result(future.result())
        except CancelledError as exc:
            self.set_exception(exc)
        except BaseException as exc:
            self.set_exception(exc)
