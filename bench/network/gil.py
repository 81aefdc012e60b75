"""A thread that holds the GIL as user code does: in pure Python, giving it up only when the interpreter takes it away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def holding_gil(wanted: bool = True) -> Iterator[None]:
    """While the block runs, another thread of this process computes in pure Python; nothing when not `wanted`."""
    if not wanted:
        yield
        return
    stopping = False

    def compute() -> None:
        total = 0
        while not stopping:
            for number in range(1000):
                total += number * number

    thread = threading.Thread(target=compute, name="holds-gil", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping = True
        thread.join(timeout=10)
