"""The bytes of functions: kept while that is safe, made anew when it isn't."""

from __future__ import annotations

import functools
import gc
import types
from typing import Any

import pytest

from zmqtasks.functions import FunctionCache, function_name
from zmqtasks.protocol.serialize import loads_function


def in_main(source: str) -> dict[str, Any]:
    """The globals after running `source` as `__main__` would."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(source, scope)
    return scope


def call(cache: FunctionCache, function: Any, *args: Any) -> Any:
    return loads_function(cache.prepare(function).code)(*args)


def test_a_function_of_a_module_is_prepared_once() -> None:
    cache = FunctionCache()
    assert cache.prepare(function_name) is cache.prepare(function_name)
    assert cache.prepare(len).name == "len"


def test_changed_globals_are_seen() -> None:
    scope = in_main("n = 1\ndef f(x): return x + n\n")
    cache = FunctionCache()
    assert call(cache, scope["f"], 1) == 2
    first = cache.prepare(scope["f"])
    assert cache.prepare(scope["f"]) is first
    scope["n"] = 10
    assert call(cache, scope["f"], 1) == 11


def test_changed_helpers_are_seen() -> None:
    scope = in_main("def g(x): return x\ndef f(x): return g(x)\n")
    cache = FunctionCache()
    assert cache.prepare(scope["f"]) is cache.prepare(scope["f"])
    exec("def g(x): return -x\n", scope)
    assert call(cache, scope["f"], 1) == -1


def test_captured_containers_are_written_anew() -> None:
    scope = in_main("values = [1]\ndef f(): return list(values)\n")
    cache = FunctionCache()
    assert call(cache, scope["f"]) == [1]
    scope["values"].append(2)
    assert call(cache, scope["f"]) == [1, 2]


def test_changed_cells_are_seen() -> None:
    scope = in_main(
        "def make():\n    n = 1\n    def set_n(x):\n        nonlocal n\n        n = x\n    def f(): return n\n    return f, set_n\n"
    )
    f, set_n = scope["make"]()
    cache = FunctionCache()
    assert call(cache, f) == 1
    set_n(2)
    assert call(cache, f) == 2


def test_entries_go_with_their_functions() -> None:
    cache = FunctionCache()
    scope = in_main("def f(): return 1\n")
    cache.prepare(scope["f"])
    assert len(cache._entries) == 1
    scope.clear()
    gc.collect()
    assert not cache._entries


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functools.partial(functools.partial(pow, 2), 3), "pow"),
        (lambda: None, "lambda"),
        (types.SimpleNamespace, "SimpleNamespace"),
        ("".join, "join"),
        (type("Callable", (), {"__call__": lambda self: None})(), "Callable"),
    ],
)
def test_names(function: Any, name: str) -> None:
    assert function_name(function) == name


def test_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="must be callable, got 3"):
        FunctionCache().prepare(3)
