"""The directory of one worker: made with its first file, gone with the worker.

Its name follows from the worker's instance id, so a nanny can remove what a worker that was killed has left.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from zmqtasks.errors import NodeStartError


def base_directory(given: str | None) -> str:
    """`given`, or the system's directory for temporary files, which Python finds by writing to it.

    To be asked at the start, by a nanny for its workers as well: a process that is killed while it looks leaves a file.
    Raises NodeStartError when there is none.
    """
    try:
        return given or tempfile.gettempdir()
    except OSError as exc:
        raise NodeStartError(f"workers have no place for their files ({exc}): give a --local-directory") from exc


def directory_of(base: str, instance_id: bytes) -> Path:
    """Where the worker of that id has its files, below `base`."""
    return Path(base).absolute() / f"zmqtasks-worker-{instance_id.hex()}"


def remove_directory(base: str, instance_id: bytes) -> None:
    """Removes the directory and all that is in it, if it is there."""
    path = directory_of(base, instance_id)
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)


class WorkerDirectory:
    """The directory of a worker, for any thread."""

    def __init__(self, base: str | None, instance_id: bytes) -> None:
        self._base = base_directory(base)
        self._instance_id = instance_id
        self._lock = threading.Lock()
        self._removed = False

    def path(self) -> Path:
        """The directory, which exists from now on. Raises RuntimeError when the worker has ended."""
        path = directory_of(self._base, self._instance_id)
        with self._lock:
            if self._removed:
                raise RuntimeError(f"the worker has ended, and its directory {path} with it")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def remove(self) -> None:
        """Removes it for good."""
        with self._lock:
            self._removed = True
        remove_directory(self._base, self._instance_id)
