"""Commands started as a user would, in shells of their own: their output is read as it comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType

TIMEOUT_S = 30.0


class Shell:
    """`python -m zmqtasks ...` in the background; ends with the `with` block."""

    def __init__(self, *arguments: str, group: bool = False, prefix: tuple[str, ...] = ()) -> None:
        """`group`: in a process group of its own, which signals go to, as those of a terminal do; `prefix`: a command that runs
        the rest (`ip netns exec NAME`)."""
        self.command = [*prefix, sys.executable, "-m", "zmqtasks", *arguments]
        self._group = group
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=group,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """Everything printed up to now."""
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str, timeout_s: float = TIMEOUT_S) -> re.Match[str]:
        """The first match of `pattern` in the output; waits for it."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (found := re.search(pattern, "".join(self._lines))):
                left = deadline - time.monotonic()
                if left <= 0 or (not self._reader.is_alive() and not self._changed.wait(0.1)):
                    raise AssertionError(f"{self.command} did not print {pattern!r}, but:\n{''.join(self._lines)}")
                self._changed.wait(min(left, 0.1))
            return found

    def send(self, number: signal.Signals) -> None:
        if self._group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code; all output is there when this returns."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def stop(self, number: signal.Signals = signal.SIGINT) -> str:
        """Ends it by a signal, asserts a quiet end with code 0, and gives its output."""
        self.send(number)
        code = self.wait_exit()
        assert code == 0, f"{self.command} ended with {code}:\n{self.output}"
        assert "Traceback" not in self.output, self.output
        return self.output

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)


def start_scheduler(*arguments: str) -> tuple[Shell, str]:
    """A scheduler on a free port, and its address."""
    shell = Shell("scheduler", "--port", "0", *arguments)
    try:
        return shell, shell.wait_for(r"listens at (\S+?);?\s")[1]
    except BaseException:
        shell.__exit__(None, None, None)
        raise
