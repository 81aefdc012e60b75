"""Graphs written as dicts, the way dask writes them, and results put back into the containers that futures came in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from zmqtasks.errors import ConfigError
from zmqtasks.fetching import SKIPPED
from zmqtasks.functions import function_name
from zmqtasks.future import Future
from zmqtasks.nodes.client.names import to_wire
from zmqtasks.protocol.ops import TaskOptions
from zmqtasks.submission import Submitter

_KEY_TYPES = (str, int, float, tuple, bytes)
_OPTIONS = TaskOptions()


def submit_graph(submitter: Submitter, graph: Mapping[Any, Any], keys: Any) -> Any:
    """Futures for `keys` (one, or nested lists), after submitting all that these need, each task after its inputs."""
    names = {key: key for key in graph}
    wanted = _flat(keys)
    for key in wanted:
        if key not in names:
            raise KeyError(f"the graph has no key {key!r}")
    futures: dict[Any, Future[Any]] = {}
    for key in _ordered(graph, names, wanted):
        futures[key] = _submit_one(submitter, key, graph[key], names, futures)
    return _like(keys, futures)


def _flat(keys: Any) -> list[Any]:
    return [key for item in keys for key in _flat(item)] if isinstance(keys, list) else [keys]


def _like(keys: Any, futures: dict[Any, Future[Any]]) -> Any:
    return [_like(item, futures) for item in keys] if isinstance(keys, list) else futures[keys]


def _is_task(value: Any) -> bool:
    return type(value) is tuple and bool(value) and callable(value[0])


def _reference(value: Any, names: dict[Any, Any]) -> bool:
    """Whether `value` is a key of the graph: the very same, as 1, 1.0 and True are equal in Python."""
    if not isinstance(value, _KEY_TYPES) or not isinstance(value, Hashable):
        return False
    try:
        return value in names and type(names[value]) is type(value)
    except TypeError:  # a tuple of something that has no hash
        return False


def _needs(value: Any, names: dict[Any, Any]) -> list[Any]:
    """Keys that a value of the graph refers to."""
    found: list[Any] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if _is_task(item):
            stack.extend(reversed(item[1:]))
        elif type(item) is list:
            stack.extend(reversed(item))
        elif type(item) is dict:
            stack.extend(reversed(list(item.values())))
        elif _reference(item, names):
            found.append(item)
    return found


def _ordered(graph: Mapping[Any, Any], names: dict[Any, Any], wanted: list[Any]) -> list[Any]:
    """The keys that are needed, inputs first, depth first. Raises ConfigError for a cycle."""
    order: dict[Any, None] = {}
    open_keys: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(key, False) for key in reversed(wanted)]
    while stack:
        key, inputs_done = stack.pop()
        if inputs_done:
            open_keys.discard(key)
            order[key] = None
            continue
        if key in order:
            continue
        if key in open_keys:
            raise ConfigError(f"the graph has a cycle through {key!r}")
        open_keys.add(key)
        stack.append((key, True))
        for need in reversed(_needs(graph[key], names)):
            if need in open_keys:
                raise ConfigError(f"the graph has a cycle through {need!r}")
            if need not in order:
                stack.append((need, False))
    return list(order)


def _submit_one(
    submitter: Submitter, key: Any, value: Any, names: dict[Any, Any], futures: dict[Any, Future[Any]]
) -> Future[Any]:
    function: Callable[..., Any]
    if not _is_task(value):
        function, args = identity, (_filled(value, names, futures),)
        if _has_task(value):
            function, args = evaluate, (_plan(value, names, futures),)
    elif any(map(_has_task, value[1:])):
        function, args = evaluate, (_plan(value, names, futures),)
    else:
        function, args = value[0], tuple(_filled(item, names, futures) for item in value[1:])
    name = function_name(value[0]) if _is_task(value) else "data"
    return submitter.submit(function, args, {}, _OPTIONS, to_wire(key), name, False)


def _has_task(value: Any) -> bool:
    if type(value) is list:
        return any(map(_has_task, value))
    if type(value) is dict:
        return any(map(_has_task, value.values()))
    return _is_task(value)


def _filled(value: Any, names: dict[Any, Any], futures: dict[Any, Future[Any]]) -> Any:
    """A value without tasks, with futures in the place of keys."""
    if type(value) is list:
        return [_filled(item, names, futures) for item in value]
    if type(value) is dict:
        return {name: _filled(item, names, futures) for name, item in value.items()}
    return futures[value] if _reference(value, names) else value


def _plan(value: Any, names: dict[Any, Any], futures: dict[Any, Future[Any]]) -> tuple[Any, ...]:
    """A value with tasks inside, told apart from everything that results may look like."""
    if _is_task(value):
        return ("call", value[0], tuple(_plan(item, names, futures) for item in value[1:]))
    if type(value) is list:
        return ("list", tuple(_plan(item, names, futures) for item in value))
    if type(value) is dict:
        return ("dict", tuple(value), tuple(_plan(item, names, futures) for item in value.values()))
    return ("value", futures[value] if _reference(value, names) else value)


def evaluate(plan: tuple[Any, ...]) -> Any:
    """On a worker: a task with tasks inside its arguments."""
    if plan[0] == "call":
        return plan[1](*map(evaluate, plan[2]))
    if plan[0] == "list":
        return list(map(evaluate, plan[1]))
    if plan[0] == "dict":
        return dict(zip(plan[1], map(evaluate, plan[2]), strict=True))
    return plan[1]


def identity(value: Any) -> Any:
    """On a worker: a plain value of a graph, or another key's result."""
    return value


def filled_in(shape: Any, futures: list[Future[Any]], values: list[Any]) -> Any:
    """`shape` with the values in the place of the futures; what was skipped is left out (None if it stands alone)."""
    filled = _put(shape, dict(zip(map(id, futures), values, strict=True)))
    return None if filled is SKIPPED else filled


def _put(shape: Any, values: dict[int, Any]) -> Any:
    if isinstance(shape, Future):
        return values[id(shape)]
    if isinstance(shape, dict):
        pairs = [(name, _put(item, values)) for name, item in shape.items()]
        return {name: value for name, value in pairs if value is not SKIPPED}
    if isinstance(shape, (list, tuple, set, frozenset)):
        items = [value for item in shape if (value := _put(item, values)) is not SKIPPED]
        if isinstance(shape, tuple):
            return tuple(items)
        return set(items) if isinstance(shape, (set, frozenset)) else items
    return shape
