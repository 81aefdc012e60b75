"""The arguments of calls as bytes: futures become inputs, bulky objects data of their own, the rest an inline payload."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from zmqtasks.foreign import ForeignFutures
from zmqtasks.future import Future
from zmqtasks.ids import Key
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.nodes.client.state import FutureState
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.references import KeyRef, collect_references, per_thread, substitute
from zmqtasks.protocol.serialize import serialize, serialize_inline

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

SCALARS = frozenset((int, float, bool, type(None), complex, str, bytes))
"""Types that hold no future and that pickle writes by itself."""

_FUTURES = frozenset((Future,))
_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))
_SIZED = (str, bytes, bytearray)
_PROTOCOL = 5

_dumps = pickle.dumps


def encode_simple(args: Args, kwargs: Kwargs, limit_bytes: int, node: ClientNode) -> tuple[bytes, Sequence[Key]] | None:
    """As `CallEncoder.encode` for the commonest calls: only futures of the node, or only scalars; None for others."""
    if kwargs:
        return None
    if not args:
        return b"", ()
    kinds = set(map(type, args))
    if kinds == _FUTURES:
        keys: list[Key] = []
        for future in args:
            state = future._state
            if state.owner is not node:
                return None
            keys.append(state.key)
        return b"", keys
    if kinds <= SCALARS:
        data = _dumps((args, kwargs), _PROTOCOL)
        if len(data) <= limit_bytes:
            return data, ()
    return None


class CallEncoder:
    """Encodes the calls of one submission; an object that occurs in several of them is lifted out of them once.

    `keys` are those of the lifted objects: the caller declares them before the tasks are submitted (`take_lifted`).
    `references` are the keys of futures that were found inside other objects while pickling. Futures of other clusters are refused
    (ConfigError); those of other clients are looked after by `foreign`.
    """

    def __init__(self, node: ClientNode, new_key: Callable[[Payload], Key]) -> None:
        self.keys: list[Key] = []
        self.references: dict[Key, None] = {}
        self.foreign = ForeignFutures(node)
        self._node = node
        self._limit_bytes = node.config.implicit_data_bytes
        self._new_key = new_key
        self._lifted: dict[int, tuple[object, Key]] = {}
        self._undeclared: list[tuple[Key, Payload]] = []

    def encode(self, args: Args, kwargs: Kwargs) -> tuple[bytes, Sequence[Key]]:
        """The bytes of a call (empty: exactly the inputs) and its inputs."""
        return encode_simple(args, kwargs, self._limit_bytes, self._node) or self._encode(args, kwargs)

    def encode_columns(
        self, columns: Sequence[Sequence[Any]], kwargs: Kwargs
    ) -> tuple[list[bytes], list[Sequence[Key]]]:
        """As `encode`, for many calls, given by a column for each positional argument. No list of inputs: none has any."""
        kinds = [set(map(type, column)) for column in columns]
        if not kwargs and all(kind == _FUTURES for kind in kinds):
            keys = [self.foreign.keys([future._state for future in column]) for column in columns]
            return [], list(zip(*keys, strict=True))
        rows = zip(*columns, strict=True)
        if all(kind <= SCALARS for kind in kinds) and SCALARS.issuperset(map(type, kwargs.values())):
            data = [_dumps((row, kwargs), _PROTOCOL) for row in rows]
            if max(map(len, data), default=0) <= self._limit_bytes:
                return data, []
            rows = zip(*columns, strict=True)
        encoded = [self._encode(row, kwargs) for row in rows]
        return [data for data, _ in encoded], [inputs for _, inputs in encoded]

    def lift(self, obj: object, payload: Payload) -> Key:
        """The key under which `obj` goes to workers as data."""
        key = self._new_key(payload)
        self._lifted[id(obj)] = (obj, key)
        self.keys.append(key)
        self._undeclared.append((key, payload))
        return key

    def take_lifted(self) -> tuple[list[Key], list[Payload]]:
        """Keys and payloads of what was lifted since the last call."""
        taken, self._undeclared = self._undeclared, []
        return [key for key, _ in taken], [payload for _, payload in taken]

    def _encode(self, args: Args, kwargs: Kwargs) -> tuple[bytes, list[Key]]:
        inputs: dict[Key, int] = {}

        def register(future: Future[Any]) -> KeyRef:
            return KeyRef(inputs.setdefault(self.foreign.key(future._state), len(inputs)))

        call = substitute((args, kwargs), Future, register)
        if not self._lifted and not any(map(self.is_bulky, args)) and not any(map(self.is_bulky, kwargs.values())):
            data = self._dump(call)
            if len(data) <= self._limit_bytes:
                return data, list(inputs)
        return self._dump(self._lift_from(call, inputs)), list(inputs)

    def encode_placed(self, call: object) -> bytes:
        """The bytes of a call in which `KeyRef`s stand already, whatever their length."""
        return self._dump(call)

    def lift_bulky(self, obj: object) -> Key | None:
        """The key under which `obj` goes to workers as data; None when it is small enough to stay where it is."""
        known = self._lifted.get(id(obj))
        if known is not None:
            return known[1]
        if type(obj) in SCALARS and not self.is_bulky(obj):
            return None
        payload = self._serialize(obj)
        return None if payload.nbytes <= self._limit_bytes else self.lift(obj, payload)

    @property
    def limit_bytes(self) -> int:
        """What is longer is bulky."""
        return self._limit_bytes

    def _dump(self, call: object) -> bytes:
        # As `collect_references`, without the cost of a generator.
        notes: list[FutureState] = []
        outer = per_thread.notes
        per_thread.notes = notes
        try:
            data = serialize_inline(call)
        finally:
            per_thread.notes = outer
        if notes:
            self.references.update(dict.fromkeys(self.foreign.keys(notes)))
        return data

    def is_bulky(self, obj: object) -> bool:
        """Whether `obj` says of itself that it is longer than the limit."""
        try:
            size = len(obj) if isinstance(obj, _SIZED) else getattr(obj, "nbytes", 0)
        except Exception:  # a property of a user's class
            return False
        return isinstance(size, int) and size > self._limit_bytes

    def _lift_from(self, obj: Any, inputs: dict[Key, int], depth: int = 0) -> Any:
        """`obj` with references in the place of what is bulky: whole containers, or items where a container holds inputs."""
        kind = type(obj)
        if kind is KeyRef or (kind in SCALARS and not self.is_bulky(obj)):
            return obj
        known = self._lifted.get(id(obj))
        if known is None:
            if depth < 2 or (kind in _CONTAINERS and _holds_input(obj)):
                return self._lift_items(obj, inputs, depth + 1)
            payload = self._serialize(obj)
            if payload.nbytes <= self._limit_bytes:
                return obj
            key = self.lift(obj, payload)
        else:
            key = known[1]
        return KeyRef(inputs.setdefault(key, len(inputs)))

    def _lift_items(self, obj: Any, inputs: dict[Key, int], depth: int) -> Any:
        if type(obj) is dict:
            return {name: self._lift_from(item, inputs, depth) for name, item in obj.items()}
        return type(obj)([self._lift_from(item, inputs, depth) for item in obj])

    def _serialize(self, obj: object) -> Payload:
        with collect_references() as notes:
            payload = serialize(obj)
        self.references.update(dict.fromkeys(self.foreign.keys(notes)))
        if payload.nbytes <= self._limit_bytes:
            return payload
        # It is sent later, perhaps more than once: what the user writes into the object meanwhile must not show.
        frames = [frame if memoryview(frame).readonly else bytes(frame) for frame in payload.frames]
        return Payload(payload.header, frames)


def _holds_input(obj: object) -> bool:
    found: list[KeyRef] = []

    def note(reference: KeyRef) -> KeyRef:
        found.append(reference)
        return reference

    substitute(obj, KeyRef, note)
    return bool(found)


def to_columns(iterables: Iterable[Iterable[Any]]) -> list[Sequence[Any]]:
    """The iterables as sequences of the length of the shortest one."""
    given = list(iterables)
    if all(isinstance(column, (list, tuple, range)) for column in given):
        columns: list[Sequence[Any]] = given  # type: ignore[assignment]
        count = min(map(len, columns))
        return [column if len(column) == count else column[:count] for column in columns]
    rows = list(zip(*given, strict=False))  # some may be endless
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in given]
