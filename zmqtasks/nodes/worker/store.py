"""Values that a worker holds: live objects where a task made them, unopened payloads where they came from elsewhere.

The store belongs to the node's loop. Entries are handed to task threads, which open them: a payload is turned into an
object by the first task that needs it, never on the loop, and once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from zmqtasks.errors import SerializationError
from zmqtasks.ids import Key, format_key
from zmqtasks.protocol.frames import KIB
from zmqtasks.protocol.payload import PICKLE_HEADER, Payload, unpack_inline
from zmqtasks.protocol.serialize import deserialize, deserialize_inline, serialize

UNOPENED: Any = object()
"""In place of a value that is there as bytes."""

LASTING_BYTES = 512 * KIB
"""Payloads from this size on are the same objects for every peer, where that takes no memory: see `Comm.send_lasting`."""
DETACHED_BYTES = 256 * KIB
"""Results up to this size do not keep frames that are larger by more than this: a copy takes 20 us."""
_PICKLED_SHARE = 64
"""Of such a payload at most this part is a copy of something."""


class Entry:
    """One value: open it with `get`, read it for a peer with `payload`."""

    __slots__ = ("_lasting", "_lock", "_payload", "data", "is_input", "size", "value")

    def __init__(
        self,
        value: Any,
        size: int,
        data: bytes | None = None,
        payload: Payload | None = None,
        is_input: bool = False,
    ) -> None:
        self.value = value
        self.size = size
        self.data = data
        """The value as an inline payload, kept where it is small."""
        self._payload = payload
        self._lasting: Payload | None = None
        self.is_input = is_input
        """It came with tasks, and goes with the last of them."""
        # Small values need no lock: when two threads open one, one of the objects is forgotten.
        self._lock = threading.Lock() if payload is not None else None

    def get(self) -> Any:
        """The live object; raises DeserializationError when it cannot be opened. For any thread."""
        if self.value is UNOPENED:
            if self.data is None:
                return self._open()
            value = deserialize_inline(self.data)
            if _is_fresh(value):
                return value
            self.value = value
        return self.value

    def _open(self) -> Any:
        assert self._lock is not None
        with self._lock:
            if self._payload is not None:
                value = deserialize(self._payload)
                if _is_fresh(value):
                    return value
                self.value = value
                # Arrays live on in its frames; a pickle would be held twice.
                if self._payload.header != PICKLE_HEADER and _is_memory_of(self.value, self._payload):
                    self._lasting = self._payload
                self._payload = None
            return self.value

    def payload(self) -> Payload:
        """The value for a peer; raises SerializationError when it cannot be pickled."""
        if self.data is not None:
            return unpack_inline(self.data)
        # Read once: a task thread may open the entry, which drops the payload.
        payload = self._payload or self._lasting
        if payload is None:
            payload = serialize(self.value)
            if _is_memory_of(self.value, payload):
                self._lasting = payload
        return payload


def _is_fresh(value: Any) -> bool:
    """Whether each use opens it anew: what stands for an actor holds a future of its key, and so would never let go of it."""
    return getattr(type(value), "__zmqtasks_fresh__", False) is True


def _is_memory_of(value: Any, payload: Payload) -> bool:
    """Whether a large payload is, but for a small part, the memory of the value itself, and so costs nothing to keep."""
    size = payload.nbytes
    if size < LASTING_BYTES:
        return False
    if payload.header == PICKLE_HEADER:
        return (
            sum(len(frame) for frame in payload.frames if not isinstance(frame, memoryview)) <= size // _PICKLED_SHARE
        )
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and bool(value.flags.forc)


def _detached(value: Any) -> Any:
    """A small array that is a view of a much larger received frame, as a copy: it would keep all of the frame."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray or value.base is None or value.nbytes > DETACHED_BYTES:
        return value
    base = value.base
    while type(base) is numpy.ndarray and base.base is not None:
        base = base.base
    if type(base) is numpy.ndarray:
        return value  # of memory that was made here
    try:
        size = memoryview(base).nbytes
    except TypeError:  # not a frame
        return value
    return value.copy("K") if size > 2 * value.nbytes + DETACHED_BYTES else value


class Store:
    """Entries by key, and the bytes that they take together."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.stored_bytes = 0

    def __len__(self) -> int:
        return len(self.entries)

    def put_value(self, key: Key, value: Any, size: int, data: bytes | None = None) -> None:
        """Keeps the result of a task; `data` is its inline payload when there is one."""
        self._put(key, Entry(_detached(value), size, data))

    def put_inputs(self, keys: Iterable[Key], values: Iterable[bytes]) -> None:
        """Keeps inline payloads unopened, until `drop_inputs`."""
        for key, data in zip(keys, values, strict=True):
            self._put(key, Entry(UNOPENED, len(data), data, None, True))

    def put_payload(self, key: Key, payload: Payload) -> None:
        """Keeps a payload unopened; its frames belong to the store from now on."""
        self._put(key, Entry(UNOPENED, payload.nbytes, None, payload))

    def _put(self, key: Key, entry: Entry) -> None:
        if (old := self.entries.get(key)) is not None:
            self.stored_bytes -= old.size
        self.entries[key] = entry
        self.stored_bytes += entry.size

    def drop(self, keys: Iterable[Key]) -> None:
        """Forgets values; unknown keys are passed over. Tasks that have an entry in hand keep it."""
        for key in keys:
            if (entry := self.entries.pop(key, None)) is not None:
                self.stored_bytes -= entry.size

    def drop_inputs(self, keys: Iterable[Key]) -> None:
        """Forgets those values that still are what `put_inputs` kept."""
        for key in keys:
            if (entry := self.entries.get(key)) is not None and entry.is_input:
                del self.entries[key]
                self.stored_bytes -= entry.size

    def read(self, key: Key) -> Payload | str | None:
        """The value for a peer, None when it is not here, or why it cannot be sent."""
        if (entry := self.entries.get(key)) is None:
            return None
        try:
            return entry.payload()
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # code of users pickles it: a SystemExit must neither end the worker nor be lost
            reason = str(exc) if isinstance(exc, SerializationError) else f"{type(exc).__name__}: {exc}"
            kind = type(entry.value).__qualname__
            return f"the result of {format_key(key)}, a {kind}, cannot leave its worker: {reason}"
