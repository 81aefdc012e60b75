"""A `concurrent.futures.Executor` on a cluster, for programs that know that interface.

As Python's own executors do it: order, time limits and errors of `submit` and `map`, `shutdown`, calls that go on when nobody
holds their future, and a program that ends after its calls have. What differs is in the docstring of `ClientExecutor`.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from zmqtasks import sessions
from zmqtasks.errors import ClientClosedError, ConfigError, SerializationError, TaskTimeoutError
from zmqtasks.fetching import Deadline, result_async, run_on, task_waiting, wait_settled
from zmqtasks.future import Future
from zmqtasks.nodes.client.gate import in_slices
from zmqtasks.nodes.client.state import CANCELLED, FutureState
from zmqtasks.nodes.client.waiters import add_waiter

if TYPE_CHECKING:
    from zmqtasks.client import Client

_OPTIONS = frozenset(
    ("pure", "workers", "resources", "allow_other_workers", "retries", "priority", "idempotent", "key", "fifo_timeout")
)


class ClientExecutor(concurrent.futures.Executor):
    """Runs calls as tasks of a client; its futures are those of `concurrent.futures`.

    Unlike with Python's executors, a running call can be cancelled too: it is asked to stop, and its result is dropped. So
    `cancel()` of a future is true until it is done, and `running()` never is. A call whose worker has died runs again
    elsewhere; when that happens too often its future raises `KilledWorker`, and the executor goes on.
    """

    def __init__(self, client: Client, **options: Any) -> None:
        """`options` are those of `Client.submit`, for all tasks. Raises ConfigError for others."""
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigError(
                f"get_executor has no options {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}"
            )
        self._client = client
        self._options = options
        self._changed = threading.Condition()
        self._entering = 0
        """Calls of `submit` and `map` that are on their way."""
        self._shut_down = False
        self._given: dict[_ExecutorFuture, None] = {}
        """From `submit`, not done, in the order in which they were given."""
        self._mapped: set[_Mapped] = set()

    def __repr__(self) -> str:
        return f"<ClientExecutor of {self._client!r}>"

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Runs `fn(*args, **kwargs)` on a worker. Raises RuntimeError after `shutdown`.

        What can't be pickled is an error of the future, as with Python's process pools.

        >>> with client.get_executor() as pool:
        ...     pool.submit(pow, 2, 10).result()
        1024
        """
        self._enter()
        try:
            wrapped = _ExecutorFuture(self)
            try:
                future = self._client.submit(_Call(fn, kwargs) if kwargs else fn, *args, **self._options)
            except (SerializationError, ClientClosedError) as exc:
                if isinstance(exc, ClientClosedError):
                    raise RuntimeError(f"cannot schedule new futures: {exc}") from exc
                wrapped.fail(exc)
                return wrapped
            wrapped.follow(future)
            return wrapped
        finally:
            self._leave()

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The results of `fn` on the items, in order. Raises TimeoutError as they are asked for, `timeout` seconds from now.

        `chunksize` has no effect: tasks travel in batches anyway. With `buffersize` at most so many calls are ahead of the
        results that were taken; without, all are submitted now. When the iteration is given up, the calls that are left are
        cancelled.

        >>> with client.get_executor() as pool:
        ...     list(pool.map(pow, [1, 2, 3], [2, 2, 2]))
        [1, 4, 9]
        """
        if chunksize < 1:
            raise ValueError(f"chunksize={chunksize!r}: give 1 or more")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError(f"buffersize={buffersize!r}: give an integer, or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize={buffersize!r}: give 1 or more, or None")
        deadline = Deadline(timeout)
        calls = zip(*iterables, strict=False)
        futures = self._submit_calls(fn, itertools.islice(calls, buffersize))
        more = None if buffersize is None else lambda: self._submit_calls(fn, itertools.islice(calls, 1))
        return _results(futures, deadline, more)

    def _submit_calls(self, fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> deque[Future[Any]]:
        self._enter()
        try:
            columns = list(zip(*calls, strict=True))
            futures = self._client.map(fn, *columns, **self._options) if columns else []
            if futures:
                mapped = _Mapped(self, futures)
                with self._changed:
                    self._mapped.add(mapped)
                mapped.begin()
            return deque(futures)
        finally:
            self._leave()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more calls are taken; with `wait`, returns when those that were given have ended, and their callbacks.

        With `cancel_futures`, calls that no worker was given are cancelled; the others go on.
        """
        with self._changed:
            self._shut_down = True
            in_slices(lambda slice_s: self._changed.wait_for(lambda: not self._entering, slice_s), None)
            unfinished = bool(self._mapped) or not all(wrapped.done() for wrapped in self._given)
        if unfinished and (wait or cancel_futures) and _brings_results(self._client):
            raise RuntimeError(
                "this would wait in the event loop or the callback that brings the results: use shutdown(wait=False), "
                "or await asyncio.to_thread(executor.shutdown)"
            )
        if unfinished and cancel_futures:
            self._cancel_queued()
        if wait:
            self._wait_all()

    def _wait_all(self) -> None:
        with self._changed:
            mapped = [future for batch in self._mapped for future in batch.pending()]
            # Not for one that this thread has cancelled, if this is a callback of it.
            given = [wrapped for wrapped in self._given if wrapped.ender != threading.get_ident()]
        wait_settled(mapped)
        with task_waiting():
            for wrapped in given:
                in_slices(wrapped.ends_in, None)
            if not self._client._node.callbacks.is_current():
                with self._changed:
                    over = functools.partial(self._given.keys().isdisjoint, given)
                    in_slices(lambda slice_s: self._changed.wait_for(over, slice_s), None)

    def _cancel_queued(self) -> None:
        given_to_workers = run_on(self._client._node, lambda: self._client._keys_by_worker("processing", None))
        begun = {key for keys in given_to_workers.values() for key in keys}
        with self._changed:
            given = list(self._given)
            mapped = [future for batch in self._mapped for future in batch.pending()]
        for wrapped in given:
            if wrapped.key not in begun:
                wrapped.cancel()
        self._client.cancel([future for future in mapped if future.key not in begun])

    def _enter(self) -> None:
        with self._changed:
            if self._shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _exit.begun:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            self._entering += 1

    def _leave(self) -> None:
        with self._changed:
            self._entering -= 1
            self._changed.notify_all()

    def keep(self, wrapped: _ExecutorFuture) -> None:
        """A call was submitted: it goes on, also if nobody holds its future."""
        with self._changed:
            self._given[wrapped] = None
        _exit.unfinished[wrapped] = self

    def forget(self, wrapped: _ExecutorFuture) -> None:
        """A call has ended, and its callbacks have."""
        with self._changed:
            self._given.pop(wrapped, None)
            self._changed.notify_all()
        _exit.unfinished.pop(wrapped, None)

    def forget_mapped(self, mapped: _Mapped) -> None:
        """All calls of a `map` have ended."""
        self._mapped.discard(
            mapped
        )  # atomic: called under the lock of the client, under which no other may be waited for
        _exit.unfinished.pop(mapped, None)


