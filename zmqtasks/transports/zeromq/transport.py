"""`ZmqTransport`: connecting and listening over ZeroMQ."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import zmq

from zmqtasks.errors import ConnectError, ConnectionRefusedByPeerError, ConnectTimeoutError, PeerIdentityError
from zmqtasks.transports.address import HostPort, format_host_port, parse_host_port
from zmqtasks.transports.base import Capabilities, Comm, LinkSettings, Listener, Transport
from zmqtasks.transports.sockets import connect_socket, connectable_host, is_loopback, listening_socket, resolve
from zmqtasks.transports.zeromq.dealer import DealerComm, HandshakeCutError, NotConnectedError, OtherMechanismError
from zmqtasks.transports.zeromq.greeting import mechanism_at
from zmqtasks.transports.zeromq.router import Router
from zmqtasks.transports.zeromq.sockets import LOOPBACK_BUFFER_BYTES


class ZmqListener(Listener):
    """Accepts comms through a `Router` until closed; made by `ZmqTransport`."""

    def __init__(self, router: Router) -> None:
        self.address = router.address
        self._router = router
        self._closed = False

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._router.stop_listening()

    def stop(self) -> None:
        if not self._closed:
            self._closed = True
            self._router.stop_nowait()


class ZmqTransport(Transport):
    """Frames over ZeroMQ, between any two hosts.

    With a secret in the settings, links are encrypted by CURVE. ZeroMQ settles that for a whole listener, before anybody
    calls: one at a loopback address is plain (unless links on this host are to be encrypted too), one at any other address
    is encrypted for all callers. A caller that finds a loopback address encrypted dials once more and encrypts; nobody
    ever falls back to plain.
    """

    scheme = "zmq"
    capabilities = Capabilities(
        crosses_hosts=True,
        crosses_processes=True,
        encrypts=True,
        shares_memory=False,
        detects_cut_link=True,
        uses_ip=True,
        untrusted_peers=True,
    )

    def __init__(self) -> None:
        self._routers: dict[tuple[str, int], Router] = {}

    async def connect(self, address: str, settings: LinkSettings) -> Comm:
        where = parse_host_port(address)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                return await _connect(where, settings)
        except TimeoutError as exc:
            raise ConnectTimeoutError(
                f"nothing answered at {address} within {settings.connect_timeout_s:g} s: is a node running there, "
                f"does it listen with zmq, and does a firewall let it be reached?"
            ) from exc
        except ConnectionRefusedError as exc:
            raise ConnectionRefusedByPeerError(f"nobody listens at {address}: is the node running?") from exc
        except zmq.ZMQError as exc:
            raise ConnectError(f"no link to {address}: {exc}{_hint(exc)}") from exc
        except ConnectError:
            raise
        except OSError as exc:
            raise ConnectError(f"no link to {address}: {exc.strerror or exc}") from exc

    async def listen(self, address: str, on_comm: Callable[[Comm], None], settings: LinkSettings) -> Listener:
        where = parse_host_port(address, default_port=0)
        _family, target = (await resolve(where))[0]
        router = self._routers.get(target[:2])
        loop = asyncio.get_running_loop()
        if (
            router is None
            or router.on_comm is not None
            or router.loop is not loop
            or router.secret != _secret_for(target[0], settings)
        ):
            router = await self._bind(where, settings)
        router.listen(on_comm, settings)
        return ZmqListener(router)

    async def _bind(self, where: HostPort, settings: LinkSettings) -> Router:
        sock = await listening_socket(where)
        try:
            bound = sock.getsockname()[:2]
            host = connectable_host(bound[0], sock.family)
            address = format_host_port(self.scheme, host, bound[1])
            secret = _secret_for(bound[0], settings)
            if is_loopback(bound[0]):  # connections inherit them
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOOPBACK_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOOPBACK_BUFFER_BYTES)
            router = Router(sock, address, self.scheme, settings, secret, self._forget)
        except zmq.ZMQError as exc:
            raise ConnectError(f"cannot listen at {where}: {exc}{_hint(exc)}") from exc
        finally:
            sock.close()  # unless it was handed to ZeroMQ
        self._routers[bound] = router
        return router

    def _forget(self, router: Router) -> None:
        for name, known in list(self._routers.items()):
            if known is router:
                del self._routers[name]


async def _connect(where: HostPort, settings: LinkSettings) -> Comm:
    """A comm to the first address of a host that answers; each but the last gets its share of the time."""
    targets = await resolve(where)
    failure: Exception = ConnectionRefusedError()
    for index, (_family, target) in enumerate(targets):
        share_s = settings.connect_timeout_s / (len(targets) - index)
        try:
            async with asyncio.timeout(share_s if index < len(targets) - 1 else None):
                return await _dial(where, target[0], settings)
        except OSError as exc:  # TimeoutError and ConnectError are such
            failure = exc
    raise failure


def _secret_for(numeric_host: str, settings: LinkSettings) -> bytes | None:
    """What links at an address are encrypted by."""
    return None if is_loopback(numeric_host) and not settings.encryption.same_host else settings.encryption.secret


async def _dial(where: HostPort, numeric_host: str, settings: LinkSettings) -> Comm:
    secret = _secret_for(numeric_host, settings)
    try:
        return await _open(where, numeric_host, settings, secret)
    except OtherMechanismError:
        if secret is not None:
            raise ConnectError(
                f"{where} does not encrypt this link, and this side does: --encryption must be the same"
            ) from None
    if settings.encryption.secret is None:
        raise ConnectError(
            f"{where} takes encrypted links only, and this side does not encrypt: --encryption must be the same"
        )
    try:
        return await _open(where, numeric_host, settings, settings.encryption.secret)
    except OtherMechanismError:
        raise ConnectError(f"{where} changes its mind about encryption: try again") from None


async def _open(where: HostPort, numeric_host: str, settings: LinkSettings, secret: bytes | None) -> Comm:
    target = HostPort(where.scheme, numeric_host, where.port)
    comm = DealerComm(where, numeric_host, settings, secret)
    try:
        await comm.wait_accepted()
    except NotConnectedError:
        comm.abort()
        # ZeroMQ does not say why: the kernel does, asked once more.
        sock = await connect_socket(target, settings.connect_timeout_s)
        sock.close()
        raise ConnectionRefusedByPeerError(f"{where} did not take the connection at first: try again") from None
    except HandshakeCutError:
        comm.abort()
        raise await _why_cut(where, target, settings, encrypted=secret is not None) from None
    except BaseException:
        comm.abort()
        raise
    return comm


async def _why_cut(where: HostPort, target: HostPort, settings: LinkSettings, *, encrypted: bool) -> Exception:
    """What to raise when a listener has hung up in the midst of the handshake."""
    try:
        mechanism = await mechanism_at(target, settings.connect_timeout_s)
    except OSError:  # it is gone
        mechanism = None
    match mechanism, encrypted:
        case ("NULL", True) | ("CURVE", False):
            return OtherMechanismError()
        case "CURVE", True:
            return PeerIdentityError(
                f"no encrypted link to {where}: it does not have this side's cluster key "
                f"(the CURVE handshake failed): both must use the same"
            )
    return ConnectionRefusedByPeerError(f"{where} hung up: is a zmqtasks node over zmq there?")


def _hint(exc: zmq.ZMQError) -> str:
    return " (raise the limit of open files, ulimit -n)" if exc.errno == errno.EMFILE else ""
