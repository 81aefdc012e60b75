"""Identities: keys of tasks and data, nodes, sessions, attempts.

A *key* names a task or a piece of data in a cluster. Anonymous ones are 64-bit integers, a 24-bit client number (given by the
scheduler) and a 40-bit counter; named ones are strings. An *instance* is one run of one node process, a *session* one control
link with all its reconnections, a *run id* one attempt at a task.
"""

from __future__ import annotations

import os
from typing import NewType, TypeAlias

Key: TypeAlias = int | str

InstanceId = NewType("InstanceId", bytes)
SessionId = NewType("SessionId", bytes)

ID_BYTES = 16
COUNTER_BITS = 40
CLIENT_NUMBER_LIMIT = 1 << 24
RUN_EPOCH_MASK = (1 << 23) - 1  # run ids stay below 2**63


def new_instance_id() -> InstanceId:
    """A random id for one run of a node process."""
    return InstanceId(os.urandom(ID_BYTES))


def new_session_id() -> SessionId:
    """A random id for one control link."""
    return SessionId(os.urandom(ID_BYTES))


def first_key_of_client(client_number: int) -> int:
    """The anonymous key with counter 0 of a client."""
    return client_number << COUNTER_BITS


def client_number_of(key: Key) -> int | None:
    """The number of the client that made an anonymous key; None for a named one."""
    return key >> COUNTER_BITS if isinstance(key, int) else None


def first_run_id(epoch: int) -> int:
    """The run id with counter 0 in a scheduler epoch: attempts of different epochs never meet."""
    return (epoch & RUN_EPOCH_MASK) << COUNTER_BITS


def format_key(key: Key, name: str = "") -> str:
    """The key as people see it: `inc-42` for an anonymous key of a task called `inc`, a string key as it is."""
    if isinstance(key, str):
        return key
    counter = key & ((1 << COUNTER_BITS) - 1)
    return f"{name or 'task'}-{key >> COUNTER_BITS}.{counter}"


def parse_instance_id(text: str) -> InstanceId:
    """An instance id from its hexadecimal form; ValueError when it is none."""
    raw = bytes.fromhex(text)
    if len(raw) != ID_BYTES:
        raise ValueError(f"an instance id has {2 * ID_BYTES} hexadecimal digits, got {text!r}")
    return InstanceId(raw)
