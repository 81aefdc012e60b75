"""The cluster key: who holds it belongs to the cluster, and can run code on it.

One key of 32 random bytes authenticates both sides of every connection (see `protocol.handshake`). It lives in a file
that only its owner can read; a scheduler makes the file, everybody else loads it or waits for it. Links inside one
process need no key. A `Security` is handed to everything that listens or connects: it says with what links authenticate,
and which of them are encrypted.
"""

from __future__ import annotations

import hmac
import os
import secrets
import shlex
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from zmqtasks.config import ENCRYPTION_MODES
from zmqtasks.errors import ConfigError, SecurityError
from zmqtasks.transports.base import PLAIN, Encryption
from zmqtasks.transports.derive import derive_key

__all__ = [
    "KEY_FILE_VARIABLE",
    "ClusterKey",
    "Security",
    "create_key",
    "default_key_path",
    "expand_user",
    "find_key",
    "load_key",
    "new_key",
    "wait_for_key",
]

KEY_BYTES = 32
CLUSTER_ID_BYTES = 16
KEY_FILE_VARIABLE = "ZMQTASKS_KEY_FILE"

_CLUSTER_ID_LABEL = b"zmqtasks cluster id v1"
_LINK_KEY_LABEL = b"zmqtasks link authentication v1"
_ENCRYPTION_LABEL = b"zmqtasks link encryption v1"
_POLL_S = 0.05
_FILE_LIMIT_BYTES = 4096
_USE_ANOTHER = f"use another file (--key-file of nodes, or {KEY_FILE_VARIABLE})"


class ClusterKey:
    """The secret of a cluster; printing it shows the cluster id only."""

    __slots__ = ("_raw", "cluster_id", "encryption_secret", "link_key")

    def __init__(self, raw: bytes) -> None:
        """Takes 32 secret bytes; raises SecurityError for any other length, or all zeros."""
        if len(raw) != KEY_BYTES:
            raise SecurityError(f"a cluster key has {KEY_BYTES} bytes, got {len(raw)}")
        if not any(raw):
            raise SecurityError("a cluster key of zeros is no secret: make one with ClusterKey.generate()")
        self._raw = bytes(raw)
        self.cluster_id = derive_key(self._raw, _CLUSTER_ID_LABEL)[:CLUSTER_ID_BYTES]
        """Names the cluster on the wire; tells nothing about the key."""
        self.link_key = derive_key(self._raw, _LINK_KEY_LABEL)
        """Authenticates connections: every use of the key has a key of its own."""
        self.encryption_secret = derive_key(self._raw, _ENCRYPTION_LABEL)
        """What transports that encrypt make their keys of."""

    @classmethod
    def generate(cls) -> ClusterKey:
        """A new random key."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_hex(cls, text: str) -> ClusterKey:
        """A key from 64 hexadecimal digits; raises SecurityError, which never shows the text."""
        try:
            raw = bytes.fromhex(text.strip())
        except ValueError:
            raise SecurityError(f"a cluster key is written as {2 * KEY_BYTES} hexadecimal digits") from None
        return cls(raw)

    def hex(self) -> str:
        """The secret itself, for a key file or a pipe to a child process: never for a log or a command line."""
        return self._raw.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterKey) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash(self.cluster_id)

    def __repr__(self) -> str:
        return f"<ClusterKey of cluster {self.cluster_id.hex()}>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a cluster key is not pickled: pass key.hex() over a pipe")


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """What one side of a connection authenticates with."""

    cluster_id: bytes
    link_key: bytes

    def __repr__(self) -> str:
        return f"<LinkIdentity of cluster {self.cluster_id.hex()}>"


_IN_PROCESS = LinkIdentity(bytes(CLUSTER_ID_BYTES), bytes(KEY_BYTES))
"""For links that never leave the process: they keep the hello, and have no secret."""


@dataclass(frozen=True, slots=True)
class Security:
    """How a node protects its links; given to everything that listens or connects."""

    key: ClusterKey | None
    encryption: str | None = None
    """Which links are encrypted; the same on all nodes of a cluster.

    - "auto": those that can leave the host;
    - "on": those too that go over IP and stay on the host;
    - "off": none: who can reach the network is trusted;
    - None: as `Config.encryption` says, which is "auto" unless `ZMQTASKS_ENCRYPTION` has another.
    """

    def __post_init__(self) -> None:
        if self.encryption is not None:
            _check_mode(self.encryption)

    @classmethod
    def default(cls, create: bool = False) -> Security:
        """The key in `default_key_path()`; with `create` (for schedulers) it is made when there is none."""
        path = default_key_path()
        return cls(create_key(path) if create else load_key(path))

    @classmethod
    def none(cls) -> Security:
        """No key: for links inside one process only, everything else is refused."""
        return cls(None)

    @property
    def cluster_id(self) -> bytes:
        """Names the cluster; zeros without a key."""
        return self.key.cluster_id if self.key is not None else _IN_PROCESS.cluster_id

    def encryption_mode(self, default: str) -> str:
        """One of `ENCRYPTION_MODES`: this one's, or `default` (that of the configuration)."""
        return self.encryption or _check_mode(default)

    def link_encryption(self, default: str) -> Encryption:
        """What transports encrypt with, if they do; `default` as in `encryption_mode`."""
        mode = self.encryption_mode(default)
        if self.key is None or mode == "off":
            return PLAIN
        return Encryption(self.key.encryption_secret, same_host=mode == "on")

    def link_identity(self, address: str, crosses_processes: bool) -> LinkIdentity:
        """What links at `address` authenticate with; raises SecurityError when a key is needed and there is none."""
        if not crosses_processes:
            return _IN_PROCESS
        if self.key is None:
            raise SecurityError(
                f"{address} can be reached from other processes, and there is no cluster key: "
                f"use Security.default(), or Security(ClusterKey.generate()), in place of Security.none()"
            )
        return LinkIdentity(self.key.cluster_id, self.key.link_key)


def _check_mode(mode: str) -> str:
    if mode not in ENCRYPTION_MODES:
        raise ConfigError(f"encryption={mode!r} is none of {', '.join(ENCRYPTION_MODES)}")
    return mode


def default_key_path() -> Path:
    """Where the cluster key of this user lives: `$ZMQTASKS_KEY_FILE`, else below the user's configuration folder."""
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return expand_user(named)
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification: relative paths in the variable are to be ignored.
    folder = configured if os.path.isabs(configured) else "~/.config"
    return expand_user(Path(folder) / "zmqtasks" / "cluster.key")


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path of a key file or scheduler file, with ~ and ~user in its place; SecurityError for an unknown home."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise SecurityError(
            f"{path} cannot be found: nothing tells where the home directory {path.parts[0]} is; "
            f"name the file by its full path (--key-file, --scheduler-file or {KEY_FILE_VARIABLE})"
        ) from exc


def find_key(path: str | os.PathLike[str]) -> ClusterKey | None:
    """Like `load_key`, but None where there is no file (yet)."""
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe in its place would block
        try:
            _check_protected(path, os.fstat(descriptor))
            content = os.read(descriptor, _FILE_LIMIT_BYTES)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SecurityError(f"the cluster key {path} cannot be read: {exc.strerror or exc}; {_USE_ANOTHER}") from exc
    try:
        return ClusterKey.from_hex(content.decode("ascii"))
    except (SecurityError, UnicodeDecodeError):
        raise SecurityError(
            f"{path} holds no cluster key ({2 * KEY_BYTES} hexadecimal digits): "
            f"delete it to have the scheduler make a new one"
        ) from None


def load_key(path: str | os.PathLike[str]) -> ClusterKey:
    """The key in a file.

    Raises SecurityError when the file is missing, is no key, or can be read or written by anybody but its owner (the
    message has the chmod to run).
    """
    path = Path(path)
    key = find_key(path)
    if key is None:
        _check_link(path)
        raise SecurityError(
            f"no cluster key at {path}: a scheduler makes one when it starts; "
            f"copy it here (mode 0600), or set {KEY_FILE_VARIABLE}"
        )
    return key


def _check_link(path: Path) -> None:
    """Says so when what is missing is what a link names: no key is ever made in place of a link."""
    if path.is_symlink():
        raise SecurityError(
            f"the cluster key {path} is a link to {os.path.realpath(path)}, where no file is: "
            f"remove the link, or make a key there"
        )


def create_key(path: str | os.PathLike[str]) -> ClusterKey:
    """The key in a file, which is made (with its folder) when it does not exist.

    Of several processes that do this at the same time all get the same key; no reader ever sees half a file.
    """
    path = Path(path)
    key = find_key(path)
    if key is None:
        _make_file(path, ClusterKey.generate())
        key = load_key(path)  # that of another process, if it was quicker
    return key


def new_key(path: str | os.PathLike[str]) -> ClusterKey:
    """A new key, in a new file; raises SecurityError when there is a file already: no key is ever overwritten."""
    path = Path(path)
    key = ClusterKey.generate()
    if not _make_file(path, key):
        load_key(path)  # it has better words for what is no key
        raise SecurityError(
            f"{path} exists, and nodes may use the key in it: name another file, or move that one away and restart them"
        )
    return key


def _make_file(path: Path, key: ClusterKey) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _publish(path, key)
    except OSError as exc:
        raise SecurityError(f"the cluster key {path} cannot be written: {exc.strerror or exc}; {_USE_ANOTHER}") from exc


def wait_for_key(path: str | os.PathLike[str], timeout_s: float) -> ClusterKey:
    """The key in a file that a scheduler is about to make; SecurityError when it is not there in time."""
    path = Path(path)
    deadline = time.monotonic() + timeout_s
    while (key := find_key(path)) is None:
        if time.monotonic() >= deadline:
            _check_link(path)
            raise SecurityError(
                f"no cluster key appeared at {path} within {timeout_s:g} s: is the scheduler running, "
                f"and is this the path it uses ({KEY_FILE_VARIABLE})?"
            )
        time.sleep(_POLL_S)
    return key


def _publish(path: Path, key: ClusterKey) -> bool:
    """Writes the key under a temporary name and links it into place; False: something was there already."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # O_EXCL, mode 0600
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(key.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, never replaces a key that others may have loaded
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links: what is left is rename, checked as well as can be.
            if os.path.lexists(path):
                return False
            os.rename(temporary, path)
        return True
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _check_protected(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecurityError(f"the cluster key {path} is not a regular file: {_USE_ANOTHER}")
    if os.name != "posix":
        return
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise SecurityError(
            f"the cluster key {path} is open to others (mode {mode:04o}): run  chmod 600 {shlex.quote(str(path))}"
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise SecurityError(
            f"the cluster key {path} belongs to user {status.st_uid}, not to you: use a copy of your own"
        )
