"""What the machine asks of its shell, and what the shell reports of runs: plain records, compared whole in tests."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from zmqtasks.ids import Key
from zmqtasks.nodes.worker.state import Run
from zmqtasks.protocol.ops import CallFunction, Op, PlaceFile, SetUpPlugin, TearDownPlugin


class StartRuns(msgspec.Struct, frozen=True):
    """Their inputs are here: pin them and hand the runs to the executor, in this order where priorities are equal."""

    runs: list[Run]


class TakeBack(msgspec.Struct, frozen=True):
    """Runs that have not started are to be taken from the executor and reported by `runs_taken_back`."""

    runs: list[Run]


class Interrupt(msgspec.Struct, frozen=True):
    """Runs that have started are asked to stop (async tasks are cancelled)."""

    runs: list[Run]


class FetchKeys(msgspec.Struct, frozen=True):
    """To be fetched from one peer; answered exactly once, by `fetch_finished` or `fetch_broken`."""

    request: int
    address: str
    keys: list[Key]


class KeepInline(msgspec.Struct, frozen=True):
    """Values of inputs that came with the tasks: inline payloads, kept until `DropInline`."""

    keys: list[Key]
    values: list[bytes]


class DropKeys(msgspec.Struct, frozen=True):
    """Results and replicas that the store is to forget."""

    keys: list[Key]


class DropInline(msgspec.Struct, frozen=True):
    """Inputs of `KeepInline` that no run uses any more; where a result has taken the place of one, it stays."""

    keys: list[Key]


class LearnFunctions(msgspec.Struct, frozen=True):
    """Serialized functions by digest, for runs that follow."""

    digests: list[bytes]
    functions: list[bytes]


class Call(msgspec.Struct, frozen=True):
    """A function to call outside of any task; the shell answers by `CallFinished`."""

    op: CallFunction


class Plug(msgspec.Struct, frozen=True):
    """A plugin or file to set up or to take away, in order with others of its kind."""

    op: PlaceFile | SetUpPlugin | TearDownPlugin


class Stop(msgspec.Struct, frozen=True):
    """The worker is to end."""

    reason: str


Instruction: TypeAlias = (
    StartRuns
    | TakeBack
    | Interrupt
    | FetchKeys
    | KeepInline
    | DropKeys
    | DropInline
    | LearnFunctions
    | Call
    | Plug
    | Stop
)


class Finished(msgspec.Struct, gc=False, eq=False):
    """A run gave a result."""

    run: Run
    value: Any
    data: bytes | None
    """The result as an inline payload, when it is small."""
    size: int
    duration_us: int
    references: list[Key] | None = None
    """Keys of the futures in the result."""
    answered: bool = False
    """The thread has sent the answer itself (`Executor.answer`): only the books are left to keep."""


class Outbox:
    """Ops for the scheduler and instructions for the shell, in the order in which the machine made them."""

    __slots__ = ("instructions", "ops")

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.instructions: list[Instruction] = []

    def drop_inline(self, keys: list[Key]) -> None:
        """Asks for `DropInline`: one instruction for the inputs of many runs that end together."""
        last = self.instructions[-1] if self.instructions else None
        if type(last) is DropInline:
            last.keys.extend(keys)
        else:
            self.instructions.append(DropInline(keys))

    def take(self) -> tuple[list[Op], list[Instruction]]:
        """Everything so far; the outbox is empty afterwards."""
        taken = self.ops, self.instructions
        self.ops = []
        self.instructions = []
        return taken
