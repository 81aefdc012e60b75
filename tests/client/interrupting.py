"""Interrupts at chosen moments: what Ctrl-C does to the main thread, at every place where Python lets it happen."""

from __future__ import annotations

import dis
import functools
import itertools
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

_TAKES_SIGNALS = ("CALL", "RESUME", "JUMP_BACKWARD")
"""Instructions after which the interpreter looks for signals (`CHECK_EVAL_BREAKER` in CPython's ceval)."""


@functools.cache
def _moments(code: CodeType) -> frozenset[int]:
    """The offsets of the instructions before which a signal handler may run.

    To Python the interrupt belongs to the instruction before. Where the two are not under the same `try`, as between a call
    and the `finally` behind it, an interrupt here would be caught otherwise than a real one: these are left out.
    """
    instructions = list(dis.get_instructions(code))
    tries = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def handlers(offset: int) -> list[int]:
        return [each.target for each in tries if each.start <= offset < each.end]

    return frozenset(
        after.offset
        for before, after in itertools.pairwise(instructions)
        if before.opname.startswith(_TAKES_SIGNALS) and handlers(before.offset) == handlers(after.offset)
    )


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether Python would print the interrupt and drop it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class Interrupt:
    """SIGINT at the moment of that number, from 1 on, which the main thread spends in the package."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.where = ""

    @property
    def happened(self) -> bool:
        """Whether there were so many moments."""
        return not self.left

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Takes the interrupt in, if it comes."""
        former = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        except KeyboardInterrupt:
            if not self.happened:
                raise
        finally:
            sys.settrace(former)

    def _enter(self, frame: FrameType, event: str, arg: object) -> object:
        if "/zmqtasks/" not in frame.f_code.co_filename or _in_finalizer(frame):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> object:
        if event == "opcode" and frame.f_lasti in _moments(frame.f_code):
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._step
