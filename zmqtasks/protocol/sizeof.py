"""About how much memory an object takes: quick, never exact, never an error."""

from __future__ import annotations

import sys
from collections import deque
from itertools import islice
from typing import Any

__all__ = ["sizeof"]

_SIMPLE = frozenset((int, str, float, bool, type(None), bytes, bytearray, complex, range, slice))
_SEQUENCES = frozenset((list, tuple, set, frozenset, deque))

_SAMPLE = 16
"""Items of a container that are looked at; the others are taken for their average."""

_MAX_DEPTH = 5
_UNKNOWN_BYTES = 64


def sizeof(obj: object) -> int:
    """An estimate of the bytes that `obj` takes: arrays count their data, containers a sample of their items."""
    return _sizeof(obj, 0)


def _sizeof(obj: Any, depth: int) -> int:
    kind = type(obj)
    if kind in _SIMPLE:
        return sys.getsizeof(obj)
    try:
        if kind is memoryview:
            return sys.getsizeof(obj) + int(obj.nbytes)
        if kind in _SEQUENCES:
            return sys.getsizeof(obj) + _sample_size(list(islice(obj, _SAMPLE)), len(obj), depth)
        if isinstance(obj, dict):
            pairs = list(islice(obj.items(), _SAMPLE))
            return _own_size(obj) + _sample_size([part for pair in pairs for part in pair], 2 * len(obj), depth)
        return _object_size(obj, depth)
    except Exception:
        return _UNKNOWN_BYTES


def _sample_size(sample: list[Any], count: int, depth: int) -> int:
    if not sample or depth >= _MAX_DEPTH:
        return 0
    # Each level looks at fewer items, so that nested containers don't multiply to 16 ** 5 of them.
    sample = sample[: max(2, _SAMPLE >> (2 * depth))]
    return sum(_sizeof(item, depth + 1) for item in sample) * count // len(sample)


def _own_size(obj: object) -> int:
    try:
        return max(0, sys.getsizeof(obj, _UNKNOWN_BYTES))
    except Exception:  # a __sizeof__ of user code
        return _UNKNOWN_BYTES


def _object_size(obj: Any, depth: int) -> int:
    if type(obj).__module__.partition(".")[0] == "pandas":
        return _UNKNOWN_BYTES + _pandas_size(obj)
    strides = getattr(obj, "strides", None)
    if type(strides) is tuple and 0 in strides and type(obj.shape) is tuple:
        data = int(obj.itemsize)
        for length, stride in zip(obj.shape, strides, strict=True):
            data *= length if stride else min(length, 1)
        return _UNKNOWN_BYTES + data
    nbytes = getattr(obj, "nbytes", None)
    if type(nbytes) is int and nbytes >= 0:
        return _UNKNOWN_BYTES + nbytes
    size = _own_size(obj)
    attributes = getattr(obj, "__dict__", None)
    if type(attributes) is dict:
        size += _sizeof(attributes, depth + 1)
    return size


def _pandas_size(obj: Any) -> int:
    """Data and index of a frame or series. `memory_usage` makes a series for each column: 100 us and more for a small frame."""
    manager = getattr(obj, "_mgr", None)
    if manager is None:  # an index, or an array
        return int(obj.nbytes)
    return sum(int(array.nbytes) for array in manager.arrays) + int(obj.index.nbytes)
