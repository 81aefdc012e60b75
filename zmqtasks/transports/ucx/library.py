"""Loads UCX, and moves single buffers by it: the only place that touches `ucxx`.

UCX reads its settings from the environment when it is loaded, when a context and when a worker is made. Ours are set for
that long only, where the user has set none, so that children do not inherit them.

A buffer that is being sent or filled is referenced here until UCX says that it is done with it, whatever becomes of the
link: UCX holds no reference of its own, and writes into memory that was freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from zmqtasks.errors import AddressError

_log = logging.getLogger(__name__)

_SETTINGS = {
    # Without it `sm,tcp,self` silently takes tcp, as shared memory could not tell of a dead peer.
    "UCX_MM_ERROR_HANDLING": "y",
    "UCX_KEEPALIVE_INTERVAL": "1s",
    # Both ends shall seldom wait for each other, and over shared memory find in the cache what the other has written: of half or
    # of twice as many elements (of 8 KiB) some sizes are slower. Segments over tcp have 8 KiB by default, at a third of the
    # bandwidth (`python -m bench.network.baselines_ucx`).
    "UCX_MM_FIFO_SIZE": "512",
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_RNDV_THRESH": "auto",  # importing ucxx sets 8192 otherwise
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
_LOOK_S = 0.005
"""While something is under way, UCX is asked so often at least: a wake-up that does not come then costs this much, and
is no hang."""
_LOOK_FOR_ENDS_S = 1.0
"""Likewise while nobody uses it, for connections that the peer has ended."""

_STEPS = 64
"""Of UCX' work before the loop has its turn: about a millisecond."""
_WATCHED = 8
"""Requests that are looked at after each step: the oldest are done first."""

_SPARE_DESCRIPTORS = 64
"""What must be left when UCX is begun with: it takes 6 to 10, and one for each connection."""

_OURS = ("UCX_", "UCXPY_", "RAPIDS_")
_RESOURCE = re.compile(r"^#.*resource.*md.*dev.*flags.*$", re.MULTILINE)
_KINDS = {"sm": ("posix", "sysv", "cma", "xpmem", "knem"), "shm": ("posix", "sysv", "cma", "xpmem", "knem")}

_Request = tuple[Any, memoryview, Callable[[Exception | None], None], Any]
"""What UCX is at, the memory it must not lose, who wants to know, and the endpoint that sends."""

_Received = Callable[[int, Exception | None], None]

_lock = threading.RLock()
"""Held while the environment is ours, and around `_workers`: loops of several threads may come at the same time."""
_context: Any = None
_workers: dict[asyncio.AbstractEventLoop, UcxWorker] = {}


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Our settings of UCX are in force: needed where a context or a worker is made."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_OURS)}
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(_OURS) and name not in before]:
            del os.environ[name]
        os.environ.update(before)


class UnreachableError(Exception):
    """UCX has no transport that leads to a peer."""


