"""On a worker: tasks that are more than one call of a function, as dask's fused and nested tasks are.

A plan is a tree of calls: `Call(f, (1, Call(g, (2,))))` is `f(1, g(2))`. What several calls use is a step of a `Program`, which
runs once and stands in the later ones as a `Slot`. dask itself is not needed to run a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class Call:
    """A call whose arguments may hold calls and slots; `depth` is that of the tree under it."""

    __slots__ = ("args", "depth", "function", "kwargs")

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.depth = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, (self.function, self.args, self.kwargs)


class Slot:
    """The result of step number `index`."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.index,)


class Program:
    """Steps, how often the result of each is used, and the call that gives the result of all."""

    __slots__ = ("result", "steps", "uses")

    def __init__(self, steps: list[Any], uses: list[int], result: Any) -> None:
        self.steps = steps
        self.uses = uses
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self.steps, self.uses, self.result)


class _Run:
    """One run of a program. A result goes with its last use: a fused chain must not hold all of its arrays."""

    __slots__ = ("uses", "values")

    def __init__(self, uses: Sequence[int]) -> None:
        self.uses = list(uses)
        self.values: list[Any] = []

    def value(self, expression: Any) -> Any:
        kind = type(expression)
        if kind is Call:
            args = map(self.value, expression.args)
            if expression.kwargs:
                return expression.function(*args, **{n: self.value(v) for n, v in expression.kwargs.items()})
            return expression.function(*args)
        if kind is Slot:
            return self._take(expression.index)
        return expression

    def _take(self, index: int) -> Any:
        value = self.values[index]
        self.uses[index] -= 1
        if not self.uses[index]:
            self.values[index] = None
        return value


def run_plan(plan: Any) -> Any:
    """The result of a call or a program."""
    if type(plan) is not Program:
        return _Run(()).value(plan)
    run = _Run(plan.uses)
    for step in plan.steps:
        run.values.append(run.value(step))
    return run.value(plan.result)


def run_node(node: Callable[[Mapping[Any, Any]], Any], keys: Iterable[Any], *values: Any) -> Any:
    """The result of a graph node that has its own way of running: a class that somebody derived from dask's."""
    return node(dict(zip(keys, values, strict=True)))


def identity(value: Any) -> Any:
    """A value of a graph, or another key's result."""
    return value


def as_list(*items: Any) -> list[Any]:
    """A list of computed items."""
    return list(items)


def as_tuple(*items: Any) -> tuple[Any, ...]:
    """A tuple of computed items."""
    return items


def as_set(*items: Any) -> set[Any]:
    """A set of computed items."""
    return set(items)


def as_dict(*items: Any) -> dict[Any, Any]:
    """A dict of computed names and items, by turns."""
    return dict(zip(items[::2], items[1::2], strict=True))
