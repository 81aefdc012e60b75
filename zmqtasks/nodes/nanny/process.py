"""A worker process, seen from its nanny: started, watched, ended; `nodes.worker.process` is the other side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zmqtasks.errors import NodeStartError
from zmqtasks.ids import InstanceId, new_instance_id
from zmqtasks.nodes.nanny.memory import format_bytes, out_of_memory_kills
from zmqtasks.nodes.worker.slots import MAX_EXTRA_THREADS
from zmqtasks.transports import non_temporal

_KEPT_STDERR = 8 << 10
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerProcess:
    """One worker process, from its start to its end; belongs to the loop that makes it.

    `on_ready` is called once when its node is up, `on_exit` once when the process has ended: `exit_code`, `cause` and
    `executing` are known then. Raises NodeStartError when no process can be started.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        on_ready: Callable[[WorkerProcess], None],
        on_exit: Callable[[WorkerProcess], None],
    ) -> None:
        self.instance_id: InstanceId = new_instance_id()
        self.started_at = 0.0
        self.ready = False
        self.exited = False
        self.expected = False
        """Somebody asked it to end."""
        self.restarting = False
        """Asked to end in order to be started again."""
        self.exit_code = 0
        self.cause = ""
        self.executing: list[int] = []
        self.error: tuple[str, str] | None = None
        """Kind and text of the error of a start that failed."""
        self.address = ""
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._on_ready, self._on_exit = on_ready, on_exit
        self._nthreads = settings["nthreads"]
        self._kills_before = out_of_memory_kills()
        self._killed_because = ""
        self._kill_timer: asyncio.TimerHandle | None = None
        self._printed = b""
        self._said = b""
        self._ready_pipe = self._stderr_pipe = -1
        self._pidfd = -1
        self._marks = _open_marks(self._nthreads)
        try:
            self._process = self._spawn(settings)
        except OSError as exc:
            os.close(self._marks)
            raise NodeStartError(f"a worker process could not be started with {sys.executable!r}: {exc}") from exc
        self.pid = self._process.pid
        self._watch()

    # --- start ------------------------------------------------------------------------------------------------------

    def _spawn(self, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
        ready_read, ready_write = os.pipe()
        error_read, error_write = os.pipe()
        terminal = os.dup(2)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "zmqtasks", "worker-process"],
                stdin=subprocess.PIPE,
                stderr=error_write,
                pass_fds=(ready_write, terminal, self._marks),
                env=_environment(self._nthreads),
                bufsize=0,
            )
        except OSError:
            os.close(ready_read)
            os.close(error_read)
            raise
        finally:
            for descriptor in (ready_write, error_write, terminal):
                os.close(descriptor)
        self._ready_pipe, self._stderr_pipe = ready_read, error_read
        for descriptor, readable in ((ready_read, self._ready_readable), (error_read, self._stderr_readable)):
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, readable)
        line = {
            **settings,
            "instance_id": self.instance_id.hex(),
            "nanny_pid": os.getpid(),
            "sys_path": [os.path.abspath(path) for path in sys.path],
            "marks_descriptor": self._marks,
            "ready_descriptor": ready_write,
            "stderr_descriptor": terminal,
        }
        self._process = process
        self._write(line)
        self.started_at = self._loop.time()
        return process

    def connect(self, scheduler_address: str) -> None:
        """Tells the process which scheduler to go to."""
        self._write({"scheduler_address": scheduler_address})

    def _write(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, which is noticed elsewhere
            self._process.stdin.write(json.dumps(line).encode() + b"\n")

    def _close_pipe(self, descriptor: int) -> int:
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        return -1

    def _ready_readable(self) -> None:
        chunk = _read_chunk(self._ready_pipe)
        if chunk is None:
            return
        *lines, self._said = (self._said + chunk).split(b"\n")
        for line in lines:
            self._on_message(json.loads(line))
        if not chunk:
            self._ready_pipe = self._close_pipe(self._ready_pipe)

    def _on_message(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self.error = (message["kind"], message["error"])
        elif "stopped" in message:
            self.expected = True  # by its scheduler
        elif not self.exited:
            self.ready = True
            self.address = message["ready"]["address"]
            self._on_ready(self)

    def _stderr_readable(self) -> None:
        chunk = _read_chunk(self._stderr_pipe)
        if chunk:
            self._printed = (self._printed + chunk)[-_KEPT_STDERR:]
        elif chunk is not None:
            self._stderr_pipe = self._close_pipe(self._stderr_pipe)
            if self.ready:  # warnings of the start, say
                with contextlib.suppress(OSError):
                    os.write(2, self._printed)

    # --- end --------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if hasattr(os, "pidfd_open"):
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self._ended)
            return

        def wait() -> None:  # not Linux
            self._process.wait()
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ended)

        threading.Thread(target=wait, name=f"zmqtasks-wait-{self.pid}", daemon=True).start()

    def _ended(self) -> None:
        code = self._process.poll()
        if code is None or self.exited:
            return
        self.exited = True
        self.exit_code = code
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        # What the process wrote last is still in the pipes (which hold 64 KiB, one read).
        for _ in range(2):
            if self._ready_pipe >= 0:
                self._ready_readable()
            if self._stderr_pipe >= 0:
                self._stderr_readable()
        self._ready_pipe = self._close_pipe(self._ready_pipe)
        self._stderr_pipe = self._close_pipe(self._stderr_pipe)
        self.executing = [mark for mark in _read_marks(self._marks) if mark]
        os.close(self._marks)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self.cause = self._name_cause()
        self._gone.set()
        self._on_exit(self)

    def _name_cause(self) -> str:
        if self._killed_because:
            return self._killed_because
        if self.exit_code >= 0:
            return f"exited with code {self.exit_code}"
        if self.exit_code == -signal.SIGKILL and out_of_memory_kills() > self._kills_before:
            return "out of memory (killed by the kernel)"
        try:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"killed by signal {-self.exit_code}"

    def terminate(self, grace_s: float) -> None:
        """Asks the process to end, and kills it after `grace_s`; idempotent."""
        self.expected = True
        if self.exited or self._kill_timer is not None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._kill_timer = self._loop.call_later(grace_s, self.kill)

    def kill(self, because: str = "") -> None:
        """Ends the process at once; `because` becomes the cause."""
        if not self.exited:
            self._killed_because = self._killed_because or because
            self._process.kill()

    async def wait_gone(self) -> None:
        """Waits until the process has ended and nothing is left of it."""
        await self._gone.wait()

    def printed(self) -> str:
        """What it wrote to stderr before it was ready: the end of it."""
        return self._printed.decode("utf-8", "replace").strip()


def over_limit(used_bytes: int, limit_bytes: int) -> str:
    """The cause of a death by the nanny's hand."""
    return f"over its memory limit ({format_bytes(used_bytes)} of {format_bytes(limit_bytes)})"


def _read_chunk(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _open_marks(nthreads: int) -> int:
    """A descriptor of memory for the run ids of all threads: it outlives the worker."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("zmqtasks-executing", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, 8 * (nthreads + MAX_EXTRA_THREADS))
    return descriptor


def _read_marks(descriptor: int) -> list[int]:
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return memoryview(data).cast("q").tolist()


def _environment(nthreads: int) -> dict[str, str]:
    """This process's; numeric libraries use the worker's share of the processors unless the user has said how many."""
    environment = dict(os.environ)
    for variable in _THREAD_VARIABLES:
        environment.setdefault(variable, str(nthreads))
    non_temporal.set_for_child(environment)
    root = Path(__file__).resolve().parents[3]
    if root.name not in ("site-packages", "dist-packages"):  # used from a source tree: `-P` leaves it out otherwise
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH", "")]))
    return environment
