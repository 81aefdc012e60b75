"""Settings: one frozen object with the defaults, each changeable by an environment variable.

`ZMQTASKS_GRACE_S=5` sets `grace_s`; a value that cannot be read is a `ConfigError` that names variable and value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from zmqtasks.errors import ConfigError

PREFIX = "ZMQTASKS_"

ENCRYPTION_MODES = ("auto", "on", "off")
COMPRESSION_MODES = ("auto", "lz4", "zstd", "off")
_CHOICES = {"encryption": ENCRYPTION_MODES, "compression": COMPRESSION_MODES}


@dataclass(frozen=True, slots=True)
class Config:
    """All settings that more than one place reads; units are in the names."""

    connect_timeout_s: float = 10.0
    handshake_timeout_s: float = 10.0
    heartbeat_s: float = 15.0
    """A silently cut link is noticed within about this time; stopped processes are left alone for as long."""
    grace_s: float = 30.0
    """How long a node whose control link broke may take to come back before it counts as lost; and how long nothing may pass
    on a data link on which values are asked for, before another holder is asked."""
    replay_bytes: int = 256 << 20
    """Unacknowledged control messages a channel keeps for a resumption; past it the channel is full and sends wait."""
    inline_result_bytes: int = 4 << 10
    """Results up to this size travel with the notice that the task has finished."""
    implicit_data_bytes: int = 64 << 10
    """Arguments and functions above this size become data of their own and go straight to workers."""
    shared_value_bytes: int = 64 << 10
    """Values of variables, queues and datasets above this size are refused: they are to be scattered. Besides, 1 KiB for each
    future inside."""
    submit_batch: int = 2_000
    """Tasks per submit op: bounds the time that one op holds the scheduler."""
    client_backlog_bytes: int = 64 << 20
    """Submitting waits while more than this is queued towards the scheduler."""
    spin_s: float = 0.0006
    """How long a scheduler looks for the next message before it sleeps, where they come that soon one upon the other, and a worker
    is idle."""
    prefetch_s: float = 0.005
    """Estimated work that a worker is given beyond what it runs."""
    allowed_failures: int = 3
    """A task that was executing on more than this many workers that died is not tried again."""
    fetch_bytes: int = 256 << 20
    """Inputs that one worker fetches from peers at the same time."""
    data_links: int = 128
    """Open data links of a node; the least recently used one closes first."""
    idle_buffer_bytes: int = 2 << 30
    """Memory for received values that a process keeps for the next ones, warm, for some seconds; an eighth of its memory limit at
    most, and of the host's memory where it has none."""
    shared_memory: bool = True
    """Whether data passes through shared memory between processes of one host and user, where the system has it."""
    shared_memory_bytes: int = 0
    """Most memory that a process lends to others of its host at the same time; past it data goes through sockets. 0: a
    quarter of a worker's memory limit, or of the machine's memory (its control group's, where that has less)."""
    metrics_interval_s: float = 1.0
    """How often workers report memory and what they have been running for a while."""
    termination_s: float = 5.0
    """Between asking a process to end and killing it."""
    allow_other_python: bool = True
    """Whether nodes with another Python minor version may join (a warning is given in any case)."""
    encryption: str = "auto"
    """Which links are encrypted: those that leave the host (auto), all over IP (on), none (off); see `security`."""
    compression: str = "auto"
    """Of bulk data: lz4 where the link is slower than compressing (auto), a codec on every link between processes, off."""


def load_config(environ: Mapping[str, str] | None = None) -> Config:
    """The defaults, changed by the `ZMQTASKS_*` variables of `environ` (default: the process's)."""
    env = os.environ if environ is None else environ
    changes: dict[str, object] = {}
    for field in fields(Config):
        name = PREFIX + field.name.upper()
        if (text := env.get(name)) is not None:
            changes[field.name] = _parse(name, text, getattr(Config(), field.name), _CHOICES.get(field.name))
    return replace(Config(), **changes)  # type: ignore[arg-type]


def _parse(name: str, text: str, default: object, choices: tuple[str, ...] | None = None) -> object:
    if choices is not None and text not in choices:
        raise ConfigError(f"{name}={text!r} is none of {', '.join(choices)}")
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        value = type(default)(text)  # type: ignore[call-arg]
    except (ValueError, KeyError):
        raise ConfigError(f"{name}={text!r} is not a {type(default).__name__}") from None
    if isinstance(value, int | float) and value < 0:
        raise ConfigError(f"{name}={text!r} must not be negative")
    return value
