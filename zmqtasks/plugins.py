"""Code and files that every worker is to have: `Client.register_plugin`, `Client.upload_file`, `WorkerPlugin`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from zmqtasks.errors import ConfigError, PluginError
from zmqtasks.nodes.client.failures import error_to_exception
from zmqtasks.nodes.client.loop import Work
from zmqtasks.protocol.frames import MIB
from zmqtasks.protocol.ops import ErrorInfo, RegisterPlugin, RunFinished, UnregisterPlugin
from zmqtasks.protocol.serialize import serialize_inline

if TYPE_CHECKING:
    from zmqtasks.nodes.client.node import ClientNode

FILE_PREFIX = "file "
SUFFIXES = (".py", ".zip", ".egg", ".whl")
LARGEST_FILE_BYTES = 64 * MIB
"""Files go through the scheduler, which keeps them for workers that join later."""


class WorkerPlugin:
    """Code that runs on every worker: `setup` before the first task, `teardown` at the end.

    To be derived from; any object with these methods will do. The object is pickled, and each worker has a copy of its
    own: `get_worker().plugins[name]` inside of tasks. Both methods may be `async`: they run on the loop of async tasks.

    >>> class Connection(WorkerPlugin):
    ...     name = "database"
    ...     def setup(self, worker):
    ...         self.database = connect()
    ...     def teardown(self, worker):
    ...         self.database.close()
    >>> client.register_plugin(Connection())
    """

    name: str
    """What it is called; a plugin of the same name takes its place. Without one each registration has a name of its own."""
    idempotent: bool = False
    """Whether nothing is to be done when a plugin of its name is registered already."""

    def setup(self, worker: Any) -> Any:
        """Called once on each worker, before it runs tasks; `worker` is what `get_worker()` gives."""

    def teardown(self, worker: Any) -> Any:
        """Called when the plugin is unregistered or replaced, and when the worker ends in good order."""


class PluginRegistry:
    """Methods of a client by which all workers get plugins and files."""

    _node: ClientNode

    def _sync(self, work: Work[Any]) -> Any:
        raise NotImplementedError

    def register_plugin(self, plugin: Any, name: str | None = None, idempotent: bool | None = None) -> Any:
        """Sets a plugin up on every worker: on those of now, and on later ones before their first task.

        Also on workers that were started again. Plugins are set up in the order in which they were registered; one with the
        name of an older one takes its place. Objects made for dask.distributed's WorkerPlugin will do, except that their
        `transition` is never called. See `WorkerPlugin`.

        Raises PluginError, which names the worker, with the plugin's own error as its cause, when `setup` fails on one of the
        workers; then all is as before: it is torn down where it was set up, and one that it had replaced is set up again. A
        worker on which it fails later, when it joins, ends with that error. Raises TypeError for what is no plugin for workers.

        >>> client.register_plugin(Connection())  # doctest: +SKIP
        {'tcp://127.0.0.1:40123': {'status': 'OK'}}
        """
        _check_plugin(plugin)
        own_name = getattr(plugin, "name", None)
        name = name or own_name or f"{type(plugin).__name__}-{uuid4().hex}"
        if not isinstance(name, str):
            raise TypeError(f"name={name!r}: the name of a plugin is a text")
        once = bool(getattr(plugin, "idempotent", False)) if idempotent is None else idempotent
        content = serialize_inline(plugin)
        return self._sync(
            lambda: self._tell_workers(
                lambda request: RegisterPlugin(request, name, content, idempotent=once), f"setup of the plugin {name!r}"
            )
        )

    def unregister_plugin(self, name: str) -> Any:
        """Tears a plugin down on every worker; later ones will not get it.

        Raises ConfigError (a ValueError) when there is none of that name, PluginError when `teardown` fails.

        >>> client.unregister_plugin("database")  # doctest: +SKIP
        {'tcp://127.0.0.1:40123': {'status': 'OK'}}
        """
        return self._sync(
            lambda: self._tell_workers(
                lambda request: UnregisterPlugin(request, name), f"teardown of the plugin {name!r}"
            )
        )

    register_worker_plugin = register_plugin
    unregister_worker_plugin = unregister_plugin

    def upload_file(self, filename: str | os.PathLike[str], load: bool = True) -> Any:
        """Gives a file with Python code to every worker, where tasks can import it: those of now, and later ones.

        `filename` is a module (`.py`), or packages in an archive (`.zip`, `.egg`, `.whl`). With `load` workers import
        it at once. A file of the same name takes the place of an older one: tasks that start after this has returned see the
        new code. The files are in the workers' own directories, and go away with them.

        Raises FileNotFoundError; ConfigError for other kinds of files, and those larger than 64 MiB; PluginError, which names
        the worker, when it cannot be imported there: then workers do not have it, but the file that it was to replace.

        >>> client.upload_file("helpers.py")  # doctest: +SKIP
        {'tcp://127.0.0.1:40123': {'status': 'OK'}}
        """
        path = Path(filename)
        content = serialize_inline((_read_checked(path), load))
        name = FILE_PREFIX + path.name
        what = f"import of the uploaded file {path.name}" if load else f"upload of {path.name}"
        return self._sync(
            lambda: self._tell_workers(lambda request: RegisterPlugin(request, name, content, is_file=True), what)
        )

    async def _tell_workers(self, make: Any, what: str) -> dict[str, dict[str, str]]:
        done: dict[str, dict[str, str]] = {}
        failed: PluginError | None = None
        for answer in await self._node.requests.collect(make):
            if not answer.worker:
                raise ConfigError(answer.error)
            if answer.erred:
                failed = failed or _failure(answer, what)
            else:
                done[answer.worker] = {"status": "OK"}
        if failed is not None:
            raise failed
        return done


def _failure(answer: RunFinished, what: str) -> PluginError:
    cause = error_to_exception(ErrorInfo("exception", f"{what} failed", answer.result))
    error = PluginError(f"{what} failed on worker {answer.worker}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _check_plugin(plugin: Any) -> None:
    kinds = {base.__name__ for base in type(plugin).__mro__}
    if isinstance(plugin, type):
        raise TypeError(f"{plugin!r} is a class: register an object of it")
    if "SchedulerPlugin" in kinds:
        raise TypeError(f"{plugin!r} is for the scheduler, which runs no user code here: make it a plugin for workers")
    if "NannyPlugin" in kinds:
        raise TypeError(
            f"{plugin!r} is for nannies, which take no plugins here: make it a plugin for workers, "
            "or use `--preload` for what has to come before everything else"
        )
    if not callable(getattr(plugin, "setup", None)) and not callable(getattr(plugin, "teardown", None)):
        raise TypeError(f"{plugin!r} is no plugin: it has neither setup(worker) nor teardown(worker)")
    for base in type(plugin).__mro__:
        if "transition" in vars(base):
            if not base.__module__.startswith("distributed."):
                warnings.warn(f"{base.__qualname__}.transition is never called by zmqtasks", stacklevel=3)
            break


def _read_checked(path: Path) -> bytes:
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{str(path)!r} cannot be uploaded: modules (.py) and packages ({', '.join(SUFFIXES[1:])}) can; "
            "for data use Client.scatter"
        )
    if path.suffix == ".py" and not path.stem.isidentifier():
        raise ConfigError(f"{str(path)!r} cannot be uploaded: {path.stem!r} is not a name that can be imported")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise ConfigError(
                f"{str(path)!r} has {size / MIB:.0f} MiB, more than the {LARGEST_FILE_BYTES // MIB} that can be uploaded: "
                "install it on the workers, or put it where they all can read it"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"upload_file: there is no file {str(path.absolute())!r}") from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a directory: make a .zip of it") from None
