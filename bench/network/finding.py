"""One thing that the figures of a matrix say."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, kw_only=True):
    """One thing that was found."""

    kind: str
    """"host", "worker", "link", "groups", "asymmetry", "failed" or "note"."""
    names: list[str]
    """The host, the worker, or source and target of the link."""
    metric: str = ""
    """"bandwidth" or "latency"."""
    direction: str = ""
    """"sending", "receiving" or "both", of hosts and workers."""
    factor: float = 0.0
    """How many times slower."""
    pair: tuple[int, int] | None = None
    """Of a link: the indices of source and target."""
    text: str
    groups: list[list[str]] = []
    """Hosts that reach each other faster than those of another group."""
