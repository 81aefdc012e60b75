"""What all parts of the conformance suite stand on: links to test, peer processes, skipping by declaration."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ClassVar

import pytest

from zmqtasks.protocol.frames import DATA_LIMITS
from zmqtasks.testing.comms import DEADLINE_S, wait_until
from zmqtasks.transports import (
    PLAIN,
    Comm,
    Encryption,
    LinkSettings,
    Listener,
    Transport,
    connect,
    get_transport,
    listen,
)

OPEN = LinkSettings(limits=DATA_LIMITS)
"""Settings for comms that take messages of any size."""

ENCRYPTED = Encryption(secret=b"known to both ends of the link, ", same_host=True)
"""For tests, whose links all stay on one host."""


def _default_loop_factory() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


class ConformanceBase:
    """Hooks for the author of a transport; override them in the subclass."""

    scheme: ClassVar[str]
    """The scheme under which the transport is registered."""

    encryption: ClassVar[Encryption] = PLAIN
    """For transports that encrypt: a second subclass has `ENCRYPTED` here."""

    loop_factory: ClassVar[Callable[[], asyncio.AbstractEventLoop]] = staticmethod(_default_loop_factory)

    test_timeout_s: ClassVar[float] = 60.0
    """Bound on each test, as a whole."""

    frozen_heartbeat_s: ClassVar[float] = LinkSettings().heartbeat_s
    """`heartbeat_s` of the links whose peer is stopped for 10 s."""

    sends_huge_frames: ClassVar[bool] = True
    """False leaves out a frame of more than 4 GiB, which takes long; for a second subclass of a transport."""

    stranger_timeout_s: ClassVar[float] = 15.0
    """A listener hangs up within this on bytes that are not its protocol."""

    memory_slack_bytes: ClassVar[int] = 96 << 20
    """What a process may take, beyond the marks of `LinkSettings`, for buffers of libraries and kernel."""

    @property
    def transport(self) -> Transport:
        """The transport under test."""
        return get_transport(self.scheme)

    def listen_address(self, host: str = "127.0.0.1") -> str:
        """An address to listen at, free at any time."""
        return f"{self.scheme}://{host}:0" if self.transport.capabilities.uses_ip else f"{self.scheme}://"

    def needs(self, **capabilities: bool) -> None:
        """Skips the running test when the transport declares other than `capabilities`."""
        for name, wanted in capabilities.items():
            if getattr(self.transport.capabilities, name) != wanted:
                pytest.skip(f"the transport {self.scheme!r} declares {name}={not wanted}")

    def encrypting(self, settings: LinkSettings) -> LinkSettings:
        """`settings` with the encryption of this class, unless they have one of their own."""
        if settings.encryption is not PLAIN:
            return settings
        return dataclasses.replace(settings, encryption=self.encryption)

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Runs `test` in a new event loop; fails when it leaves tasks behind."""

        async def bounded() -> None:
            async with asyncio.timeout(self.test_timeout_s):
                await test
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await wait_until(lambda: all(task.done() for task in others), f"tasks were left behind: {others}", 5)

        with asyncio.Runner(loop_factory=type(self).loop_factory) as runner:
            runner.run(bounded())
        gc.collect()  # a descriptor that nobody closed is told here (ResourceWarning), not in a later test

    @contextlib.asynccontextmanager
    async def listening(
        self, on_comm: Callable[[Comm], None], settings: LinkSettings = OPEN, host: str = "127.0.0.1"
    ) -> AsyncIterator[Listener]:
        """A listener, closed in the end."""
        listener = await listen(self.listen_address(host), on_comm, self.encrypting(settings))
        try:
            yield listener
        finally:
            await listener.close()

    @contextlib.asynccontextmanager
    async def link(
        self, settings: LinkSettings = OPEN, listener_settings: LinkSettings | None = None, host: str = "127.0.0.1"
    ) -> AsyncIterator[tuple[Comm, Comm]]:
        """Both ends of a new link, not started: the caller's and the listener's; aborted in the end."""
        arrivals: asyncio.Queue[Comm] = asyncio.Queue()
        async with self.listening(arrivals.put_nowait, listener_settings or settings, host) as listener:
            ours = await connect(listener.address, self.encrypting(settings))
            try:
                theirs = await _soon(arrivals.get())
                try:
                    yield ours, theirs
                finally:
                    await end(theirs)
            finally:
                await end(ours)

    @contextlib.asynccontextmanager
    async def peer_process(
        self, role: str, settings: LinkSettings = OPEN, prefix: tuple[str, ...] = (), host: str = "127.0.0.1"
    ) -> AsyncIterator[tuple[Comm, PeerProcess]]:
        """This side's comm, not started, with `zmqtasks.testing.peer` in `role`; see there."""
        if role.startswith("listen-"):
            async with PeerProcess(role, self.listen_address(host), self.encrypting(settings), prefix) as peer:
                comm = await connect(await peer.first_line(), self.encrypting(settings))
                try:
                    yield comm, peer
                finally:
                    await end(comm)
            return
        arrivals: asyncio.Queue[Comm] = asyncio.Queue()
        async with (
            self.listening(arrivals.put_nowait, settings, host) as listener,
            PeerProcess(role, listener.address, self.encrypting(settings), prefix) as peer,
        ):
            assert await peer.first_line() == "connected"
            comm = await _soon(arrivals.get())
            try:
                yield comm, peer
            finally:
                await end(comm)


async def end(comm: Comm) -> None:
    """Ends a comm at once and frees what it holds."""
    comm.abort("end of the test")
    await comm.close()


async def _soon(wait: Awaitable[Comm]) -> Comm:
    async with asyncio.timeout(DEADLINE_S):
        return await wait


class PeerProcess:
    """A process that runs `zmqtasks.testing.peer`; killed when the block is left."""

    def __init__(self, role: str, address: str, settings: LinkSettings, prefix: tuple[str, ...] = ()) -> None:
        module = [sys.executable, "-m", "zmqtasks.testing.peer", role, address]
        self._command = [*prefix, *module, "--heartbeat", str(settings.heartbeat_s)]
        self._secret = settings.encryption.secret
        if self._secret is not None:
            self._command.append("--encrypted")
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> PeerProcess:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        if self._secret is not None:
            self._process.stdin.write(self._secret.hex().encode() + b"\n")
        self._process.stdin.close()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()

    @property
    def pid(self) -> int:
        """The process number."""
        return self._process.pid

    async def first_line(self) -> str:
        """The address the peer listens at, or "connected"."""
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = (await self._process.stdout.readline()).decode().strip()
        assert line, "the peer process died at its start; see its standard error"
        return line

    async def last_words(self, timeout_s: float = DEADLINE_S) -> str:
        """How the peer's comm ended; waits for its exit."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            rest = (await self._process.stdout.read()).decode().strip()
            await self._process.wait()
        return rest.splitlines()[-1] if rest else ""

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process."""
        os.kill(self._process.pid, number)
