"""Processes at the other end of what is measured: started by `python -m`, gone with whoever started them.

The pipe to a child's standard input stays open for as long as the parent wants it; the child calls `live_with_parent`,
and ends when that pipe does, however the parent ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import IO

from zmqtasks.transports import non_temporal

START_TIMEOUT_S = 30.0
"""For a child to import what it needs and say so, on a busy machine."""


class MeasuringError(Exception):
    """A figure could not be taken; the text says of what and why."""


class Child:
    """A process that runs `python -m module *arguments`; killed, and waited for, when the block is left.

    `own_group`: in a process group of its own, which is killed with all that the child has started, and which Ctrl-C in
    the terminal does not reach. All copy large arrays as workers do that a nanny has started.
    """

    def __init__(self, module: str, *arguments: str, own_group: bool = False, first_line: str = "") -> None:
        self.module = module
        self._own_group = own_group
        self._buffer = b""
        environment = dict(os.environ)
        non_temporal.set_for_child(environment)
        with contextlib.ExitStack() as undo:
            with _interruptions_held():
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    process_group=0 if own_group else None,
                )
                undo.callback(self.kill)
            if first_line:
                self.write_line(first_line)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """The process number."""
        return self._process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def write_line(self, line: str) -> None:
        """Gives the child a line; MeasuringError when it is gone."""
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError as exc:
            raise MeasuringError(f"{self.module} has ended early; see what it wrote above") from exc

    def read_line(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line that the child prints; MeasuringError when it ends before, or none comes in time."""
        end = time.monotonic() + timeout_s
        descriptor = self._stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise MeasuringError(f"{self.module} said nothing for {timeout_s:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise MeasuringError(f"{self.module} ended ({_ending(self._process)}); see what it wrote above")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def kill(self) -> None:
        """Ends the child at once and waits for it; idempotent."""
        with contextlib.suppress(ProcessLookupError):
            if self._own_group:
                os.killpg(self._process.pid, signal.SIGKILL)  # also what it started, even when it has ended itself
            else:
                self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait(timeout=30)
        self._stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def children(count: int, module: str, *arguments: str, first_line: str = "") -> Iterator[list[Child]]:
    """So many children at the same time."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Child(module, *arguments, first_line=first_line)) for _ in range(count)]


@contextlib.contextmanager
def _interruptions_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when the block is left, so that no process is started and then forgotten. What is started in it
    never gets them: a batch system sends SIGTERM to all processes of a job, and their end is the parent's to say, who would
    take an early one for a fault."""
    held = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []
    try:
        with contextlib.ExitStack() as restore:
            if threading.current_thread() is threading.main_thread():  # which handles the signals of all threads
                for each in held:
                    before = signal.signal(each, lambda number, frame: came.append(number))
                    restore.callback(signal.signal, each, before)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # which is what a child inherits
            restore.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """The first SIGTERM (the end of a job's time, say) does what Ctrl-C does meanwhile, and further ones nothing, until the
    process has ended: a batch system may send some, and what is written then is what the job was for. Only in the main
    thread, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:  # none has come
            signal.signal(signal.SIGTERM, before)


def read_first_line() -> bytes:
    """In a child: the line that the parent gives it at once; the process ends, with success, if there will be none."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the parent was interrupted, or killed
        raise SystemExit(0)
    return line


def live_with_parent(longest_s: float = 600.0) -> None:
    """In a child: end this process when standard input ends, and after `longest_s` in any case.

    Call it when all lines that the parent gives have been read.
    """
    signal.alarm(int(longest_s))

    def wait_for_the_end() -> None:
        try:
            while os.read(0, 1 << 12):
                pass
        finally:
            os._exit(0)

    threading.Thread(target=wait_for_the_end, name="lives-with-parent", daemon=True).start()
