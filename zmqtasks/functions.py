"""Functions on their way to workers: their bytes, made as rarely as is safe, and the digest that names them.

A function that a module has is written as its name: its bytes never change, and are kept. A function by value (from
`__main__`, a notebook, a closure) carries the globals and cells that it has *now*: its bytes are kept only as long as these
are the very same objects and can't change inside. Everything else is written anew for each submission.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import msgspec

from zmqtasks.protocol.references import collect_references
from zmqtasks.protocol.serialize import dumps_function

DIGEST_BYTES = 16
MAX_NAME = 100
CACHE_LIMIT = 10_000
_MAX_DEPTH = 8

_FIXED = frozenset((int, float, bool, complex, str, bytes, type(None), types.ModuleType, types.BuiltinFunctionType))
"""Types of captured values that cannot change inside."""


def call_function(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function that travels as an argument: because it is large, or because it holds futures."""
    return function(*args, **kwargs)


class PreparedFunction(msgspec.Struct, frozen=True, gc=False):
    """What a submission needs to know of its function."""

    digest: bytes
    code: bytes
    name: str
    holds_futures: bool = False


def function_name(function: Any) -> str:
    """The name that tasks of `function` are shown by."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(function, functools.partial):
            break
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)[:MAX_NAME]


def digest_of(data: bytes) -> bytes:
    """What names these bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class FunctionCache:
    """Prepared functions, by the identity of the function object."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, PreparedFunction, tuple[object, ...] | None]] = {}

    def prepare(self, function: Any) -> PreparedFunction:
        """The bytes and digest of `function`; raises SerializationError, and TypeError when it can't be called."""
        entry = self._entries.get(id(function))
        if entry is not None:
            reference, prepared, captured = entry
            if reference() is function and (
                captured is None or _still(captured, function) or _same(captured, _captured(function))
            ):
                return prepared
        if not callable(function):
            raise TypeError(f"the first argument must be callable, got {function!r}")
        with collect_references() as notes:
            code = dumps_function(function)
        prepared = PreparedFunction(digest_of(code), code, function_name(function), bool(notes))
        if not notes:
            self._remember(function, prepared)
        return prepared

    def _remember(self, function: Any, prepared: PreparedFunction) -> None:
        captured = None
        if not by_name(function):
            captured = _captured(function)
            if captured is None:
                return
        number = id(function)
        entries = self._entries
        if len(entries) >= CACHE_LIMIT:
            entries.clear()
        try:
            entries[number] = weakref.ref(function, lambda _: entries.pop(number, None)), prepared, captured
        except TypeError:  # no weak references to this type
            pass


def by_name(function: Any) -> bool:
    """Whether pickle writes `function` as a module's name and its own."""
    if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type)):
        return False
    module = getattr(function, "__module__", None)
    if module is None or module == "__main__" or _any_by_value():
        return False
    found: Any = sys.modules.get(module)
    for part in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return found is function


def _any_by_value() -> bool:
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is not None and bool(cloudpickle.list_registry_pickle_by_value())


def _captured(function: Any) -> tuple[object, ...] | None:
    """The objects that a function by value carries, or None when one of them can change inside."""
    found: list[object] = []
    return tuple(found) if _capture(function, found, set(), 0) else None


def _capture(function: Any, found: list[object], seen: set[int], depth: int) -> bool:
    if type(function) is not types.FunctionType or function.__dict__ or depth > _MAX_DEPTH:
        return False
    seen.add(id(function))
    code = function.__code__
    found += (code, function.__defaults__, function.__kwdefaults__)
    if function.__kwdefaults__ or any(type(value) not in _FIXED for value in function.__defaults__ or ()):
        return False
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return False  # inner functions have globals of their own; seldom worth the walk
    values: list[object] = []
    try:
        values += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # an empty cell
        return False
    scope = function.__globals__
    values += [scope[name] for name in code.co_names if name in scope]
    for value in values:
        found.append(value)
        if type(value) in _FIXED or id(value) in seen or by_name(value):
            continue
        if not _capture(value, found, seen, depth + 1):
            return False
    return True


def _still(captured: tuple[object, ...], function: types.FunctionType) -> bool:
    """What `_same` finds out, at once, for a function that looks nothing up outside of itself."""
    code = function.__code__
    return (
        code is captured[0]
        and not code.co_names
        and not code.co_freevars
        and function.__defaults__ is captured[1]
        and not function.__kwdefaults__
        and not function.__dict__
    )


def _same(old: tuple[object, ...], new: tuple[object, ...] | None) -> bool:
    return new is not None and len(old) == len(new) and all(map(_is, old, new))


def _is(a: object, b: object) -> bool:
    return a is b
