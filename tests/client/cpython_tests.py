"""Finds CPython's own tests of executors: here, and in worker processes that run their functions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_PACKAGE = "test.test_concurrent_futures"
_PARTS = ("executor", "test_wait", "test_as_completed", "test_shutdown")
"""Of the package that it is since Python 3.12; it was one module before."""


def load() -> None:
    """Makes the tests importable. Raises ModuleNotFoundError when this machine has none for this version of Python."""
    import test

    debian = Path(f"/usr/lib/python3.{sys.version_info.minor}/test")  # package libpython3.X-testsuite
    if str(debian) not in test.__path__:
        test.__path__.append(str(debian))
    importlib.import_module(_PACKAGE)


def mixin(name: str) -> Any:
    """The class of that name which has the tests for all kinds of executors."""
    package = importlib.import_module(_PACKAGE)
    if not hasattr(package, "__path__"):
        return getattr(package, name)
    parts = [importlib.import_module(f"{_PACKAGE}.{part}") for part in _PARTS]
    return next(getattr(part, name) for part in parts if hasattr(part, name))
