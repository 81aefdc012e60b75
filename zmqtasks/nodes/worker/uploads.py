"""Files with Python code that clients have sent (`Client.upload_file`): kept in the worker's directory, found by `import`.

Each version of a file has a directory of its own on `sys.path`, in place of the version before. So neither the interpreter's
caches of directories nor compiled files of the same second can show an old version; archives are unpacked, so that
packages find their data files, and compiled modules load.
"""

from __future__ import annotations

import importlib
import io
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SUFFIXES = (".py", ".zip", ".egg", ".whl")
_NOT_IMPORTED = frozenset(("setup", "__main__", "conftest"))
"""Modules at the top of archives that are programs."""

_importing = threading.Lock()
"""Workers in one process have one `sys.modules`."""


class Uploads:
    """The files of one worker. Methods are called one after the other, in one thread.

    `directory` gives the worker's directory; `on_loaded` is called after modules have been imported anew.
    """

    def __init__(self, directory: Callable[[], Path], on_loaded: Callable[[], None]) -> None:
        self._directory = directory
        self._on_loaded = on_loaded
        self._places: dict[str, Path] = {}
        self._versions = 0

    def place(self, name: str, content: bytes) -> None:
        """Writes a file, or unpacks it, and has `import` look there first. Raises OSError and zipfile.BadZipFile."""
        self._versions += 1
        place = self._directory() / "uploads" / str(self._versions)
        place.mkdir(parents=True)
        if name.endswith(".py"):
            (place / Path(name).name).write_bytes(content)
        else:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(place)
        self.remove(name)
        self._places[name] = place
        sys.path.insert(0, str(place))
        importlib.invalidate_caches()

    def load(self, name: str) -> list[str]:
        """Imports the modules of a file, again if they were imported before; gives their names.

        Raises what the import raises; modules that were there before are as before then, but for what a single module
        had executed already.
        """
        place = self._places[name]
        names = [name.removesuffix(".py")] if name.endswith(".py") else _top_level(place)
        if not names:
            raise ImportError(f"{name} has neither a module nor a package at its top level")
        try:
            with _importing:
                for module in names:
                    _import_anew(module)
        finally:
            self._on_loaded()
        return names

    def remove(self, name: str) -> None:
        """Forgets a file; what was imported from it stays."""
        place = self._places.pop(name, None)
        if place is not None:
            if str(place) in sys.path:
                sys.path.remove(str(place))
            sys.path_importer_cache.pop(str(place), None)
            shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Forgets all files."""
        for name in list(self._places):
            self.remove(name)


def _top_level(place: Path) -> list[str]:
    modules = [path.stem for path in place.glob("*.py") if path.stem not in _NOT_IMPORTED]
    return sorted(modules + [path.parent.name for path in place.glob("*/__init__.py")])


def _import_anew(name: str) -> ModuleType:
    """The module as it is on the path now.

    A module without submodules stays the same object, so that who holds it sees its new content. A package is imported from
    the beginning: executing its `__init__` again would leave its submodules as they were.
    """
    module = sys.modules.get(name)
    if module is not None and not hasattr(module, "__path__"):
        return importlib.reload(module)
    before = {other: sys.modules.pop(other) for other in list(sys.modules) if other.split(".", 1)[0] == name}
    try:
        return importlib.import_module(name)
    except BaseException:
        for other in [other for other in sys.modules if other.split(".", 1)[0] == name]:
            del sys.modules[other]
        sys.modules.update(before)
        raise
