"""The command `zmqtasks`: picks the subcommand and imports nothing but what that one needs.

The entries that end in `-process` are for processes that a cluster starts itself; they take no options (settings come
through stdin) and skip the command-line parser, because their start counts in the start of every cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

PROCESS_ENTRIES = {
    "scheduler-process": "zmqtasks.deploy.child:run_scheduler",
    "nanny-process": "zmqtasks.deploy.child:run_nanny",
    "worker-process": "zmqtasks.nodes.worker.process:main",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and gives the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and (entry := PROCESS_ENTRIES.get(arguments[0])):
        module, _, name = entry.partition(":")
        return int(getattr(import_module(module), name)())
    from zmqtasks.cli.commands import run_command

    return run_command(arguments)
