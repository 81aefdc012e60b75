"""The registry of serialization families: who writes an object of which type, and who reads a payload of which name.

A family turns objects into metadata and frames and back. Families and types may be registered by import path: nothing
is imported until the first object of the type, or the first payload of the family, is seen.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pickle import PickleBuffer
from typing import Any, Protocol

from zmqtasks.errors import ConfigError, DeserializationError, SerializationError
from zmqtasks.protocol.frames import Buffer

__all__ = [
    "Family",
    "FunctionFamily",
    "get_family",
    "lookup_family_name",
    "register_serialization",
    "register_serialization_family",
    "user_family_of",
    "user_types",
    "write",
]

ENTRY_POINTS = "zmqtasks.families"
"""Entry-point group in which an installed package announces families: the name is the family's, the value its path."""


class Family(Protocol):
    """What writes and reads one kind of payload. A module with these two functions is a family too."""

    def serialize(self, obj: Any, /) -> tuple[bytes, Sequence[Buffer]] | None:
        """Metadata and frames of `obj`; None: not for this family, pickle it.

        Frames are C-contiguous buffers of any kind, such as arrays, and may be the object's own memory: the reader gets
        their bytes.
        """

    def deserialize(self, metadata: bytes, frames: Sequence[Buffer], /) -> object:
        """The object. Metadata and frames come from a peer: check them, and raise DeserializationError."""


class FunctionFamily:
    """A family made of two functions whose metadata is plain data (as of the msgpack family) instead of bytes."""

    def __init__(
        self,
        serializer: Callable[[Any], tuple[object, Sequence[Buffer]]],
        deserializer: Callable[[Any, Sequence[Buffer]], object],
    ) -> None:
        self.serializer = serializer
        self.deserializer = deserializer

    def serialize(self, obj: Any, /) -> tuple[bytes, Sequence[Buffer]]:
        from zmqtasks.protocol.families import msgpack

        plain, frames = self.serializer(obj)
        return msgpack.dumps(plain), frames

    def deserialize(self, metadata: bytes, frames: Sequence[Buffer], /) -> object:
        from zmqtasks.protocol.families import msgpack

        return self.deserializer(msgpack.loads(metadata), frames)


_BUILTIN = ("pickle", "numpy", "msgpack", "cuda")

_families: dict[str, Family | str] = {name: f"{__name__}.{name}" for name in _BUILTIN}
_types: dict[type, str] = {}
_bases: dict[type, str] = {}

# Root package -> "module:Type" -> (family, also for subclasses); an entry moves to the tables above once its type
# exists.
_pending: dict[str, dict[str, tuple[str, bool]]] = {}

user_types: set[str] = set()
"""Paths of the types that third parties have registered: while it is empty, pickling needs no hook."""


def register_serialization_family(name: str, family: Family | str) -> None:
    """Make `family` the writer and reader of payloads named `name`; or its import path, "module" or "module:attr".

    Both sides of a link need it: on a node without it, a payload of that name raises DeserializationError. A package
    can announce it on every node where it is installed with an entry point in the group `zmqtasks.families`.
    """
    if name in _BUILTIN:
        raise ConfigError(f"the serialization family {name!r} is built in: choose another name")
    if not name or not isinstance(name, str):
        raise ConfigError(f"the name of a serialization family is a non-empty text, not {name!r}")
    _families[name] = family


def register_serialization(
    cls: type | str,
    *,
    family: str | None = None,
    serializer: Callable[[Any], tuple[object, Sequence[Buffer]]] | None = None,
    deserializer: Callable[[Any, Sequence[Buffer]], object] | None = None,
    name: str | None = None,
    subclasses: bool = False,
) -> None:
    """Choose how objects of type `cls` are written, alone or inside other objects that are pickled.

    Args:
        cls: the type; or "module:Type", looked up when the first object of that package is seen. family: name of a
        registered family; or instead of it: serializer: gives metadata (plain data: numbers, texts, tuples, dicts,
        ...) and a list of C-contiguous buffers (bytes, arrays, ...) for an object. deserializer: gives the object for
        metadata and buffers, which are flat bytes here, whatever they were. name: of the family made of the two
        functions; "module:Type" by default. Both sides register the same name. subclasses: also for subclasses of
        `cls`, unless they are registered themselves.
    """
    path = cls if isinstance(cls, str) else f"{cls.__module__}:{cls.__qualname__}"
    if family is None:
        if serializer is None or deserializer is None:
            raise ConfigError(f"{path}: give a family, or both a serializer and a deserializer")
        family = name or path
        register_serialization_family(family, FunctionFamily(serializer, deserializer))
    elif serializer is not None or deserializer is not None or name is not None:
        raise ConfigError(f"{path}: give a family, or a serializer and a deserializer, not both")
    elif family not in _families:
        raise ConfigError(f"{path}: no serialization family {family!r} is registered; there are {sorted(_families)}")
    if isinstance(cls, str):
        _register_path(cls, family, subclasses)
    else:
        _register_type(cls, family, subclasses)
    user_types.add(path)


def _register_type(cls: type, family: str, subclasses: bool) -> None:
    _types[cls] = family
    if subclasses:
        _bases[cls] = family


