"""Plugins and uploaded files: from clients by the scheduler to workers."""

from __future__ import annotations

from zmqtasks.protocol.ops.base import Op


class RegisterPlugin(Op, frozen=True, tag=34):
    """A plugin, or a file, that every worker sets up: those of now, and later ones before their first task.

    Answered as `RunFunction`. When one of the workers of now fails, the registration is taken back on all, and what had that name
    before is set up again.
    """

    request: int
    name: str
    content: bytes
    """Inline payload: of the plugin; of (bytes, whether to import it) for a file."""
    is_file: bool = False
    idempotent: bool = False
    """Nothing is done when there is a plugin of that name already."""


class UnregisterPlugin(Op, frozen=True, tag=35):
    """Workers tear a plugin down; answered as `RunFunction`."""

    request: int
    name: str


class PlaceFile(Op, frozen=True, tag=69):
    """A file that a `SetUpPlugin` without content refers to by its name: a worker that joins gets all files first."""

    name: str
    content: bytes
    """Inline payload of (bytes, whether to import it)."""


class SetUpPlugin(Op, frozen=True, tag=70):
    """A plugin to set up, in place of an older one of that name; answered by `CallFinished`, unless `call` is 0."""

    call: int
    name: str
    content: bytes = b""
    """Inline payload of the plugin; empty: the file of that name is to be imported."""
    required: bool = False
    """The worker has just joined, and ends when this fails."""


class TearDownPlugin(Op, frozen=True, tag=71):
    """A plugin to tear down; answered by `CallFinished`, unless `call` is 0."""

    call: int
    name: str
