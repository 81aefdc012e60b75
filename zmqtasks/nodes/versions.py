"""Which versions of Python and of packages a node has, and what differs between two nodes."""

from __future__ import annotations

import sys
from collections.abc import Mapping

PACKAGES = ("zmqtasks", "msgspec", "cloudpickle", "numpy")
"""Packages whose versions nodes compare: what writes and reads the bytes that they exchange."""

_own: dict[str, str] = {}


def own_versions() -> dict[str, str]:
    """Versions of Python and of `PACKAGES` in this process; packages that are not installed are left out."""
    if not _own:
        from importlib import metadata  # 25 ms, spared in processes that are told (`adopt_versions`)

        found = {"python": ".".join(map(str, sys.version_info[:3]))}
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                pass
        _own.update(found)
    return dict(_own)


def adopt_versions(found: Mapping[str, str]) -> None:
    """Takes over what the process found that has just started this one, with the same interpreter and search path."""
    _own.update(found)


def version_warnings(peer: str, theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    """At most one line, for people: which versions differ between `peer` and this node."""
    differing = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in ("python", *PACKAGES)
        if name in theirs and name in ours and _relevant(name, theirs[name]) != _relevant(name, ours[name])
    ]
    if not differing:
        return []
    return [f"versions differ between {peer} (there) and the node that it connected to (here): {'; '.join(differing)}"]


def same_python(theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """Both sides run the same minor version of Python (or the peer does not say)."""
    there = theirs.get("python")
    return there is None or _relevant("python", there) == _relevant("python", ours["python"])


def _relevant(name: str, version: str) -> str:
    # Patch releases of Python exchange code and pickles without trouble.
    return ".".join(version.split(".")[:2]) if name == "python" else version
