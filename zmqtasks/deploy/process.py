"""A process of a cluster, seen from the parent: started, spoken to through pipes, and surely ended.

`child.py` has the other side and the protocol between them.
"""

from __future__ import annotations

import collections
import json
import os
import select
import site
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from zmqtasks import errors
from zmqtasks.errors import NodeStartError, ZmqTasksError
from zmqtasks.nodes.versions import own_versions

__all__ = ["NodeProcess"]

KEPT_LINES = 200
KILL_WAIT_S = 5.0


class NodeProcess:
    """One `python -m zmqtasks <role>-process`.

    Its stderr is copied, line by line, to this process's `sys.stderr` (so that it shows in a notebook), and the last
    lines are kept for the error of a failed start.
    """

    def __init__(self, role: str, settings: dict[str, Any]) -> None:
        """Starts the process; `wait_ready` waits until its node is up.

        Raises:
            NodeStartError: there is no interpreter to start, or the system refuses.
        """
        if not sys.executable:
            raise NodeStartError(
                "sys.executable is empty: LocalCluster(processes=False) needs no Python program to start"
            )
        self.role = role
        self._output: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        command = [sys.executable, "-P", "-m", "zmqtasks", f"{role}-process"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is for the program of the user, not for its cluster
                bufsize=0,
            )
        except OSError as exc:
            raise NodeStartError(f"the {role} process could not be started: {exc}") from exc
        self._pump = threading.Thread(target=self._copy_output, name=f"zmqtasks-{role}-output", daemon=True)
        self._pump.start()
        self.send({"parent_pid": os.getpid(), "sys_path": _search_path(), "versions": own_versions(), **settings})

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Writes one line to the process; a process that has ended is noticed by `wait_ready`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            pass

    def wait_ready(self, deadline: float) -> dict[str, Any]:
        """What the process says once its node is up.

        Args:
            deadline: On `time.monotonic()`.

        Raises:
            NodeStartError: it failed, ended, or was not ready in time; with what it printed.
        """
        assert self._process.stdout is not None
        received = b""
        while b"\n" not in received:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable(self._process.stdout.fileno(), left):
                raise NodeStartError(f"the {self.role} process was not ready in time{self._printed()}")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise NodeStartError(
                    f"the {self.role} process {self._how_it_ended()} during its start{self._printed()}"
                )
            received += chunk
        self._process.stdout.close()
        answer = json.loads(received)
        if "error" in answer:
            raise _failure(self.role, answer)
        ready: dict[str, Any] = answer["ready"]
        return ready

    def ask_to_end(self) -> None:
        """Closes the pipe that keeps the process alive."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_ended(self, deadline: float) -> None:
        """Waits for the end of the process and forces it after `deadline`; nothing of it is left afterwards."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
        self._pump.join(KILL_WAIT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def kill(self) -> None:
        """Ends the process and all that it has started at once."""
        try:
            os.killpg(self._process.pid, 9)
        except ProcessLookupError:
            pass
        self._process.wait(KILL_WAIT_S)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def _copy_output(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            pending = b""
            while chunk := os.read(stream.fileno(), 1 << 16):
                *lines, pending = (pending + chunk).split(b"\n")
                self._show(lines)
            if pending:
                self._show([pending])

    def _show(self, lines: list[bytes]) -> None:
        text = [line.decode("utf-8", "replace") for line in lines]
        self._output.extend(text)
        try:
            sys.stderr.write("".join(line + "\n" for line in text))
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):  # no stderr, or a closed one: the lines are kept anyway
            pass

    def _printed(self) -> str:
        self._pump.join(0.2)  # what it wrote last may still be on its way
        lines = list(self._output)
        return ("; it printed:\n  " + "\n  ".join(lines)) if lines else "; it printed nothing"

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


def _failure(role: str, answer: dict[str, Any]) -> Exception:
    """The child's error, as the same class where it is one that a caller may want to tell apart."""
    kind = getattr(errors, answer.get("kind", ""), NodeStartError)
    text = f"the {role} process could not start: {answer['error']}"
    if isinstance(kind, type) and issubclass(kind, ZmqTasksError) and kind is not NodeStartError:
        error = NodeStartError(text)
        error.__cause__ = kind(answer["error"])
        return error
    return NodeStartError(text)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def _search_path() -> list[str]:
    """Where this program finds its modules: its workers have to find the same ones."""
    return [os.path.abspath(path) for path in sys.path]


def _environment() -> dict[str, str]:
    """This process's, and where to find this package when it is used from a source tree that is not installed."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    if Path(root).name not in ("site-packages", "dist-packages") and root not in site.getsitepackages():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment
