"""Objects that payloads refer to: noted while pickling, put in place while unpickling.

*Collecting.* A future pickles itself anywhere in an object graph and calls `note_reference`; whoever serializes
collects the notes with `collect_references`. An attempt that fails (plain pickle, before cloudpickle tries) takes its
notes back.

*Placing.* `substitute` puts a `KeyRef(i)` where a future stood in the arguments' own containers; a payload that holds
one unpickles, inside `resolve_scope(values)`, with `values[i]` in its place, so that the receiver walks nothing.

Both are per thread: threads that serialize at the same time don't see each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from zmqtasks.errors import DeserializationError, SerializationError

__all__ = [
    "KeyRef",
    "collect_references",
    "collector_mark",
    "note_reference",
    "per_thread",
    "resolve_scope",
    "rewind_collector",
    "substitute",
]

T = TypeVar("T")


class _PerThread(threading.local):
    """Notes of the innermost collector (None: nobody collects); values of the open scopes, innermost last."""

    notes: list[Any] | None = None
    scopes: tuple[Sequence[object], ...] = ()


per_thread = _PerThread()


@contextmanager
def collect_references() -> Iterator[list[Any]]:
    """A list of what `note_reference` is told in this thread while the block runs, inner collectors excepted."""
    outer = per_thread.notes
    notes: list[Any] = []
    per_thread.notes = notes
    try:
        yield notes
    finally:
        per_thread.notes = outer


def note_reference(reference: object) -> bool:
    """Note that the object being pickled holds `reference`; False when nobody collects in this thread."""
    notes = per_thread.notes
    if notes is None:
        return False
    notes.append(reference)
    return True


def collector_mark() -> int:
    """Where the collector stands now, for `rewind_collector`."""
    notes = per_thread.notes
    return 0 if notes is None else len(notes)


def rewind_collector(mark: int) -> None:
    """Forget what was noted since `mark`: the attempt that noted it has failed."""
    if per_thread.notes is not None:
        del per_thread.notes[mark:]


@contextmanager
def resolve_scope(values: Sequence[object]) -> Iterator[None]:
    """While open, a `KeyRef(i)` that is unpickled in this thread becomes `values[i]`; the innermost scope counts."""
    outer = per_thread.scopes
    per_thread.scopes = (*outer, values)
    try:
        yield
    finally:
        per_thread.scopes = outer


def _resolve(index: int) -> object:
    if not per_thread.scopes:
        raise DeserializationError(f"reference {index} to an input was unpickled outside the task that has the input")
    values = per_thread.scopes[-1]
    if not 0 <= index < len(values):
        raise DeserializationError(f"reference to input {index}, but the task has {len(values)} inputs")
    return values[index]


class KeyRef:
    """Stands for input number `index` of a task inside its pickled arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _resolve, (self.index,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRef) and self.index == other.index

    def __hash__(self) -> int:
        return hash((KeyRef, self.index))

    def __repr__(self) -> str:
        return f"KeyRef({self.index})"


_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))
_PLAIN = frozenset((int, str, float, bool, type(None), bytes, complex, bytearray, range, slice))

_MAX_DEPTH = 200
"""Containers in containers on the way to a future. Pickle ends at about 500, Python's own stack at 1,000 frames."""


def substitute(obj: T, is_future: type | Callable[[object], bool], register: Callable[[Any], KeyRef]) -> T:
    """`obj` with `register(future)` in the place of each future in its exact lists, tuples, dicts and sets.

    `is_future` is a type or a predicate; numbers, texts and bytes are never asked. The values of dicts are walked,
    their keys are not. An object without a future comes back itself, uncopied, whatever its depth or cycles; where a
    future is found, the containers on the way to it are copied, each once (an object that is used twice stays one),
    all others are shared with `obj`. Raises SerializationError for a future inside a container that contains itself,
    or under more than 200 containers.
    """
    predicate = _instance_check(is_future) if isinstance(is_future, type) else is_future
    if cast(type, type(obj)) not in _CONTAINERS:
        return register(obj) if predicate(obj) else obj  # type: ignore[return-value]
    if not _holds_future(obj, predicate):
        return obj
    result: T = _Substitution(predicate, register).container(obj, 0)
    return result


def _instance_check(cls: type) -> Callable[[object], bool]:
    return lambda obj: isinstance(obj, cls)


def _items(container: Any) -> Iterable[object]:
    return container.values() if type(container) is dict else container


def _holds_future(obj: Any, is_future: Callable[[object], bool]) -> bool:
    stack = [obj]
    seen = {id(obj)}
    while stack:
        items = _items(stack.pop())
        # One pass in C: a list of a million numbers costs 10 ns per item here, and 50 when looked at one by one.
        if _PLAIN.issuperset(map(type, items)):
            continue
        for item in items:
            kind = type(item)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS:
                if item and id(item) not in seen:
                    seen.add(id(item))
                    stack.append(item)
            elif is_future(item):
                return True
    return False


class _Substitution:
    """One walk that copies: what each container has become, and which are open above the current one."""

    def __init__(self, is_future: Callable[[object], bool], register: Callable[[Any], KeyRef]) -> None:
        self.is_future = is_future
        self.register = register
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def container(self, obj: Any, depth: int) -> Any:
        if id(obj) in self.done:
            return self.done[id(obj)]
        if id(obj) in self.open or depth > _MAX_DEPTH:
            # Without a future inside, any depth and any cycle is left to pickle, which knows how to handle it.
            if not _holds_future(obj, self.is_future):
                return obj
            why = "contains itself" if id(obj) in self.open else f"lies under more than {_MAX_DEPTH} containers"
            raise SerializationError(f"a {type(obj).__name__} in the arguments {why} and holds a future: flatten it")
        self.open.add(id(obj))
        new = [self.item(item, depth) for item in _items(obj)]
        self.open.discard(id(obj))
        changed = any(map(_is_not, new, _items(obj)))
        result = obj if not changed else dict(zip(obj, new, strict=True)) if type(obj) is dict else type(obj)(new)
        self.done[id(obj)] = result
        return result

    def item(self, item: Any, depth: int) -> Any:
        kind = type(item)
        if kind in _PLAIN:
            return item
        if kind in _CONTAINERS:
            return self.container(item, depth + 1)
        return self.register(item) if self.is_future(item) else item


def _is_not(a: object, b: object) -> bool:
    return a is not b