def load() -> Any:
    """The context of this process; raises AddressError where `ucxx` is not installed or finds nothing to work with."""
    global _context
    with _lock:
        if _context is None:
            try:
                with environment():
                    from ucxx._lib import libucxx

                    _context = libucxx.UCXContext({}, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
            except ImportError as exc:
                raise AddressError(f"ucx:// needs the package ucxx: pip install 'zmqtasks[ucx]' ({exc})") from exc
            except Exception as exc:  # whatever ucxx raises for a wrong UCX_TLS
                raise AddressError(f"UCX does not start: {exc}; see UCX_TLS and UCX_NET_DEVICES") from exc
            _tell_transports(active_transports())
        return _context


def active_transports() -> set[str]:
    """The transports that UCX may use in this process once it is loaded, by its own names (`tcp`, `posix`, `rc_mlx5`, ...)."""
    return {line.split()[-1].split("/")[0] for line in _RESOURCE.findall(_context.info)}


def _tell_transports(active: set[str]) -> None:
    _log.info("UCX uses %s", ", ".join(sorted(active)) or "nothing")
    asked = os.environ.get("UCX_TLS", "all")
    if asked == "all" or asked.startswith("^"):
        return
    for name in asked.split(","):
        if not any(found.startswith(_KINDS.get(name, (name,))) for found in active):
            _log.warning(
                "UCX_TLS asks for %s, which this UCX does not have: it uses %s", name, ", ".join(sorted(active))
            )


def take_worker(loop: asyncio.AbstractEventLoop) -> UcxWorker:
    """The worker of `loop`, shared by its comms; each gives it back by `release`.

    Raises OSError when the process is about to have no descriptors left, ucxx' errors when UCX makes no worker.
    """
    with _lock:
        for other in [other for other in _workers if other.is_closed()]:
            del _workers[other]
        worker = _workers.get(loop)
        if worker is None:
            _check_descriptors()
            worker = _workers[loop] = UcxWorker(loop)
        worker.take()
        return worker


def _check_descriptors() -> None:
    """UCX (1.21) that cannot accept a connection closes its listener, and logs of that without end, in a thread that spins."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and len(os.listdir("/proc/self/fd")) + _SPARE_DESCRIPTORS > most:
        raise OSError(errno.EMFILE, f"fewer than {_SPARE_DESCRIPTORS} of {most} descriptors are left (ulimit -n)")


class UcxWorker:
    """What of UCX belongs to one event loop; it sleeps in the loop's selector while nothing moves."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        from ucxx._lib import arr, libucxx

        self.users = 0
        self._loop = loop
        self._lib = libucxx
        self._array = arr.Array
        with _lock, environment():
            self._worker = libucxx.UCXWorker(load(), enable_delayed_submission=False, enable_python_future=False)
        self._worker.init_blocking_progress_mode()
        self._descriptor: int = self._worker.epoll_file_descriptor
        self.address = bytes(libucxx.UCXAddress.create_from_worker(self._worker))
        self._requests: list[_Request] = []
        self._awaited: dict[int, deque[tuple[memoryview, _Received]]] = {}
        self._scheduled = False
        self._stuck = False
        self._ended = False
        self._look: asyncio.TimerHandle | None = None

    def take(self) -> None:
        """One more comm needs the worker."""
        if self.users == 0:
            self._stop_looking()  # so seldom
            if not self._stuck:  # one that has stayed still listens
                self._loop.add_reader(self._descriptor, self._pump)
        self.users += 1

    def endpoint(self, address: bytes) -> Any:
        """An endpoint to the worker of that address, which comes from a peer that has authenticated.

        Raises UnreachableError where the two have no transport in common, ucxx' errors for what is no address.
        """
        made = self._lib.UCXAddress.create_from_buffer(address)
        try:
            return self._lib.UCXEndpoint.create_from_worker_address(self._worker, made, True)
        except self._lib.UCXUnreachableError as exc:
            raise UnreachableError(str(exc)) from exc

    def send(self, endpoint: Any, tag: int, data: memoryview, done: Callable[[Exception | None], None]) -> None:
        """Sends `data`; `done` is called later, in the loop."""
        request = endpoint.tag_send(self._array(data), self._lib.UCXXTag(tag))
        self._requests.append((request, data, done, endpoint))
        self._schedule()

    def receive(self, tag: int, memories: Iterable[memoryview], done: _Received) -> None:
        """Fills each of `memories` by a transfer under `tag`, in order, after those of earlier calls.

        `done(size, error)` is called in the loop, for each. UCX gets a memory when the transfer has been announced to it, with the
        right size: what never comes, or is forgotten by then, never has a hold on memory. All that are announced are under way at
        the same time.
        """
        self._awaited.setdefault(tag, deque()).extend((memory, done) for memory in memories)
        self._schedule()

    def forget(self, tag: int) -> None:
        """Nothing is awaited under `tag` any more."""
        if awaited := self._awaited.pop(tag, None):
            awaited.clear()

    def close_endpoint(self, endpoint: Any) -> None:
        """Drops the endpoint and what is under way on it."""
        self._stuck = self._stuck or any(entry[3] is endpoint and not entry[0].completed for entry in self._requests)
        try:
            endpoint.close_blocking()
        except Exception as exc:
            _log.debug("an endpoint of UCX did not close: %s", exc)
        self._schedule()

    def release(self) -> None:
        """A comm needs the worker no more; it ends with the last.

        Not so when something is under way that may never end, as an endpoint was closed that had sends, or the peer was killed
        in the midst of some: ucxx (0.52) holds the worker of such for good, and UCX may still write. So that this happens once
        for each loop, and not for each such link, the worker stays, and is used again. Meanwhile it listens: its connections
        end when the peer's do, and somebody has to look.
        """
        self.users -= 1
        if self.users:
            return
        self._stop_looking()
        self._worker.progress()
        self._take_unasked()
        self._requests = [entry for entry in self._requests if not entry[0].completed]
        if self._stuck or self._requests:
            self._stuck = True
            self._schedule()
            return
        self._loop.remove_reader(self._descriptor)
        self._ended = True
        with _lock:
            _workers.pop(self._loop, None)
        self._worker = None

    def _take_unasked(self) -> None:
        """Receives what was announced and nobody has asked for, as far as it comes at once.

        Else ucxx (0.52) receives it when the worker is destroyed, and waits for it: for ever where the peer was killed.
        """
        whatever = self._lib.UCXXTag(0), self._lib.UCXXTagMask(0)
        while (found := self._worker.tag_probe(*whatever, remove=True)).matched:
            memory = memoryview(bytearray(found.length))
            request = self._worker.tag_recv_with_handle(self._array(memory), found)
            self._requests.append((request, memory, _not_asked, None))
            self._worker.progress()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump_again)

    def _pump_again(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        if self._ended:
            return
        more = self._work()
        self._post_announced()
        finished: list[_Request] = []
        pending: list[_Request] = []
        for entry in self._requests:
            (finished if entry[0].completed else pending).append(entry)
        self._requests = pending
        for request, _memory, done, _endpoint in finished:
            error: Exception | None = None
            try:
                request.check_error()
            except Exception as exc:
                error = exc
            done(error)
        if self._ended:
            return
        if more or finished or not self._worker.arm():
            self._schedule()
        elif self._look is None and (self._requests or self._awaited or not self.users):
            self._look = self._loop.call_later(_LOOK_S if self.users else _LOOK_FOR_ENDS_S, self._look_again)

    def _work(self) -> bool:
        """Lets UCX move bytes; whether it may have more to do.

        Not until all is done (`progress`): that can be all that is under way at once, and then UCX has nothing until each end has
        heard of it. So the first request that is done makes room for the next, while the others go on.
        """
        progress_once, oldest = self._worker.progress_once, self._requests[:_WATCHED]
        for _ in range(_STEPS):
            if not progress_once():
                return False
            for entry in oldest:
                if entry[0].completed:
                    return True
        return True

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_again(self) -> None:
        self._look = None
        self._pump()

    def _post_announced(self) -> None:
        for tag, awaited in list(self._awaited.items()):
            while awaited and (found := self._worker.tag_probe(self._lib.UCXXTag(tag), remove=False)).matched:
                memory, done = awaited[0]
                if found.length != memory.nbytes:  # it stays where it is: what is taken out must be received
                    self.forget(tag)
                    done(0, ValueError(f"it transferred {found.length} bytes where it had announced {memory.nbytes}"))
                    if self._ended:
                        return
                    break
                awaited.popleft()
                found = self._worker.tag_probe(self._lib.UCXXTag(tag), remove=True)
                request = self._worker.tag_recv_with_handle(self._array(memory), found)
                self._requests.append((request, memory, partial(done, memory.nbytes), None))
            if not awaited:
                self.forget(tag)


def _not_asked(error: Exception | None) -> None:
    """Who wants to know of what `_take_unasked` has taken."""
