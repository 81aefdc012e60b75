"""The command line for people: subcommands that are imported when they are used, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from zmqtasks import __version__
from zmqtasks.errors import ZmqTasksError

COMMANDS = {
    "scheduler": ("zmqtasks.cli.scheduler:scheduler", "Start a scheduler."),
    "worker": ("zmqtasks.cli.worker:worker", "Start workers for a scheduler."),
    "status": ("zmqtasks.cli.status:status", "Show workers, tasks and memory of a cluster."),
    "key": ("zmqtasks.cli.key:key", "Make a cluster key, or tell of one."),
    "demo": ("zmqtasks.cli.demo:demo", "Run two real computations on a small local cluster."),
    "bench": ("zmqtasks.cli.bench:bench", "Measure what the network gives."),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zmqtasks")
def zmqtasks() -> None:
    """Futures and task graphs on a cluster."""


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line; errors of zmqtasks and of the user are one line on stderr, never a traceback."""
    try:
        result = zmqtasks.main(list(arguments), prog_name="zmqtasks", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ZmqTasksError as exc:
        print(f"zmqtasks: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `zmqtasks status | head`
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0
