"""The thread in which done callbacks of a synchronous client run: user code must not stop the loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


class CallbackThread:
    """Runs calls one after another in a daemon thread, which is started with the first one."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def call(self, function: Call) -> None:
        """Has `function` called soon."""
        self._calls.put(function)

    def start(self) -> None:
        """Starts the thread if it isn't running."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="zmqtasks-callbacks", daemon=True)
                self._thread.start()

    def is_current(self) -> bool:
        """Whether the calling thread is this one."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Ends the thread once it has made the calls that it was given."""
        self._calls.put(None)

    def _run(self) -> None:
        while (function := self._calls.get()) is not None:
            function()
            del function  # while this waits for the next one, the last one's future shall be free to go