def _brings_results(client: Client) -> bool:
    """Whether this thread must not wait for results of the client, because they would come by way of it."""
    node = client._node
    if asyncio._get_running_loop() is node.loop or node.callbacks.is_current():
        return True
    return node.loop_thread is not None and node.loop_thread.is_current()


class _Mapped:
    """Keeps the futures of a `map` that have not settled: its calls go on, also if nobody takes the results."""

    def __init__(self, executor: ClientExecutor, futures: Iterable[Future[Any]]) -> None:
        self._executor = executor
        self._pending = {future._state.key: future for future in futures}

    def begin(self) -> None:
        _exit.unfinished[self] = self._executor
        futures = list(self._pending.values())
        node = futures[0]._node
        with node.lock:
            for future in futures:
                if not add_waiter(self, (future._state,)):
                    self._pending.pop(future._state.key, None)
            if not self._pending:
                self._executor.forget_mapped(self)

    def settled(self, state: FutureState) -> None:
        self._pending.pop(state.key, None)
        if not self._pending:
            self._executor.forget_mapped(self)

    def pending(self) -> list[Future[Any]]:
        return list(self._pending.values())


def _results(
    futures: deque[Future[Any]], deadline: Deadline, more: Callable[[], deque[Future[Any]]] | None
) -> Iterator[Any]:
    try:
        while futures:
            if more is not None:
                futures.extend(more())
            yield futures.popleft().result(deadline.remaining_s())  # nothing here keeps the result
    except TaskTimeoutError as exc:
        raise concurrent.futures.TimeoutError(str(exc)) from None
    finally:
        if futures:
            futures[0].client.cancel(list(futures))


