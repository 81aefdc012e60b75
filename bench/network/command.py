"""`zmqtasks bench net`: runs what is asked for, shows it and writes the files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from . import suite
from .document import Report, to_dict, write_json
from .processes import MeasuringError
from .terminal import progress, show
from .wording import size_text

INTERRUPTED = 130


def run(
    *,
    quick: bool,
    transports: Collection[str] | None,
    sizes: Collection[int] | None,
    peers: int | None,
    rounds: int | None,
    compression: Collection[str] | None,
    json_file: Path | None,
    html_file: Path | None,
    png_folder: Path | None,
    scheduler: str | None,
    scheduler_file: str | None,
    key_file: str | None,
    pairs: int | None,
    parallel: bool,
    pair_timeout: float | None,
    workers: int | None,
) -> int:
    """Gives the exit code: 0, or 130 when the run was interrupted (what it had is shown and written all the same)."""
    console = Console()
    for path in (json_file, html_file):
        _check_writable(path)
    try:
        if png_folder is not None:
            from .plots import need_matplotlib

            need_matplotlib()
        if scheduler or scheduler_file:
            from .cluster import measure_cluster

            report = measure_cluster(
                scheduler,
                scheduler_file,
                key_file,
                quick=quick,
                sizes=sizes,
                pairs=pairs,
                together=parallel,
                limit_s=pair_timeout,
                workers=workers,
                console=console,
            )
        else:
            chosen = (suite.quick if quick else suite.full)(sizes, peers, rounds, compression)
            with progress(console) as on_step:
                report = suite.run(
                    chosen, transports, _command(quick, transports, sizes, peers, rounds, compression), on_step
                )
    except MeasuringError as exc:
        raise click.ClickException(str(exc)) from exc
    written = write(report, json_file, html_file, png_folder)
    show(report, console)  # after the files: `| head` ends it, and must not cost the minutes of measuring
    for path in written:
        console.print(f"written: {path}", highlight=False, markup=False)
    return 0 if report.complete else INTERRUPTED


def write(report: Report, json_file: Path | None, html_file: Path | None, png_folder: Path | None) -> list[Path]:
    """Writes the files that are asked for; gives their paths."""
    written: list[Path] = []
    if json_file is not None:
        write_json(report, json_file)
        written.append(json_file)
    if html_file is not None:
        from .report import render

        html_file.write_text(render(to_dict(report)), encoding="utf-8")
        written.append(html_file)
    if png_folder is not None:
        from .plots import write_pngs

        written += write_pngs(report, png_folder)
    return written


def _check_writable(path: Path | None) -> None:
    """Before the minutes of measuring, not after."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise click.ClickException(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        path.touch()
    except OSError as exc:
        raise click.ClickException(f"{path} cannot be written: {exc.strerror}") from exc


def _command(quick: bool, *values: Any) -> str:
    """The command line as far as it decides about figures: no file names, which may have names of people in them."""
    transports, sizes, peers, rounds, compression = values
    parts = ["zmqtasks bench net", *(["--quick"] if quick else [])]
    if transports:
        parts.append(f"--transports {','.join(transports)}")
    if sizes:
        parts.append(f"--sizes {','.join(size_text(size).replace(' ', '') for size in sizes)}")
    parts += [f"--peers {peers}"] if peers else []
    parts += [f"--rounds {rounds}"] if rounds else []
    parts += [f"--compression {','.join(compression)}"] if compression else []
    return " ".join(parts)
