"""The scheduler file: what a node or client needs to join a cluster, in one file for shared file systems.

It has the addresses and the cluster key, so it is as secret as the key: mode 0600, written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zmqtasks.errors import ConfigError, SecurityError
from zmqtasks.security import ClusterKey, expand_user

__all__ = [
    "SchedulerFile",
    "find_scheduler_file",
    "read_scheduler_file",
    "remove_scheduler_file",
    "wait_scheduler_file",
    "write_scheduler_file",
]

POLL_S = 0.05
_USE_ANOTHER = "use another file (--scheduler-file)"


@dataclass(frozen=True)
class SchedulerFile:
    """The content of a scheduler file."""

    address: str
    addresses: list[str] = field(default_factory=list)
    cluster_id: str = ""
    """Hexadecimal."""
    key: str = field(default="", repr=False)
    """The cluster key, hexadecimal; empty for a cluster without one."""
    epoch: int = 0
    pid: int = 0
    encryption: str = ""
    """Which links of the cluster are encrypted: `Security.encryption`; empty: not said."""


def write_scheduler_file(path: str | os.PathLike[str], content: SchedulerFile) -> None:
    """Writes the file with mode 0600; readers see the old content or the new, never a part.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    target = expand_user(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(asdict(content), stream, indent=2)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise ConfigError(
            f"the scheduler file {str(target)!r} cannot be written: {exc.strerror or exc}; {_USE_ANOTHER}"
        ) from exc


def read_scheduler_file(path: str | os.PathLike[str]) -> SchedulerFile:
    """What the file says.

    Raises:
        ConfigError: there is no such file, or it is no scheduler file.
        SecurityError: others than its owner may read it, or the key in it is none.
    """
    content = find_scheduler_file(path)
    if content is None:
        target = expand_user(path)
        raise ConfigError(
            f"there is no scheduler file {str(target)!r}: "
            f"start a scheduler with --scheduler-file {shlex.quote(str(target))}"
        )
    return content


def find_scheduler_file(path: str | os.PathLike[str]) -> SchedulerFile | None:
    """Like `read_scheduler_file`, but None where there is no file (yet)."""
    target = expand_user(path)
    try:
        with target.open(encoding="utf-8") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise SecurityError(
                    f"the scheduler file {str(target)!r} is secret and is open to others ({mode:04o}): "
                    f"chmod 600 {shlex.quote(str(target))}"
                )
            content = json.load(stream)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(
            f"the scheduler file {str(target)!r} cannot be read: {exc.strerror or exc}; {_USE_ANOTHER}"
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"{str(target)!r} is not a scheduler file: {exc}") from exc
    return _parse(target, content)


def wait_scheduler_file(path: str | os.PathLike[str], timeout_s: float) -> SchedulerFile:
    """Like `read_scheduler_file`, but gives the scheduler `timeout_s` to write the file."""
    deadline = time.monotonic() + timeout_s
    while (content := find_scheduler_file(path)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return content or read_scheduler_file(path)


def remove_scheduler_file(path: str | os.PathLike[str], *, pid: int) -> None:
    """Removes the file if process `pid` wrote it: a scheduler that was started since keeps its own."""
    try:
        if read_scheduler_file(path).pid == pid:
            expand_user(path).unlink()
    except (ConfigError, SecurityError, OSError):
        pass


def _parse(path: Path, content: Any) -> SchedulerFile:
    types = {
        "address": str,
        "addresses": list,
        "cluster_id": str,
        "key": str,
        "epoch": int,
        "pid": int,
        "encryption": str,
    }
    if not isinstance(content, dict) or "address" not in content:
        raise ConfigError(f"{str(path)!r} is not a scheduler file: it has no address")
    known = {name: value for name, value in content.items() if name in types}
    for name, value in known.items():
        if not isinstance(value, types[name]):
            raise ConfigError(f"{str(path)!r} is not a scheduler file: {name} is {value!r}")
    found = SchedulerFile(**known)
    if found.key:
        try:
            ClusterKey.from_hex(found.key)
        except SecurityError as exc:
            raise SecurityError(
                f"the scheduler file {str(path)!r} was changed since it was written: {exc}; "
                f"copy it again, or start the scheduler anew"
            ) from exc
    return found
