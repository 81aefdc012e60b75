"""Functions that tasks of these tests run: the workers import this module too."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import zmqtasks
from zmqtasks import Future, get_client, worker_client


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def total(values: list[int]) -> int:
    return sum(values)


def keywords(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def fail(message: str = "no") -> None:
    _inner(message)


def _inner(message: str) -> None:
    raise ValueError(message)


def fail_until(path: str) -> str:
    """Fails until the file exists."""
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return "there"


def wait_for(path: str, value: Any = None) -> Any:
    """Runs until the file exists (at most 30 s)."""
    deadline = time.monotonic() + 30
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.002)
    return value


def touch(path: str, *_: Any) -> str:
    Path(path).touch()
    return path


def blob(size: int) -> bytes:
    return bytes(size)


def sum_array(array: Any) -> float:
    return float(array.sum())


def fib(n: int) -> int:
    if n < 2:
        return n
    client = get_client()
    a, b = client.submit(fib, n - 1), client.submit(fib, n - 2)
    return int(a.result() + b.result())


def nested_total(n: int) -> int:
    with worker_client() as client:
        return int(sum(client.gather(client.map(inc, range(n)))))


async def async_total(n: int) -> int:
    client = get_client()
    futures = client.map(inc, range(n))
    results = await client.gather(futures)
    return int(sum(results)) + await futures[0]


async def async_inc(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def first_completed(n: int) -> list[int]:
    client = get_client()
    return sorted(future.result() for future in zmqtasks.as_completed(client.map(inc, range(n))))


def make_future(n: int) -> Future[int]:
    return get_client().submit(inc, n)


def result_of(future: Future[Any]) -> Any:
    return future.result()


class Box:
    """Holds a future where substitution doesn't look."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future


def open_box(box: Box) -> Any:
    assert isinstance(box.future, Future)
    return box.future.result()


def say(text: str) -> None:
    print(text)
    print(text + " to stderr", file=sys.stderr)


def warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def read_only(array: Any) -> Any:
    array += 1
    return array


class OddError(Exception):
    """An exception whose constructor takes more than its message."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a = a


def fail_oddly() -> None:
    raise OddError(1, 2)
