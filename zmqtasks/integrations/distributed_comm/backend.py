"""Connector, listener and addresses, as `distributed.comm` wants them of a backend."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import BaseListener, CommClosedError, Connector, FatalCommClosedError
from distributed.comm.registry import Backend
from distributed.comm.utils import ensure_concrete_host
from distributed.utils import ensure_ip, get_ip, get_ipv6

from zmqtasks.config import Config, load_config
from zmqtasks.errors import AuthenticationError, CommError, ProtocolError, SecurityError, VersionMismatchError
from zmqtasks.integrations.distributed_comm.comm import LinkComm
from zmqtasks.integrations.distributed_comm.frames import FrameLink, FrameListener, connect
from zmqtasks.integrations.distributed_comm.security import link_security
from zmqtasks.transports.address import format_host_port

_log = logging.getLogger(__name__)

_EVERY_INTERFACE = "0.0.0.0"


class LinkConnector(Connector):  # type: ignore[misc]
    """Dials listeners of one scheme."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> LinkComm:
        """A comm to `host:port`.

        Raises OSError (which distributed tries again), FatalCommClosedError when the two sides do not have the same key or
        do not speak the same version (which it does not), ValueError for what is no address.
        """
        host, port = parse_host_port(address)
        full = format_host_port(self._scheme, host, port)
        try:
            link = await connect(full, link_security(connection_args, create=False), _config())
        except (AuthenticationError, VersionMismatchError, SecurityError) as exc:
            raise FatalCommClosedError(str(exc)) from exc
        except ProtocolError as exc:
            raise CommClosedError(str(exc)) from exc
        return LinkComm(link, link.comm.local_address, full, deserialize)


class LinkListener(BaseListener):  # type: ignore[misc]
    """Listens at one address of one scheme, and serves each comm by `comm_handler` in a task of its own."""

    def __init__(
        self,
        scheme: str,
        address: str,
        comm_handler: Callable[[LinkComm], Any],
        deserialize: bool = True,
        allow_offload: bool = True,
        default_host: str | None = None,
        default_port: int = 0,
        **connection_args: Any,
    ) -> None:
        super().__init__()
        self.prefix = f"{scheme}://"
        """Workers of distributed read it."""
        self._scheme = scheme
        self._host, self._port = parse_host_port(address, default_port)
        self._comm_handler = comm_handler
        self._deserialize = deserialize
        self._allow_offload = allow_offload
        self._default_host = default_host
        self._security = link_security(connection_args, create=True)
        self._listener: FrameListener | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        listener = FrameListener(self._on_link, self._security, _config())
        try:
            bound = await listener.start(format_host_port(self._scheme, self._host or _EVERY_INTERFACE, self._port))
        except CommError as exc:
            if isinstance(exc.__cause__, OSError) and exc.__cause__.errno is not None:
                raise OSError(exc.__cause__.errno, str(exc)) from exc  # EADDRINUSE: distributed tries the next port
            raise
        self._listener = listener
        self._port = parse_host_port(bound)[1]

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def get_host_port(self) -> tuple[str, int]:
        """Where it listens; raises ValueError unless it does."""
        if self._listener is None:
            raise ValueError(f"a listener over {self._scheme} that was not started, or was stopped, has no address")
        return self._host or _EVERY_INTERFACE, self._port

    @property
    def listen_address(self) -> str:
        return format_host_port(self._scheme, *self.get_host_port())

    @property
    def contact_address(self) -> str:
        host, port = self.get_host_port()
        return format_host_port(self._scheme, ensure_concrete_host(host, default_host=self._default_host), port)

    def _on_link(self, link: FrameLink) -> None:
        if self._listener is None:
            link.abort()
            return
        comm = LinkComm(link, link.comm.local_address, link.comm.peer_address, self._deserialize)
        comm.allow_offload = self._allow_offload
        task = asyncio.get_running_loop().create_task(self._serve(comm))
        self._tasks.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, comm: LinkComm) -> None:
        try:
            await self.on_connection(comm)
        except CommClosedError:
            _log.info("%s closed the link before it had introduced itself", comm.peer_address)
            return
        except asyncio.CancelledError:
            comm.abort()
            raise
        answer = self._comm_handler(comm)
        if inspect.isawaitable(answer):
            await answer

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the handler of a comm at %s:%s failed", self._host, self._port, exc_info=error)


class LinkBackend(Backend):  # type: ignore[misc]
    """A backend whose addresses are `host:port`, over the transport of `scheme`."""

    scheme: str

    def get_connector(self) -> LinkConnector:
        return LinkConnector(self.scheme)

    def get_listener(self, loc: str, handle_comm: Any, deserialize: bool, **connection_args: Any) -> LinkListener:
        return LinkListener(self.scheme, loc, handle_comm, deserialize, **connection_args)

    def get_address_host(self, loc: str) -> str:
        host: str = parse_host_port(loc)[0]
        return host

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        host_port: tuple[str, int] = parse_host_port(loc)
        return host_port

    def resolve_address(self, loc: str) -> str:
        host, port = parse_host_port(loc)
        resolved: str = unparse_host_port(ensure_ip(host), port)
        return resolved

    def get_local_address_for(self, loc: str) -> str:
        host = ensure_ip(parse_host_port(loc)[0])
        local: str = unparse_host_port(get_ipv6(host) if ":" in host else get_ip(host))
        return local


class ZmqBackend(LinkBackend):
    """`zmq://host:port`."""

    scheme = "zmq"


def _config() -> Config:
    """The user's settings, with distributed's time-outs.

    distributed names its listeners by address, so nothing is found nearby, and compresses by itself.
    """
    return dataclasses.replace(
        load_config(),
        connect_timeout_s=_seconds("distributed.comm.timeouts.connect"),
        heartbeat_s=_seconds("distributed.comm.timeouts.tcp"),
        shared_memory=False,
        compression="off",
    )


def _seconds(setting: str) -> float:
    return float(parse_timedelta(dask.config.get(setting), default="seconds"))
