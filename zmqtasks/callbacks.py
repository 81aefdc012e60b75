"""Functions that are called when futures settle: in a thread of their own, or in the loop of an asynchronous client."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zmqtasks.nodes.client.callbacks import Call
from zmqtasks.nodes.client.waiters import add_waiter

if TYPE_CHECKING:
    from zmqtasks.future import Future
    from zmqtasks.nodes.client.node import ClientNode
    from zmqtasks.nodes.client.state import FutureState

logger = logging.getLogger("zmqtasks.client")


class _Callback:
    """Waits for one record. Keeps the future alive until then, as dask does."""

    def __init__(
        self, future: Future[Any], function: Callable[[Future[Any]], Any], schedule: Callable[[Call], Any]
    ) -> None:
        self.future = future
        self.function = function
        self.schedule = schedule

    def settled(self, state: FutureState) -> None:
        try:
            self.schedule(self)
        except RuntimeError:  # the loop has been closed
            pass

    def __call__(self) -> None:
        try:
            self.function(self.future)
        except Exception:
            logger.exception("a done callback of %r failed", self.future)


def call_when_done(future: Future[Any], function: Callable[[Future[Any]], Any]) -> None:
    """Calls `function(future)` once, when it has settled."""
    node: ClientNode = future._node
    if node.loop_thread is None:
        callback = _Callback(future, function, node.loop.call_soon_threadsafe)
    else:
        node.callbacks.start()
        callback = _Callback(future, function, node.callbacks.call)
    with node.lock:
        pending = add_waiter(callback, (future._state,))
    if not pending:
        callback.settled(future._state)
