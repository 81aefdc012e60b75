"""`zmqtasks bench net`: runs what is asked for, shows it and writes the files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from zmqtasks.config import COMPRESSION_MODES
from zmqtasks.transports.registry import known_schemes

from . import suite
from .document import Report, to_dict, write_json
from .processes import MeasuringError, terminated_as_interrupted
from .terminal import progress, show
from .wording import size_text

INTERRUPTED = 130


@terminated_as_interrupted()
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
    on_cluster = scheduler is not None or scheduler_file is not None
    if on_cluster:
        _refuse(
            {"transports": transports, "peers": peers, "rounds": rounds, "compression": compression},
            "for one machine: with a scheduler, links are measured as its workers have made them",
        )
    else:
        of_clusters: dict[str, object] = {
            "pairs": pairs,
            "parallel": parallel,
            "pair-timeout": pair_timeout,
            "workers": workers,
        }
        _refuse(
            {**of_clusters, "key-file": key_file},
            "for a cluster: say which one, by --scheduler or --scheduler-file",
        )
        _check_names("transport", transports, known_schemes())
        _check_names("compression", compression, COMPRESSION_MODES)
    try:
        if png_folder is not None:
            from .plots import need_matplotlib

            need_matplotlib()
        with _writable((json_file, html_file), png_folder):
            if on_cluster:
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
    written, failed = write(report, json_file, html_file, png_folder)
    show(report, console)  # after the files: `| head` ends it, and must not cost the minutes of measuring
    for path in written:
        console.print(f"written: {path}", highlight=False, markup=False)
    if failed:
        raise click.ClickException("; ".join(failed))
    return 0 if report.complete else INTERRUPTED


def write(
    report: Report, json_file: Path | None, html_file: Path | None, png_folder: Path | None
) -> tuple[list[Path], list[str]]:
    """Writes the files that are asked for; gives their paths, and what could not be written."""
    written: list[Path] = []
    failed: list[str] = []
    try:
        if json_file is not None:
            write_json(report, json_file)
            written.append(json_file)
    except OSError as exc:
        failed.append(f"{json_file} cannot be written: {exc.strerror}")
    try:
        if html_file is not None:
            from .report import render

            html_file.write_text(render(to_dict(report)), encoding="utf-8")
            written.append(html_file)
    except OSError as exc:
        failed.append(f"{html_file} cannot be written: {exc.strerror}")
    try:
        if png_folder is not None:
            from .plots import write_pngs

            written += write_pngs(report, png_folder)
    except (MeasuringError, OSError) as exc:
        failed.append(str(exc))
    return written, failed


def _refuse(options: Mapping[str, object], why: str) -> None:
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"{', '.join(given)}: {why}")


def _check_names(what: str, names: Collection[str] | None, known: Collection[str]) -> None:
    for name in names or ():
        if name not in known:
            raise click.ClickException(f"there is no {what} {name!r}: known are {', '.join(sorted(known))}")


@contextlib.contextmanager
def _writable(files: Collection[Path | None], folder: Path | None) -> Iterator[None]:
    """Finds out before the minutes of measuring, not after; what was made for it goes away if nothing comes of them."""
    with contextlib.ExitStack() as made:
        for path in files:
            if path is not None:
                is_new = not path.exists()
                _check_file(path)
                if is_new:
                    made.callback(path.unlink, missing_ok=True)
        if folder is not None:
            is_new = not folder.exists()
            _check_folder(folder)
            if is_new:
                made.callback(_remove_empty, folder)
        yield
        made.pop_all()


def _check_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise click.ClickException(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        path.touch()
    except OSError as exc:
        raise click.ClickException(f"{path} cannot be written: {exc.strerror}") from exc


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise click.ClickException(f"plots cannot be written to {folder}: {exc.strerror}") from exc


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()


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
