"""Introductions: the authenticated part of a hello."""

from __future__ import annotations

from typing import TypeAlias

from zmqtasks.ids import Key
from zmqtasks.protocol.ops.base import Op


class ClientIntroduction(Op, frozen=True, tag=1):
    """A client, or a tool that asks questions, connects to a scheduler."""

    name: str
    pid: int
    host: str
    worker: bytes = b""
    """Instance id of the worker in whose process it lives, for that worker's tasks: it ends with that process."""


class WorkerIntroduction(Op, frozen=True, tag=2):
    """A worker connects to a scheduler."""

    name: str
    pid: int
    host: str
    data_address: str
    nthreads: int
    memory_limit_bytes: int
    """0: unlimited."""
    resources: dict[str, float]
    nanny: bytes = b""
    """Instance id of the nanny that watches this process; empty without one."""
    local_directory: str = ""
    held_keys: list[Key] = []
    """What it already holds (a new scheduler epoch), with `held_sizes`."""
    held_sizes: list[int] = []


class NannyIntroduction(Op, frozen=True, tag=3):
    """A nanny connects to a scheduler."""

    name: str
    pid: int
    host: str


class DataIntroduction(Op, frozen=True, tag=4):
    """A node connects to a worker to fetch or put data."""

    name: str
    codecs: list[str] = []
    """Of compression, that it can read; what the acceptor can read is in its welcome."""


Introduction: TypeAlias = ClientIntroduction | WorkerIntroduction | NannyIntroduction | DataIntroduction