class _Call:
    """A function with its keyword arguments, which might be named like options of `Client.submit`."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.kwargs = kwargs
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **self.kwargs)


class _ExecutorFuture(concurrent.futures.Future[Any]):
    """Follows a future of the client until that is done. A task that waits for it gives its slot back meanwhile."""

    def __init__(self, executor: ClientExecutor) -> None:
        super().__init__()
        self._executor = executor
        self._followed: Future[Any] | None = None
        self._notifying = threading.Lock()
        self._notified = False
        self.ender = 0
        """The thread that ends it, and calls its callbacks."""

    @property
    def key(self) -> Any:
        """That of the task; None when it is done."""
        followed = self._followed
        return None if followed is None else followed.key

    def follow(self, future: Future[Any]) -> None:
        self._followed = future
        self._executor.keep(self)
        future.add_done_callback(_Follower(self))

    def fail(self, error: BaseException) -> None:
        """There is no task."""
        self.set_running_or_notify_cancel()
        self.set_exception(error)

    def cancel(self) -> bool:
        """Whether it could be cancelled: any call that has not ended can."""
        followed = self._followed
        ender, self.ender = self.ender, threading.get_ident()
        if not super().cancel():
            self.ender = ender
            return False
        if self._may_end() and followed is not None:  # the first one to cancel it
            followed.client.cancel([followed])
            self._done()
        return True

    def result(self, timeout: float | None = None) -> Any:
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error  # Python up to 3.12 takes an exception that is false for none
        finally:
            del self, error  # the traceback has this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self.done():
            return super().exception()
        with task_waiting():
            in_slices(self.ends_in, timeout)
        return super().exception(0)

    def ends_in(self, timeout_s: float) -> bool:
        """Waits so long, and tells whether it has ended."""
        try:
            super().exception(timeout_s)
        except concurrent.futures.TimeoutError:
            return self.done()
        except concurrent.futures.CancelledError:
            pass
        return True

    def _may_end(self) -> bool:
        """True once: for whoever ends it."""
        with self._notifying:
            if self._notified:
                return False
            self._notified = True
        self.set_running_or_notify_cancel()
        return True

    def settle(self, future: Future[Any], error: BaseException | None, value: Any) -> None:
        """The task has ended."""
        if error is not None and future._state.status is CANCELLED:
            super().cancel()
        if not self._may_end():
            return
        self.ender = threading.get_ident()
        if not self.cancelled():
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(value)
        self._done()

    def _done(self) -> None:
        self._followed = None  # the result is here: the cluster need not keep it
        self._executor.forget(self)


class _Follower:
    """Called when the task has ended: in the thread for callbacks, or in the loop of an asynchronous client.

    The traceback of an error refers to all frames under which it was made. None of them may hold the executor's future, which
    holds the error.
    """

    def __init__(self, wrapped: _ExecutorFuture) -> None:
        self._wrapped = [wrapped]

    def __call__(self, future: Future[Any]) -> None:
        if future.client._called_asynchronously():
            asyncio.get_running_loop().create_task(self._follow(future))
            return
        error, value = None, None
        try:
            error = future.exception()
            if error is None:
                value = future.result()
        except BaseException as exc:  # the result can't be fetched or opened
            error = exc
        self._wrapped.pop().settle(future, error, value)
        del value

    async def _follow(self, future: Future[Any]) -> None:
        error, value = None, None
        try:
            value = await result_async(future, None)
        except BaseException as exc:
            error = exc
        self._wrapped.pop().settle(future, error, value)
        del value


class _Exit:
    """At the end of the program: what was submitted is waited for, as with Python's own executors."""

    def __init__(self) -> None:
        self.begun = False
        self.unfinished: dict[_ExecutorFuture | _Mapped, ClientExecutor] = {}

    def wait(self) -> None:
        self.begun = True
        executors = dict.fromkeys(list(self.unfinished.values()))
        for executor in executors:
            if executor._client in sessions.defaults() and executor._client.usable:
                executor._wait_all()


_exit = _Exit()
atexit.register(
    _exit.wait
)  # after that of `sessions`, which closes clients: the last one that was registered comes first
