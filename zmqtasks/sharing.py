"""Values that programs and tasks share by name: `Variable` holds one, `Queue` hands them on in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zmqtasks.errors import QueueError, TaskTimeoutError
from zmqtasks.fetching import parse_timeout
from zmqtasks.named import Named, Request, SharedValue, Timeout, checked_maxsize, opened, take_over
from zmqtasks.protocol.ops import CloseQueue, DeleteValue, GetItems, GetValue, PutItem, ReadQueue, SetValue

if TYPE_CHECKING:
    from zmqtasks.client import Client

_KIND = "variable"


class Variable(Named):
    """A value on the cluster that programs and tasks read and change by its name; without a name it is new.

    The value is any small object. Futures in it, wherever they are inside, stay alive as long as the variable holds them, also when
    the client that made them has gone; `get` gives futures of the client that asks. Large data is to be scattered first.

    Pickled into tasks it keeps its name. With an asynchronous client (and in async tasks) the methods give coroutines.

    >>> best = Variable("best")
    >>> best.set({"loss": 0.1})
    >>> best.get()
    {'loss': 0.1}
    """

    _prefix = "variable"

    def __init__(self, name: str | None = None, client: Client | None = None) -> None:
        super().__init__(name, client)

    def set(self, value: Any, timeout: Timeout = None) -> Any:
        """Gives it a value, in place of an older one; others see it when this has returned.

        `timeout` is taken for compatibility: nothing is waited for but the scheduler's answer. Raises PayloadTooLargeError for
        a value that should be scattered, SerializationError for one that can't be pickled.
        """
        parse_timeout(timeout)
        shared = SharedValue(self.client, value, f"the variable {self.name!r}")
        return self._ask(
            lambda number: SetValue(number, _KIND, self.name, shared.data, shared.keys), lambda request, answer: None
        )

    def get(self, timeout: Timeout = None) -> Any:
        """The value; waits until it has one. Raises TaskTimeoutError (a TimeoutError) when it has none within `timeout`."""
        timeout_s = parse_timeout(timeout)

        def then(request: Request, answer: Any) -> Any:
            if answer is None:
                raise TaskTimeoutError(f"the variable {self.name!r} was not set within {timeout_s:g} s")
            data, held = answer
            if held:
                return take_over(self.client, request, [data])[0]
            return opened(self.client, data)

        return self._ask(lambda number: GetValue(number, _KIND, self.name, timeout_s), then)

    def delete(self) -> Any:
        """Takes the value away, for all; who waits for one goes on waiting."""
        return self._ask(lambda number: DeleteValue(number, _KIND, self.name), lambda request, answer: None)

    def __reduce__(self) -> Any:
        return type(self), (self.name,)


class Queue(Named):
    """A queue on the cluster: programs and tasks put values in and take them out, each value once, the oldest first.

    With a `maxsize`, `put` waits while there are so many values in it; who names the queue without one adopts it. Values are
    as those of a `Variable`: futures inside stay alive while they are queued, and until their taker has them.

    A value is the taker's when `get` returns; a `get` that is interrupted or times out takes nothing, and what a taker that
    is killed had not got yet goes to the next one. Who waits is served in order. A task that waits gives its slot back meanwhile.

    Pickled into tasks it keeps its name and bound. With an asynchronous client (and in async tasks) the methods give coroutines.

    >>> queue = Queue("work", maxsize=10)
    >>> queue.put(1)
    >>> queue.get(timeout="2s")
    1
    """

    _prefix = "queue"
    _error = QueueError

    def __init__(self, name: str | None = None, client: Client | None = None, maxsize: int = 0) -> None:
        super().__init__(name, client)
        self.maxsize = checked_maxsize(maxsize)
        self._closings = -1
        """As the scheduler has told: it refuses an object that was used before the queue was closed."""

    def put(self, value: Any, timeout: Timeout = None) -> Any:
        """Adds a value at the end; waits while the queue is full. Raises TaskTimeoutError when it is so for `timeout`.

        Raises QueueError when it was closed, or is in use with another `maxsize`, PayloadTooLargeError for a value that should
        be scattered. When it times out, the value is not in the queue; when it is interrupted, it may be.
        """
        timeout_s = parse_timeout(timeout)
        shared = SharedValue(self.client, value, f"the queue {self.name!r}")

        def make(number: int) -> PutItem:
            return PutItem(number, self.name, shared.data, shared.keys, self.maxsize, self._closings, timeout_s)

        def then(request: Request, answer: Any) -> None:
            self._closings, is_in = answer
            if not is_in:
                raise TaskTimeoutError(f"the queue {self.name!r} was full for {timeout_s:g} s; the value is not in it")

        return self._ask(make, then)

    def get(self, timeout: Timeout = None, batch: bool | int = False) -> Any:
        """Takes the first value out; waits for one. Raises TaskTimeoutError when there is none within `timeout`.

        A number as `batch` waits for so many and gives a list; `True` gives a list of all that is there, without waiting.
        Raises QueueError when the queue is closed.
        """
        timeout_s = parse_timeout(timeout)
        if not isinstance(batch, int) or (batch is not False and batch < 1):
            raise ValueError(f"batch={batch!r}: give a number of values, at least 1, or True for all that are there")
        count = 0 if batch is True else batch or 1

        def then(request: Request, answer: Any) -> Any:
            self._closings, blobs = answer
            if blobs is None:
                what = f"there were no {batch} values" if batch else "nothing was put"
                raise TaskTimeoutError(f"{what} in the queue {self.name!r} within {timeout_s:g} s")
            values = take_over(self.client, request, blobs) if blobs else []
            return values if batch else values[0]

        return self._ask(lambda number: GetItems(number, self.name, count, self._closings, timeout_s), then)

    def qsize(self) -> Any:
        """How many values are in it."""

        def then(request: Request, answer: Any) -> int:
            self._closings, size = answer
            return int(size)

        return self._ask(lambda number: ReadQueue(number, self.name, self._closings), then)

    def close(self) -> Any:
        """Drops what is in it; who waits, and later uses of objects that were used before, get a QueueError.

        A new `Queue` of the same name begins anew.
        """

        def then(request: Request, answer: Any) -> None:
            self._closings = max(self._closings, 0)

        return self._ask(lambda number: CloseQueue(number, self.name), then)

    def __reduce__(self) -> Any:
        return type(self), (self.name, None, self.maxsize), {"_closings": self._closings}