def _register_path(path: str, family: str, subclasses: bool) -> None:
    module, colon, qualname = path.partition(":")
    if not (module and colon and qualname):
        raise ConfigError(f"{path!r} does not name a type: write 'module:Type'")
    _pending.setdefault(module.partition(".")[0], {})[path] = (family, subclasses)


def lookup_family_name(cls: type) -> str | None:
    """Name of the family that objects of the exact type `cls` are registered for."""
    name = _types.get(cls)
    if name is not None:
        return name
    if _pending:
        root = str(cls.__module__).partition(".")[0]
        if root in _pending:
            _settle(root)
            name = _types.get(cls)
            if name is not None:
                return name
    if _bases:
        for base in cls.__mro__[1:]:
            if base in _bases:
                return _bases[base]
    return None


def _settle(root: str) -> None:
    """Look up the pending types of package `root`: an object of that package exists, so its modules are imported."""
    waiting = _pending[root]
    for path, (family, subclasses) in list(waiting.items()):
        module, _, qualname = path.partition(":")
        found: Any = sys.modules.get(module)
        for attribute in qualname.split("."):
            found = getattr(found, attribute, None)
        if isinstance(found, type):
            if found not in _types:
                _register_type(found, family, subclasses)
            waiting.pop(path, None)
    if not waiting:
        _pending.pop(root, None)


def get_family(name: str) -> Family | None:
    """The family called `name`, imported if need be; None when nobody has registered it."""
    family = _families.get(name)
    if family is None:
        from importlib import metadata  # 25 ms, needed on the way to an error only

        for entry in metadata.entry_points(group=ENTRY_POINTS, name=name):
            family = entry.load()
            _families[name] = family
            break
    if isinstance(family, str):
        module, _, attribute = family.partition(":")
        loaded: Any = importlib.import_module(module)
        family = getattr(loaded, attribute) if attribute else loaded
        _families[name] = family
    return family


def get_family_to_write(name: str) -> Family:
    """As `get_family`; raises SerializationError when there is none, or its import fails."""
    try:
        family = get_family(name)
    except Exception as exc:
        raise SerializationError(f"the serialization family {name!r} cannot be loaded: {exc}") from exc
    if family is None:
        raise SerializationError(f"no serialization family {name!r} is registered; there are {sorted(_families)}")
    return family


def get_family_to_read(name: str) -> Family:
    """As `get_family`; raises DeserializationError, with what to do, when there is none, or its import fails."""
    try:
        family = get_family(name)
    except Exception as exc:
        raise DeserializationError(
            f"a payload is of the serialization family {name!r}, which cannot be loaded here: {exc}; "
            "install what it needs"
        ) from exc
    if family is None:
        where = name.partition(":")[0] if ":" in name else "the module that registers it"
        raise DeserializationError(
            f"a payload is of the serialization family {name!r}, which is not registered here: import {where} "
            "on this node (register_serialization, register_serialization_family), or install a package that has it"
        )
    return family


def write(name: str, family: Family, obj: Any) -> tuple[bytes, Sequence[Buffer]] | None:
    """Metadata and frames of `obj` by `family`, which is called `name`; None: it is left to pickle.

    Each frame is flat bytes, whatever buffer the family gave: from here on the length of a frame is its size. Raises
    SerializationError that names the type and the cause.
    """
    try:
        written = family.serialize(obj)
        if written is None:
            return None
        metadata, frames = written
        return metadata, tuple(_flat(frame) for frame in frames)
    except SerializationError:
        raise
    except Exception as exc:
        raise SerializationError(
            f"the family {name!r} cannot write an object of type {type(obj).__qualname__}: {type(exc).__name__}: {exc}"
        ) from exc


def _flat(frame: Any) -> Buffer:
    if type(frame) is bytes or type(frame) is bytearray:
        return frame
    view = memoryview(frame)
    if not view.c_contiguous:
        # Its bytes as they lie would be read in another order, a copy here would hide what large arrays cost.
        raise TypeError(
            f"a frame of type {type(frame).__qualname__} is not C-contiguous: numpy.ascontiguousarray makes it so"
        )
    return PickleBuffer(view).raw()  # unlike `cast`, for items of any format, and of none


def user_family_of(cls: type) -> Family | None:
    """The family that a third party registered for `cls`; None for those of host memory, whose objects pickle well."""
    name = lookup_family_name(cls)
    return None if name is None or (name in _BUILTIN and name != "cuda") else get_family_to_write(name)


_NUMPY_TYPES = (
    "ndarray memmap bool_ byte short intc int_ long longlong ubyte ushort uintc uint ulong ulonglong "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 half single double longdouble csingle cdouble clongdouble "
    "datetime64 timedelta64 str_ bytes_ void"
)

_pending["numpy"] = {f"numpy:{kind}": ("numpy", False) for kind in _NUMPY_TYPES.split()}
_pending["cupy"] = {"cupy:ndarray": ("cuda", False)}
_pending["numba"] = {"numba.cuda.cudadrv.devicearray:DeviceNDArray": ("cuda", False)}
_pending["torch"] = {"torch:Tensor": ("cuda", False)}
