"""Tasks that use the cluster themselves, and what tasks print."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import client_tasks as tasks
import pytest

from zmqtasks import Client, worker_client

Eventually = Callable[[Callable[[], object]], None]


def test_tasks_that_submit_tasks(client: Client) -> None:
    assert client.submit(tasks.fib, 8).result(60) == 21
    assert client.submit(tasks.nested_total, 10).result(30) == 55
    assert client.submit(tasks.first_completed, 5).result(30) == [1, 2, 3, 4, 5]


def test_async_tasks_that_submit_tasks(client: Client) -> None:
    assert client.submit(tasks.async_total, 10).result(30) == 56


def test_outside_of_tasks(client: Client) -> None:
    with pytest.raises(ValueError, match="inside of tasks only"), worker_client():
        pass


def test_output_of_tasks_is_shown_here(
    client: Client, capsys: pytest.CaptureFixture[str], eventually: Eventually
) -> None:
    shown: list[str] = []
    client.submit(tasks.say, "hello there").result(10)

    def both() -> bool:
        out, err = capsys.readouterr()
        shown.extend((out, err))
        text = "".join(shown)
        return "hello there\n" in text and "hello there to stderr\n" in text

    eventually(both)


def test_warnings_of_tasks_are_given_here(client: Client, eventually: Eventually) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client.submit(tasks.warn, "careful").result(10)
        eventually(lambda: any("careful" in str(w.message) for w in caught))
    assert any(w.category is RuntimeWarning for w in caught)
