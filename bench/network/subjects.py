"""What there is to measure on this machine: the transports of the registry, and the baselines that stand beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from typing import NamedTuple

from zmqtasks.errors import ZmqTasksError
from zmqtasks.transports.registry import get_transport, known_schemes

from .document import Skipped, Subject
from .processes import MeasuringError
from .worker import Task

_ORDER = ("inproc", "shm", "unix", "tcp", "zmq", "ucx")
"""Transports with the same baseline follow each other: noise that comes and goes hits them and it."""


class Baseline(NamedTuple):
    """Something to compare transports with."""

    id: str
    name: str
    module: str
    schemes: tuple[str, ...]
    """The transports that it stands beside."""
    main: bool = True
    """Their figures are given as ratios to it."""
    function: str = "measure"


BASELINES = (
    Baseline("memcpy", "memcpy", "baseline_memcpy", ("inproc", "shm")),
    Baseline("raw-unix", "raw unix socket", "baselines_socket", ("unix",), function="measure_unix"),
    Baseline("raw-socket", "raw TCP socket", "baselines_socket", ("tcp",)),
    Baseline("raw-pyzmq", "raw pyzmq", "baselines_zmq", ("zmq",)),
    Baseline("raw-ucxx", "raw ucxx", "baselines_ucx", ("ucx",)),
    Baseline("dask", "dask.distributed", "baseline_dask", ("tcp", "zmq"), main=False),
    Baseline("dask-zmq", "dask.distributed on zmq", "baseline_dask", ("zmq",), main=False, function="measure_zmq"),
)


class Measured(NamedTuple):
    """A subject and how its process is told."""

    subject: Subject
    task: Task


def find_subjects(
    schemes: Collection[str] | None = None, compressions: Collection[str] = ("off",), *, encrypted_data: bool = False
) -> tuple[list[Measured], list[Skipped]]:
    """All subjects for the transports in `schemes` (None: all), and those left out with the reason.

    Data links are measured with each of `compressions`, and encrypted as well with `encrypted_data`. Raises
    `MeasuringError` for a scheme that nobody knows.
    """
    known = sorted(known_schemes(), key=lambda scheme: (_place(scheme), scheme))
    for scheme in schemes or ():
        if scheme not in known:
            raise MeasuringError(f"there is no transport {scheme!r}: known are {', '.join(known)}")
    chosen = [scheme for scheme in known if schemes is None or scheme in schemes]
    found: list[Measured] = []
    skipped: list[Skipped] = []
    shown: set[str] = set()
    for scheme in chosen:
        for baseline in BASELINES:
            if scheme in baseline.schemes and baseline.id not in shown:
                shown.add(baseline.id)
                _add_baseline(baseline, found, skipped)
        try:
            capabilities = get_transport(scheme).capabilities
        except ZmqTasksError as exc:
            skipped.append(Skipped(scheme, str(exc)))
            continue
        encryptions = (False, True) if capabilities.encrypts else (False,)
        found += [_transport(scheme, encrypted) for encrypted in encryptions]
        if capabilities.crosses_hosts:
            for encrypted in encryptions if encrypted_data else (False,):
                found += _data_links(scheme, encrypted, compressions)
    return found, skipped


def compared(measured: Sequence[Measured]) -> list[list[Measured]]:
    """All of them: each baseline with the plain transports that it stands beside, whatever else there is by itself."""
    groups: dict[str, list[Measured]] = {}
    for each in measured:
        subject = each.subject
        beside = subject.baseline if subject.kind == "transport" and not each.task.encrypted else None
        groups.setdefault(beside if beside in groups else subject.id, []).append(each)
    return list(groups.values())


def _place(scheme: str) -> int:
    return _ORDER.index(scheme) if scheme in _ORDER else len(_ORDER)


def _add_baseline(baseline: Baseline, found: list[Measured], skipped: list[Skipped]) -> None:
    if importlib.util.find_spec(f".{baseline.module}", __package__) is None:
        skipped.append(Skipped(baseline.id, "this version does not measure it"))
        return
    subject = Subject(id=baseline.id, name=baseline.name, kind="baseline")
    found.append(Measured(subject, Task(module=baseline.module, function=baseline.function)))


def _transport(scheme: str, encrypted: bool) -> Measured:
    subject = Subject(
        id=f"{scheme}+encryption" if encrypted else scheme,
        name=f"{scheme}, encrypted" if encrypted else scheme,
        kind="transport",
        settings={"encryption": "on" if encrypted else "off"},
        baseline=next((each.id for each in BASELINES if scheme in each.schemes and each.main), None),
    )
    return Measured(subject, Task(scheme=scheme, encrypted=encrypted))


def _data_links(scheme: str, encrypted: bool, compressions: Collection[str]) -> list[Measured]:
    """With all compressions of what compresses, and with the strongest of what does not: its cost for nothing."""
    made = []
    for compression in compressions:
        contents = ("measurements", "noise") if compression not in ("off", "auto") else ("measurements",)
        for content in contents:
            marks = [*(["encryption"] if encrypted else []), *([compression] if compression != "off" else [])]
            marks += [content] if content == "noise" else []
            subject = Subject(
                id="+".join([scheme, "data", *marks]),
                name=", ".join([f"{scheme} data", *marks]).replace("encryption", "encrypted"),
                kind="data",
                settings={
                    "encryption": "on" if encrypted else "off",
                    "compression": compression,
                    "content": content,
                },
                baseline=f"{scheme}+encryption" if encrypted else scheme,
            )
            task = Task(scheme=scheme, encrypted=encrypted, compression=compression, content=content)
            made.append(Measured(subject, task))
    return made
