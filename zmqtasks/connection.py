"""The life of a client: finds its scheduler, connects, closes; synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Generator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from zmqtasks import sessions
from zmqtasks.cluster_view import ClusterView
from zmqtasks.config import Config, load_config
from zmqtasks.errors import ConfigError
from zmqtasks.fetching import in_async_task, parse_timeout
from zmqtasks.nodes.client.loop import shared_loop
from zmqtasks.nodes.client.node import ClientNode
from zmqtasks.protocol.compression import check_mode
from zmqtasks.publishing import Publishing
from zmqtasks.security import Security, default_key_path, wait_for_key
from zmqtasks.submission import Submitter

if TYPE_CHECKING:
    from zmqtasks.client import Client

CLOSE_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 2.0


class Connection(ClusterView, Publishing):
    """What `Client` is besides its methods for tasks and data; see there."""

    def __init__(
        self,
        address: Any = None,
        *,
        scheduler_file: str | os.PathLike[str] | None = None,
        timeout: float | str | None = None,
        asynchronous: bool = False,
        name: str | None = None,
        security: Security | None = None,
        set_as_default: bool = True,
        config: Config | None = None,
        shows_output: bool = True,
        worker: bytes = b"",
        **cluster_options: Any,
    ) -> None:
        if cluster_options and (address is not None or scheduler_file is not None):
            names = ", ".join(sorted(cluster_options))
            raise ConfigError(f"{names}: for a new LocalCluster only; leave them out, or leave out the address")
        self.asynchronous = asynchronous
        self.cluster: Any = None
        self._owned_cluster: Any = None
        self._address = address
        self._scheduler_file = scheduler_file
        self._cluster_options = cluster_options
        self._timeout_s = parse_timeout(timeout)
        self._name = name or f"client-{socket.gethostname()}-{os.getpid()}"
        self._security = security
        self._set_as_default = set_as_default
        self._config = config or load_config()
        check_mode(self._config.compression)
        self._shows_output = shows_output
        self._worker = worker
        self.status = "newly-created"
        if not asynchronous:
            self._start_sync()

    # Beginning and end

    def _start_sync(self) -> None:
        address, security = self._find_scheduler()
        loop_thread = shared_loop()
        try:
            node = self._make_node(address, security, loop_thread)
            loop_thread.run(lambda: node.start(self._timeout_s or 0.0))
        except BaseException:
            self._close_owned()
            raise
        self._connected(node)

    async def _start_async(self) -> Self:
        if self.status != "newly-created":
            return self
        self.status = "connecting"
        if self._address is None and self._scheduler_file is None:
            self._owned_cluster = self.cluster = await _local_cluster(asynchronous=True, **self._cluster_options)
            self._address = self.cluster
        try:
            if self._timeout_s:  # files may have to be waited for
                address, security = await asyncio.to_thread(self._find_scheduler)
            else:
                address, security = self._find_scheduler()
            node = self._make_node(address, security, None)
            await node.start(self._timeout_s or 0.0)
        except BaseException:
            self.status = "closed"
            if self._owned_cluster is not None:
                await self._owned_cluster.close()
            raise
        self._connected(node)
        return self

    def _find_scheduler(self) -> tuple[str, Security]:
        """Its address, and the key for it; makes a cluster when nothing was given."""
        target, security = self._address, self._security
        if self._scheduler_file is not None:
            from zmqtasks.scheduler_file import wait_scheduler_file
            from zmqtasks.security import ClusterKey

            content = wait_scheduler_file(self._scheduler_file, self._timeout_s or 0.0)
            key = ClusterKey.from_hex(content.key) if content.key else None
            return (target if isinstance(target, str) else content.address), security or Security(
                key, content.encryption or None
            )
        if target is None:
            self._owned_cluster = self.cluster = target = _local_cluster(**self._cluster_options)
        if isinstance(target, str):
            target = target if "://" in target else f"tcp://{target}"
            return target, security or self._default_security(target)
        address = getattr(target, "scheduler_address", None)
        if not isinstance(address, str):
            raise ConfigError(
                f"address={target!r}: give 'tcp://host:port', 'unix://name', 'zmq://host:port', or a cluster"
            )
        self.cluster = target
        return address, security or getattr(target, "security", None) or Security.default()

    def _default_security(self, address: str) -> Security:
        if address.startswith("inproc:"):
            return Security.none()
        if self._timeout_s:  # a scheduler that starts at the same time makes the key first
            return Security(wait_for_key(default_key_path(), self._timeout_s))
        return Security.default()

    def _make_node(self, address: str, security: Security, loop_thread: Any) -> ClientNode:
        config = self._config
        if self._timeout_s is not None:
            config = replace(config, connect_timeout_s=self._timeout_s, handshake_timeout_s=self._timeout_s)
        return ClientNode(
            address,
            security=security,
            config=config,
            name=self._name,
            loop_thread=loop_thread,
            # What tasks print in this process is on its terminal already.
            shows_output=self._shows_output and not address.startswith("inproc:"),
            worker=self._worker,
        )

    def _connected(self, node: ClientNode) -> None:
        node.client = self
        self._node = node
        self._submitter = Submitter(node)
        self.status = "running"
        sessions.opened(cast("Client", self), self._set_as_default)

    def __await__(self) -> Generator[Any, None, Self]:
        if not self.asynchronous:
            raise TypeError("this client is synchronous: leave out the `await`, or make it with asynchronous=True")
        return self._start_async().__await__()

    async def __aenter__(self) -> Self:
        if not self.asynchronous:
            raise TypeError("this client is synchronous: use `with`, or make it with asynchronous=True")
        return await self._start_async()

    async def __aexit__(self, *_: object) -> None:
        await self._close_async()

    def __enter__(self) -> Self:
        if self.asynchronous:
            raise TypeError("this client is asynchronous: use `async with`")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout: float | str | None = None) -> Any:
        """Leaves the cluster; pending futures are cancelled. Closes the LocalCluster that the client has made. Idempotent.

        >>> client.close()
        """
        if self.asynchronous:
            return self._close_async()
        self._close_sync(CLOSE_TIMEOUT_S if timeout is None else parse_timeout(timeout))
        return None

    def _close_sync(self, timeout_s: float | None) -> None:
        if self.status in ("closed", "newly-created"):
            return
        self.status = "closed"
        sessions.closed(cast("Client", self))
        try:
            assert self._node.loop_thread is not None
            self._node.loop_thread.run(self._node.close, timeout_s)
        except TimeoutError:  # the goodbye could not be sent: the scheduler notices
            pass
        finally:
            self._close_owned()

    async def _close_async(self) -> None:
        if self.status in ("closed", "newly-created"):
            return
        self.status = "closed"
        sessions.closed(cast("Client", self))
        await self._node.close()
        if self._owned_cluster is not None:
            await self._owned_cluster.close()

    def _close_owned(self) -> None:
        cluster, self._owned_cluster = self._owned_cluster, None
        if cluster is not None:
            cluster.close()

    def _close_at_exit(self) -> None:
        if not self.asynchronous:
            self._close_sync(EXIT_TIMEOUT_S)

    def shutdown(self) -> Any:
        """Ends workers and scheduler, and closes this client.

        >>> client.shutdown()  # doctest: +SKIP
        """
        self._node.check_usable()
        self._tell_shutdown()
        if self.asynchronous:
            return self._shutdown_async()
        cluster = self.cluster
        self.close()
        if cluster is not None:
            cluster.close()
        return None

    async def _shutdown_async(self) -> None:
        cluster = self.cluster
        await self._close_async()
        if cluster is not None and isinstance(closing := cluster.close(), Awaitable):
            await closing

    @property
    def usable(self) -> bool:
        """Whether it is connected, or about to be again."""
        return self.status == "running" and self._node.error is None and not self._node.loop.is_closed()

    @property
    def address(self) -> str:
        """The scheduler's address."""
        return self._node.address

    @property
    def name(self) -> str:
        """What the scheduler calls this client."""
        return self._name

    def _called_asynchronously(self) -> bool:
        return self.asynchronous or in_async_task()


def _local_cluster(**options: Any) -> Any:
    from zmqtasks.deploy.local import LocalCluster

    return LocalCluster(**options)
