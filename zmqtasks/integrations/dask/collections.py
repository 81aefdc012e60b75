"""dask's collections on a client: graphs computed to results, to futures, and to collections of futures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

import dask.base
from dask._expr import FinalizeCompute
from dask._task_spec import DataNode, GraphNode
from dask.base import collections_to_expr, get_annotations, is_dask_collection
from dask.core import flatten
from dask.delayed import delayed
from dask.tokenize import normalize_token

from zmqtasks.client import Client, task_options
from zmqtasks.errors import ConfigError
from zmqtasks.future import Future
from zmqtasks.integrations.dask.submission import GraphSubmission, checked_graph
from zmqtasks.protocol.ops import TaskOptions

_ANNOTATIONS = ("priority", "retries", "workers", "resources", "allow_other_workers", "idempotent")


def submit(client: Client, graph: Any, keys: Iterable[Any], *, named: bool, **options: Any) -> dict[Any, Future[Any]]:
    """A future for each of `keys`. `options` go before annotations of all, which go before those of a layer or expression."""
    everywhere = {**get_annotations(), **{name: value for name, value in options.items() if value is not None}}
    mapping = checked_graph(graph)
    annotated = graph.__dask_annotations__() if hasattr(graph, "__dask_annotations__") else {}
    return GraphSubmission(
        client,
        mapping,
        keys,
        named=named,
        default=_options(everywhere),
        options=_by_key(annotated, everywhere, options),
    ).run()


def is_dasks(graph: Any, options: Mapping[str, Any]) -> bool:
    """Whether a graph is to be read by dask's rules: it isn't a plain dict of tuples, or there are options for its tasks."""
    if type(graph) is not dict or options or get_annotations():
        return True
    return any(isinstance(node, GraphNode) for node in graph.values())


def get(client: Client, graph: Any, keys: Any, **options: Any) -> Any:
    """Futures in the nested lists in which `keys` are."""
    futures = submit(client, graph, flatten([keys]), named=False, **options)
    return _like(keys, futures)


def compute(
    client: Client, collections: Any, optimize_graph: bool = True, traverse: bool = True, **options: Any
) -> Any:
    """A future for each collection; what is none stays as it is. One collection: one future, else a list.

    With `traverse`, collections inside of lists, tuples, dicts and sets count: these are futures too then.
    """
    single = not isinstance(collections, (list, tuple, set, frozenset))
    given = [collections] if single else list(collections)
    results = [_compute_one(client, item, optimize_graph, traverse, options) for item in given]
    return results[0] if single else results


def _compute_one(client: Client, item: Any, optimize_graph: bool, traverse: bool, options: dict[str, Any]) -> Any:
    if not is_dask_collection(item):
        if not traverse or type(item) not in (list, tuple, dict, set):
            return item
        found, _ = dask.base.unpack_collections(item)
        if not found:
            return item
        item = delayed(item)
    expr = FinalizeCompute(collections_to_expr(item, optimize_graph)).optimize()
    (key,) = flatten(expr.__dask_keys__())
    return submit(client, expr, [key], named=True, **options)[key]


def persist(
    client: Client, collections: Any, optimize_graph: bool = True, traverse: bool = True, **options: Any
) -> Any:
    """Collections like the given ones, whose graphs hold futures of their parts."""

    def parts(expr: Any, keys: list[Any], **_: Any) -> list[DataNode]:
        futures = submit(client, expr, keys, named=True, **options)
        return [DataNode(key, futures[key]) for key in keys]  # dask takes a bare future for another name of its key

    single = not isinstance(collections, (list, tuple, set, frozenset))
    given = [collections] if single else list(collections)
    persisted = dask.base.persist(*given, traverse=traverse, optimize_graph=optimize_graph, scheduler=parts)
    return persisted[0] if single else list(persisted)


def futures_in(collection: Any) -> list[Future[Any]]:
    """Futures that the graph of a collection holds."""
    return [value for value in map(_value, collection.__dask_graph__().values()) if isinstance(value, Future)]


_owners: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""A name for each client of this process that had a future in a collection."""


def _token_of(future: Future[Any]) -> tuple[str, str, Any]:
    """What dask tells futures apart by. It takes equal expressions for the same, and keys of two clients may be equal."""
    return "zmqtasks.Future", _owners.setdefault(future._node, uuid4().hex), future._state.key


normalize_token.register(Future, _token_of)


def _value(node: Any) -> Any:
    return node if isinstance(node, Future) else getattr(node, "value", None)


def _like(keys: Any, futures: Mapping[Any, Future[Any]]) -> Any:
    return [_like(item, futures) for item in keys] if isinstance(keys, list) else futures[keys]


def _options(given: Mapping[str, Any]) -> TaskOptions:
    unknown = given.keys() - set(_ANNOTATIONS)
    values = {name: value for name, value in given.items() if name not in unknown}
    values["allow_other_workers"] = bool(values.get("allow_other_workers")) and values.get("workers") is not None
    try:
        values["priority"] = int(values.get("priority") or 0)
    except (TypeError, ValueError):
        raise ConfigError(f"priority={values['priority']!r}: give a number") from None
    return task_options(**{"retries": None, "workers": None, "resources": None, "idempotent": True, **values})


def _by_key(
    annotated: Mapping[str, Mapping[Any, Any]], everywhere: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[Any, TaskOptions]:
    """Options of the keys that have annotations of their own; equal ones are the same object."""
    collected: dict[Any, dict[str, Any]] = {}
    for name, values in annotated.items():
        if name in _ANNOTATIONS and options.get(name) is None:
            for key, value in values.items():
                collected.setdefault(key, {})[name] = value
    made: dict[str, TaskOptions] = {}
    found: dict[Any, TaskOptions] = {}
    for key, own in collected.items():
        text = repr(sorted(own.items()))
        if text not in made:
            made[text] = _options({**everywhere, **own})
        found[key] = made[text]
    return found
