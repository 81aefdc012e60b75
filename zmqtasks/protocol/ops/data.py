"""On data links: from anyone to a worker, and its answers."""

from __future__ import annotations

from zmqtasks.ids import Key
from zmqtasks.protocol.ops.base import Op


class GetData(Op, frozen=True, tag=120):
    """Asks a worker for values of keys; answered by `DataSent`."""

    request: int
    keys: list[Key]
    seen_rate: int = 0
    """Bytes/s that answers on this link have come with: it is at least that fast."""


class DataSent(Op, frozen=True, tag=121):
    """Values: a payload header and a number of frames for each key; frames follow in order."""

    request: int
    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    missing: list[Key] = []
    """Keys that the worker does not hold."""
    failed: list[Key] = []
    """Keys whose values could not be serialized, with the reasons in `reasons`."""
    reasons: list[str] = []
    codecs: list[str] = []
    """Of each frame, empty for one that is as it was; an empty column: all are."""
    raw_sizes: list[int] = []
    """Bytes of each frame before compression, with `codecs`; 0 where it is as it was."""


class PutData(Op, frozen=True, tag=122):
    """Gives values to a worker; answered by `DataPut`."""

    request: int
    keys: list[Key]
    headers: list[bytes]
    frame_counts: list[int]
    codecs: list[str] = []
    """Of each frame, empty for one that is as it was; an empty column: all are."""
    raw_sizes: list[int] = []
    """Bytes of each frame before compression, with `codecs`; 0 where it is as it was."""


class DataPut(Op, frozen=True, tag=123):
    """The worker holds the values of a `PutData`."""

    request: int
    error: str = ""


class DropRequest(Op, frozen=True, tag=124):
    """Nobody waits for the rest of the answers to a `GetData` any more: none need come. Unknown requests are passed over."""

    request: int
