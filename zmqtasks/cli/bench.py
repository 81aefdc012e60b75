"""`zmqtasks bench`: finds the benchmark suite and passes the command line on."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import zmqtasks
from zmqtasks.cli.options import key_file_option, scheduler_file_option

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30, "gib": 1 << 30}


def suite_module(name: str) -> ModuleType:
    """A module of the network suite: `zmqtasks_bench.network` of a wheel, `bench.network` of a checkout."""
    in_checkout = Path(zmqtasks.__file__).parents[1] / "bench" / "network" / "__init__.py"
    package = "bench.network" if in_checkout.exists() else "zmqtasks_bench.network"
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as exc:
        if exc.name is not None and exc.name.partition(".")[0] == package.partition(".")[0]:
            message = f"the benchmark suite is not installed here ({exc.name} is missing); the wheel of zmqtasks has it"
            raise click.ClickException(message) from exc
        raise


def _listed(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Values with commas between them."""
    if value is None:
        return None
    listed = tuple(part.strip() for part in value.split(",") if part.strip())
    if not listed:
        raise click.BadParameter("it lists nothing", ctx, param)
    return listed


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Sizes such as `64`, `4KiB`, `1m`, in bytes."""
    listed = _listed(ctx, param, value)
    return None if listed is None else tuple(_size(text, ctx, param) for text in listed)


def _size(text: str, ctx: click.Context, param: click.Parameter) -> int:
    lower = text.lower()
    digits = lower.rstrip("bgikm ")
    unit = _UNITS.get(lower[len(digits) :].strip())
    if not digits.isdecimal() or unit is None or not int(digits):
        raise click.BadParameter(f"{text!r} is not a size: write 4096, 64KiB, 16MiB or 1GiB", ctx, param)
    return int(digits) * unit


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def bench() -> None:
    """Measure what the network gives, and compare measurements."""


@bench.command()
@click.option("--quick", is_flag=True, help="Some five minutes, to see what is what.")
@click.option("--transports", callback=_listed, metavar="LIST", help="Only these: tcp,zmq (default: all).")
@click.option(
    "--sizes",
    callback=_sizes,
    metavar="LIST",
    help="Message sizes for bandwidth: 1KiB,64MiB (default: 13 from 1 to 1GiB, --quick: 1KiB,64KiB,1MiB,64MiB; "
    "of a cluster: 1MiB,16MiB,64MiB, --quick: 1MiB,16MiB).",
)
@click.option(
    "--peers",
    type=click.IntRange(1, 1000),
    help="Processes at the other end of fan-in and fan-out (default: 8, --quick: 2).",
)
@click.option("--rounds", type=click.IntRange(1, 1000), help="How often everything is measured (default: 3).")
@click.option(
    "--compression", callback=_listed, metavar="LIST", help="Of data links: off,auto,lz4,zstd (default: off,auto,lz4)."
)
@click.option("--json", "json_file", type=_FILE, help="Write all figures, for programs and `bench compare`.")
@click.option("--html", "html_file", type=_FILE, help="Write a report: one file, with plots.")
@click.option("--png", "png_folder", type=click.Path(file_okay=False, path_type=Path), help="Write the plots there.")
@click.option("--scheduler", metavar="ADDRESS", help="Measure the links between the workers of this cluster instead.")
@click.option("--workers", type=click.IntRange(2), help="Of a cluster: wait until it has so many, for up to 5 minutes.")
@click.option("--pairs", type=click.IntRange(1), help="Of a cluster: about so many pairs (default: all, or 1000).")
@click.option("--parallel", is_flag=True, help="Of a cluster: all pairs at the same time, a loaded network.")
@click.option("--pair-timeout", type=click.FloatRange(1.0), help="Of a cluster: seconds for one pair (default: 30).")
@scheduler_file_option
@key_file_option
def net(**options: Any) -> int:
    """Measure every transport on this machine, or the links of a cluster.

    On this machine, baselines are measured in the same run: raw sockets, raw pyzmq, raw ucxx, memcpy and dask.distributed, as
    far as they are installed.
    """
    return int(suite_module("command").run(**options))


@bench.command()
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
def compare(first: Path, second: Path) -> int:
    """Say what got better and worse from FIRST to SECOND, two files of `bench net --json`."""
    return int(suite_module("compare").run(first, second))
