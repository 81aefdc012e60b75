"""From a node of a dask graph to one call: a function, and arguments in which `KeyRef`s stand for other keys' results.

A plain task becomes a call of its own function, so that workers and the scheduler see what it is; containers in its arguments
become the containers themselves, and nothing of dask travels. Only tasks in arguments, and the small graphs that dask fuses
into one task, become plans (see `plans`). Node classes that dask doesn't have are sent whole, and run themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dask._task_spec import Alias, DataNode, Dict, GraphNode, List, Set, Task, TaskRef, Tuple, _execute_subgraph

from zmqtasks.future import Future
from zmqtasks.integrations.dask import plans
from zmqtasks.integrations.dask.plans import Call, Program, Slot
from zmqtasks.protocol.references import KeyRef

MAX_DEPTH = 30
"""Calls in calls. Pickle writes nested objects by recursion, and a fused chain may have hundreds of tasks."""

_MAKERS: dict[type, tuple[type, Callable[..., Any]]] = {
    List: (list, plans.as_list),
    Tuple: (tuple, plans.as_tuple),
    Set: (set, plans.as_set),
}
_KNOWN = frozenset((Task, Alias, DataNode, Dict, TaskRef, *_MAKERS))


class Lowered(NamedTuple):
    """A call."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Lowering:
    """Lowers one node. `reference` gives what stands for another key: a `KeyRef`, or a small value itself."""

    def __init__(
        self, reference: Callable[[Any], Any], future: Callable[[Future[Any]], KeyRef], literal: Callable[[Any], Any]
    ) -> None:
        self._reference = reference
        self._future = future
        self._literal = literal
        """What stands for a value: the value itself, or a `KeyRef` to bulky data."""
        self._steps: list[Any] = []
        self._uses: list[int] = []

    def lower(self, node: GraphNode) -> Lowered:
        """The call that `node` is."""
        result: Any
        if type(node) is Task and node.func is not _execute_subgraph:
            args = tuple([self._convert(arg, {}) for arg in node.args])
            kwargs = {name: self._convert(arg, {}) for name, arg in node.kwargs.items()}
            if not self._steps and not _any_planned(args) and not _any_planned(kwargs.values()):
                return Lowered(node.func, args, kwargs)
            result = Call(node.func, args, kwargs)
        elif isinstance(node, TaskRef):
            result = self._reference(node.key)
        else:
            result = self._convert(node, {})
        if self._steps:
            return Lowered(plans.run_plan, (Program(self._steps, self._uses, result),), {})
        if type(result) is not Call:
            return Lowered(plans.identity, (result,), {})
        if _any_planned(result.args) or _any_planned(result.kwargs.values()):
            return Lowered(plans.run_plan, (result,), {})
        return Lowered(result.function, tuple(result.args), dict(result.kwargs))

    def _convert(self, obj: Any, scope: Mapping[Any, Any]) -> Any:
        kind = type(obj)
        if kind is TaskRef:
            return self._look_up(obj.key, scope)
        if kind is Alias:
            return self._look_up(obj.target, scope)
        if kind is DataNode:
            return self._value(obj.value)
        if kind is Task:
            if obj.func is _execute_subgraph:
                return self._subgraph(obj, scope)
            args = [self._convert(arg, scope) for arg in obj.args]
            return _call(obj.func, args, {name: self._convert(arg, scope) for name, arg in obj.kwargs.items()})
        if kind in _MAKERS:
            items = [self._convert(item, scope) for item in obj.args]
            make, call = _MAKERS[kind]
            return _call(call, items, {}) if _any_planned(items) else make(items)
        if kind is Dict:
            items = [self._convert(item, scope) for item in obj.args]
            return _call(plans.as_dict, items, {}) if _any_planned(items) else plans.as_dict(*items)
        if isinstance(obj, GraphNode):
            needs = tuple(obj.dependencies)
            values = [self._look_up(key, scope) for key in needs]
            return _call(plans.run_node, [obj, needs, *values], {})
        return self._value(obj)

    def _value(self, value: Any) -> Any:
        return self._future(value) if type(value) is Future else self._literal(value)

    def _look_up(self, key: Any, scope: Mapping[Any, Any]) -> Any:
        if key not in scope:
            return self._reference(key)
        found = scope[key]
        if type(found) is Slot:
            self._uses[found.index] += 1
        return found

    def _step(self, expression: Any) -> Slot:
        self._steps.append(expression)
        self._uses.append(0)
        return Slot(len(self._steps) - 1)

    def _subgraph(self, task: Task, scope: Mapping[Any, Any]) -> Any:
        """A task that dask has fused: a small graph, the key of its result, and names for its inputs."""
        graph, result, names, *inputs = task.args
        inner: dict[Any, Any] = {}
        for name, given in zip(names, inputs, strict=True):
            value = self._convert(given, scope)
            if type(value) is Slot:
                self._uses[value.index] -= 1  # looking it up by its inner name counts it
            inner[name] = self._step(value) if type(value) is Call else value
        uses = Counter(key for node in graph.values() for key in _references(node))
        for key in _sorted(graph, result):
            value = self._convert(graph[key], inner)
            if type(value) is Call and key != result and (uses[key] > 1 or value.depth >= MAX_DEPTH):
                value = self._step(value)
            elif type(value) is Slot:
                self._uses[value.index] -= 1
            inner[key] = value
        return self._look_up(result, inner)


def _call(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Call:
    call = Call(function, args, kwargs)
    deepest = max((arg.depth for arg in (*args, *kwargs.values()) if type(arg) is Call), default=-1)
    call.depth = deepest + 1
    return call


def _any_planned(items: Iterable[Any]) -> bool:
    return any(type(item) is Call or type(item) is Slot for item in items)


def _references(node: Any) -> list[Any]:
    """Every place in which `node` refers to a key, the same key more than once if so."""
    if not isinstance(node, GraphNode):
        return [node.key] if isinstance(node, TaskRef) else []
    if type(node) is Alias:
        return [node.target]
    if type(node) not in _KNOWN or not isinstance(node, Task):
        return list(node.dependencies)
    return [key for arg in (*node.args, *node.kwargs.values()) for key in _references(arg)]


def _sorted(graph: Mapping[Any, GraphNode], result: Any) -> list[Any]:
    """The keys of `graph` that `result` needs, each after what it needs."""
    order: dict[Any, None] = {}
    stack = [(result, False)]
    while stack:
        key, inputs_done = stack.pop()
        if key in order or key not in graph:
            continue
        if inputs_done:
            order[key] = None
            continue
        stack.append((key, True))
        stack.extend((need, False) for need in graph[key].dependencies if need not in order)
    return list(order)
