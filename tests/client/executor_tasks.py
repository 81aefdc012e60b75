"""What calls of the executor tests do, in a module that workers can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from client_tasks import wait_for

from zmqtasks import get_client


class FalseError(Exception):
    """An exception that is false, as some are that count things."""

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("this is never pickled")


class Unopenable:
    def __reduce__(self) -> Any:
        return _not_opened, ()


def _not_opened() -> None:
    raise RuntimeError("this is never opened")


class Thing:
    def method(self) -> None:
        pass


def raise_false() -> None:
    raise FalseError


def make_unpicklable() -> Unpicklable:
    return Unpicklable()


def make_unopenable() -> Unopenable:
    return Unopenable()


def make_thing(_: int) -> Thing:
    return Thing()


def wait_then_touch(gate: str, marker: str) -> int:
    wait_for(gate)
    Path(marker).touch()
    return 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def by_an_executor_inside(n: int) -> int:
    with get_client().get_executor() as pool:
        return sum(future.result() for future in [pool.submit(pow, i, 2) for i in range(n)])
