"""Code of the user that a worker process runs before it takes tasks: `--preload`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from zmqtasks.errors import NodeStartError

logger = logging.getLogger(__name__)


class Preloads:
    """Modules that a worker process has loaded, in the order given; each `dask_setup(worker)` ran before the worker
    joined, each `dask_teardown(worker)` runs when it ends, the last module's first. Both may be `async`.

    Names that end in `.py` are files, all others modules. `set_up` raises NodeStartError, with the name of the preload,
    for whatever goes wrong in it: a worker without what its tasks need is none.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._ready: list[tuple[str, ModuleType]] = []

    async def set_up(self, worker: Any) -> None:
        for name in self._names:
            try:
                module = _load(name)
                await _call(module, "dask_setup", worker)
            except Exception as exc:
                logger.debug("preload %r failed", name, exc_info=True)
                raise NodeStartError(f"the preload {name!r} failed: {type(exc).__name__}: {exc}") from exc
            self._ready.append((name, module))

    async def tear_down(self, worker: Any) -> None:
        """Errors are logged: the others have their turn, and the worker ends."""
        while self._ready:
            name, module = self._ready.pop()
            try:
                await _call(module, "dask_teardown", worker)
            except Exception:
                logger.exception("dask_teardown of the preload %r failed", name)


def _load(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that tasks find it by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


async def _call(module: ModuleType, hook: str, worker: Any) -> None:
    function = getattr(module, hook, None)
    if function is None:
        return
    result = function(worker)
    if inspect.isawaitable(result):
        await result
