"""Objects to payloads and back: the one door that user objects pass.

`serialize` picks the family by the object's type (pickle unless registered otherwise), `deserialize` by the payload's
header. Small objects that travel inside control ops go through `serialize_inline` and `deserialize_inline`, which for
ordinary objects cost what pickle costs.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol import families
from zmqtasks.protocol.families import Family, register_serialization, register_serialization_family
from zmqtasks.protocol.families import pickle as pickle_family
from zmqtasks.protocol.frames import Buffer
from zmqtasks.protocol.payload import (
    PICKLE_HEADER,
    PICKLE_TAG,
    Payload,
    make_header,
    pack_inline,
    parse_header,
    unpack_inline,
)
from zmqtasks.protocol.references import (
    KeyRef,
    collect_references,
    note_reference,
    per_thread,
    resolve_scope,
    substitute,
)
from zmqtasks.protocol.sizeof import sizeof

__all__ = [
    "Family",
    "KeyRef",
    "collect_references",
    "deserialize",
    "deserialize_inline",
    "dumps_function",
    "loads_function",
    "note_reference",
    "register_serialization",
    "register_serialization_family",
    "resolve_scope",
    "serialize",
    "serialize_inline",
    "sizeof",
    "substitute",
]

_SCALARS = frozenset((int, str, float, bool, type(None), bytes, complex))
_CONTAINERS = frozenset((tuple, list, dict, set, frozenset))

_dumps = pickle.dumps
_loads = pickle.loads
_modules = sys.modules
_user_types = families.user_types
_MAIN = pickle_family.MAIN


def serialize(obj: Any, *, family: str | None = None) -> Payload:
    """`obj` as a payload, written by `family`, or else by the family that its type is registered for, or by pickle.

    Frames may be views of the object's own memory: they keep it alive, and show what is written to it until they are
    sent. Raises SerializationError that names the type and the cause.
    """
    name = family if family is not None else families.lookup_family_name(type(obj))
    if name is not None and name != "pickle":
        written = families.write(name, families.get_family_to_write(name), obj)
        if written is not None:
            metadata, frames = written
            return Payload(make_header(name, metadata), frames)
        if family is not None:
            raise SerializationError(
                f"the family {name!r} cannot write this {type(obj).__qualname__}: let pickle do it"
            )
    _, frames = pickle_family.serialize(obj)
    return Payload(PICKLE_HEADER, frames)


def deserialize(payload: Payload) -> Any:
    """The object in `payload`. Opens it: a pickle runs code of whoever wrote it.

    Arrays are made on the frames, without a copy: writable where the frames are. Raises DeserializationError, with
    the error of the object's own code as the cause where there is one.
    """
    if payload.header == PICKLE_HEADER:
        return pickle_family.deserialize(b"", payload.frames)
    name, metadata = parse_header(payload.header)
    family = families.get_family_to_read(name)
    try:
        return family.deserialize(metadata, payload.frames)
    except DeserializationError:
        raise
    except Exception as exc:
        raise DeserializationError(
            f"a payload of the family {name!r} cannot be read: {type(exc).__name__}: {exc}"
        ) from exc


def serialize_inline(obj: Any) -> bytes:
    """`obj` as an inline blob: `pack_inline(serialize(obj))`, at the cost of pickle alone for ordinary types."""
    kind = type(obj)
    if kind in _SCALARS:
        return _dumps(obj, 5)
    if kind not in _CONTAINERS and families.lookup_family_name(kind) is not None:
        return pack_inline(serialize(obj))
    if _user_types or ("cloudpickle" in _modules and pickle_family.pickled_by_value()):
        return pickle_family.dumps(obj)
    # As pickle_family.dumps, without its calls: they would double the cost of a small tuple.
    notes = per_thread.notes
    mark = len(notes) if notes else 0
    try:
        data = _dumps(obj, 5)
        if data.find(_MAIN) < 0:  # `in` takes 70 ns more: it tries the bytes as a number first
            return data
    except Exception:  # cloudpickle is asked next
        pass
    return pickle_family.dumps_by_value(obj, mark)


def deserialize_inline(data: Buffer) -> Any:
    """The object in an inline blob; as `deserialize(unpack_inline(data))`."""
    if len(data) and data[0] == PICKLE_TAG:
        try:
            return _loads(data)
        except DeserializationError:
            raise
        except Exception as exc:
            raise pickle_family.unreadable(data, exc) from exc
    return deserialize(unpack_inline(data))


def dumps_function(function: Any) -> bytes:
    """A callable as bytes: by name where a module has it, by value (cloudpickle) for `__main__`, lambdas and closures.

    The same function, unchanged, gives the same bytes: they are what its digest is taken of. Nothing is cached here,
    since a function by value carries the globals and cells that it has now.
    """
    return pickle_family.dumps(function)


def loads_function(data: Buffer) -> Any:
    """The callable in `data`; raises DeserializationError that names what is missing here."""
    return pickle_family.loads(data)
