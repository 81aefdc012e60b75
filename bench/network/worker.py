"""The process in which one subject is measured: `python -m <this package>.worker`, driven through its pipes.

The first line of standard input is a `Task`; each further one a `Plan`, answered by one line: an `Answer`. With a plan that
is measured in turns (`turns`), there come answers that only say where it waits, and an empty line tells it to go on. The
progress bar of the suite, and the libraries of other subjects, are in other processes and disturb nothing here.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import sys
import threading
import traceback

import msgspec

from zmqtasks.errors import ZmqTasksError

from . import turns
from .figures import Figures, Plan
from .processes import MeasuringError, read_first_line

LONGEST_S = 900
"""Of one round of one subject; then the process ends, whatever it waits for."""


class Task(msgspec.Struct, kw_only=True):
    """What this process measures."""

    module: str | None = None
    """A module of this package with a `measure(plan)`, and `function` when it is another one."""
    function: str = "measure"
    scheme: str = ""
    """Or the transport of this scheme,"""
    encrypted: bool = False
    content: str = ""
    """Of the values when its data links are measured, instead of the transport alone."""
    compression: str = "off"


class Answer(msgspec.Struct, kw_only=True):
    """What came of one round: figures, or a sentence that says why there are none; or neither yet."""

    waits_at: turns.Place | None = None
    """The round is not over: it goes on when it is its turn."""
    figures: Figures | None = None
    error: str = ""
    expected: bool = False
    """The subject cannot be measured here (a package is not installed, say); False: something is wrong."""


def measure(task: Task, plan: Plan) -> Figures:
    """One round."""
    if task.module is not None:
        module = importlib.import_module(f".{task.module}", __package__)
        figures: Figures = getattr(module, task.function)(plan)
        return figures
    if task.content:
        from .data_links import measure_data

        return measure_data(task.scheme, task.encrypted, task.compression, task.content, plan)
    from .links import measure_link

    return measure_link(task.scheme, task.encrypted, plan)


def answer(task: Task, plan: Plan) -> Answer:
    """One round, and whatever goes wrong in it."""
    try:
        return Answer(figures=measure(task, plan))
    except ImportError as exc:
        return Answer(error=f"{exc.name} is not installed" if exc.name else str(exc), expected=True)
    except (ZmqTasksError, MeasuringError, TimeoutError) as exc:
        return Answer(error=f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__, expected=True)
    except Exception as exc:
        traceback.print_exc()
        return Answer(error=f"{type(exc).__name__}: {exc}")


def main() -> int:
    """Measures until standard input ends, and ends with it also in the midst of a round."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not taken for an answer
    task = msgspec.json.decode(read_first_line(), type=Task)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    def say(what: Answer) -> None:
        out.write(msgspec.json.encode(what) + b"\n")
        out.flush()

    def wait(place: turns.Place) -> None:
        say(Answer(waits_at=place))
        lines.get()

    threading.Thread(target=read, name="reads-plans", daemon=True).start()
    while True:
        plan = msgspec.json.decode(lines.get(), type=Plan)
        signal.alarm(LONGEST_S)
        turns.wait_by(wait if plan.in_turns else None)
        say(answer(task, plan))
        signal.alarm(0)


if __name__ == "__main__":
    sys.exit(main())
