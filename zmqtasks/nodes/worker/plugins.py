"""Plugins and files that clients have registered for all workers, as one worker has them.

All that is done about them is done in one thread, in the order in which the scheduler has said so: code of users must not
hold the node's loop, and a plugin may rely on those before it. Coroutines run on the loop of async tasks.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from zmqtasks.errors import NodeStartError
from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.uploads import Uploads
from zmqtasks.protocol.failures import describe_exception
from zmqtasks.protocol.ops import CallFinished, PlaceFile, SetUpPlugin, TearDownPlugin
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.node import WorkerNode

logger = logging.getLogger(__name__)

PluginOp: TypeAlias = PlaceFile | SetUpPlugin | TearDownPlugin

FILE_PREFIX = "file "
"""What the names of files begin with among those of plugins."""
_OWN_FRAMES = 3


class Plugins:
    """The plugins of `worker`; `report` gets each answer, in the thread of the plugins."""

    def __init__(self, worker: WorkerNode, report: Callable[[CallFinished], None]) -> None:
        self.active: dict[str, Any] = {}
        """Those that are set up, by name, in order."""
        self._worker = worker
        self._report = report
        self._uploads = Uploads(worker.directory.path, worker.executor.forget_functions)
        self._files: dict[str, bool] = {}
        """Whether each is to be imported."""
        self._not_placed: dict[str, Exception] = {}
        self._queue: queue.SimpleQueue[PluginOp | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._required = 0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- for the loop -----------------------------------------------------------------------------------------------

    def do(self, op: PluginOp) -> None:
        """Does it as soon as what came before is done."""
        self._queue.put(op)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="zmqtasks-plugins", daemon=True)
            self._thread.start()

    async def wait_set_up(self, count: int) -> None:
        """Waits until `count` plugins that the worker cannot do without are set up; raises NodeStartError when one fails."""
        self._required = count
        if count:
            await self._ready

    async def close(self, timeout_s: float) -> None:
        """Tears all down, the last one first, and removes the files; what takes longer than `timeout_s` is left alone."""
        self._fail(NodeStartError("the worker was told to end"))
        if self._thread is None:
            return
        self._queue.put(None)
        done = asyncio.Event()
        threading.Thread(target=self._await_end, args=(self._thread, done), daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                await done.wait()
        except TimeoutError:
            logger.warning("plugins of worker %s are not torn down within %g s", self._worker.name, timeout_s)

    def _await_end(self, thread: threading.Thread, done: asyncio.Event) -> None:
        thread.join()
        self._in_loop(done.set)

    def _in_loop(self, call: Callable[[], object]) -> None:
        try:
            self._worker.loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed
            return

    def _fail(self, error: NodeStartError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may wait

    def _one_ready(self, error: NodeStartError | None) -> None:
        self._required -= 1
        if error is not None:
            self._fail(error)
        elif self._required == 0 and not self._ready.done():
            self._ready.set_result(None)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        context.local.worker = self._worker
        while (op := self._queue.get()) is not None:
            if isinstance(op, PlaceFile):
                self._place(op)
                continue
            error = None
            try:
                if isinstance(op, SetUpPlugin):
                    self._set_up(op)
                else:
                    self._tear_down(op.name)
            except BaseException as exc:  # as in tasks: SystemExit ends the call, not the node
                error = exc
            if not op.call and error is not None:
                logger.error("%s of the plugin %r failed", type(op).__name__, op.name, exc_info=error)
            if op.call:
                data = serialize_inline(None) if error is None else describe_exception(error, _OWN_FRAMES)[1]
                self._report(CallFinished(op.call, data, error is not None))
            if isinstance(op, SetUpPlugin) and op.required:
                self._tell_required(op, error)
            del op, error
        for name in reversed(list(self.active)):
            try:
                self._tear_down(name)
            except BaseException:
                logger.exception("teardown of the plugin %r failed", name)
        self._uploads.close()

    def _tell_required(self, op: SetUpPlugin, error: BaseException | None) -> None:
        failure = None
        if error is not None:
            what = op.name if op.name.startswith(FILE_PREFIX) else f"plugin {op.name!r}"
            text = f"{type(error).__name__}: {error}"
            failure = NodeStartError(f"setup of {what}, which a client has registered, failed on this worker: {text}")
            failure.__cause__ = error
        self._in_loop(lambda: self._one_ready(failure))

    def _place(self, op: PlaceFile) -> None:
        self._not_placed.pop(op.name, None)
        try:
            content, self._files[op.name] = deserialize_inline(op.content)
            self._uploads.place(op.name.removeprefix(FILE_PREFIX), content)
        except Exception as exc:  # told with the answer to the `SetUpPlugin` that follows
            self._not_placed[op.name] = exc

    def _set_up(self, op: SetUpPlugin) -> None:
        if not op.content:
            self._load_file(op.name)
            return
        plugin = deserialize_inline(op.content)
        if op.name in self.active:
            try:
                self._tear_down(op.name)
            except Exception:
                logger.exception("teardown of the former plugin %r failed", op.name)
        self._call(plugin, "setup")
        self.active[op.name] = plugin

    def _load_file(self, name: str) -> None:
        if (problem := self._not_placed.pop(name, None)) is not None:
            raise problem
        if self._files[name]:
            self._uploads.load(name.removeprefix(FILE_PREFIX))

    def _tear_down(self, name: str) -> None:
        if name in self._files:
            del self._files[name]
            self._uploads.remove(name.removeprefix(FILE_PREFIX))
        elif name in self.active:
            self._call(self.active.pop(name), "teardown")

    def _call(self, plugin: Any, method: str) -> None:
        function = getattr(plugin, method, None)
        if function is None:
            return
        result = function(self._worker)
        if inspect.isawaitable(result):
            asyncio.run_coroutine_threadsafe(_awaited(result), self._worker.executor.task_loop()).result()


async def _awaited(result: Any) -> None:
    await result
