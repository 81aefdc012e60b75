"""What dask.distributed asks of a comm, asked of ours; links go through real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import pickle
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

distributed = pytest.importorskip("distributed")

from distributed.comm import (  # noqa: E402
    CommClosedError,
    connect,
    get_address_host,
    get_local_address_for,
    listen,
    resolve_address,
)
from distributed.comm.addressing import get_address_host_port  # noqa: E402
from distributed.comm.core import FatalCommClosedError  # noqa: E402
from distributed.comm.registry import get_backend  # noqa: E402
from distributed.core import ConnectionPool, Server, Status, rpc  # noqa: E402
from distributed.protocol import Serialized, deserialize, serialize, to_serialize  # noqa: E402
from distributed.security import Security as DistributedSecurity  # noqa: E402
from distributed.utils import get_ip  # noqa: E402

from zmqtasks.integrations.distributed_comm import KeySecurity  # noqa: E402
from zmqtasks.integrations.distributed_comm.frames import UNREAD_BYTES  # noqa: E402
from zmqtasks.security import ClusterKey  # noqa: E402

LOOPBACK = "zmq://127.0.0.1"
DEADLINE_S = 20.0


def run(coroutine: Callable[[], Awaitable[None]]) -> None:
    """Runs a test in a plain asyncio loop, as distributed's nodes do."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await coroutine()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def pair(address: str = LOOPBACK, **kwargs: Any) -> AsyncIterator[tuple[Any, Any]]:
    """The caller's and the listener's comm; the listener has stopped already."""
    arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def on_comm(comm: Any) -> None:
        arrived.set_result(comm)

    async with listen(address, on_comm, **kwargs) as listener:
        ours = await connect(listener.contact_address, **kwargs)
        theirs = await arrived
    try:
        yield ours, theirs
    finally:
        ours.abort()
        theirs.abort()


async def echo(comm: Any) -> None:
    with contextlib.suppress(CommClosedError):
        while True:
            await comm.write(await comm.read())


# --- addresses ------------------------------------------------------------------------------------------------------


def test_addresses_have_parts() -> None:
    assert get_address_host("zmq://127.0.0.1:123") == "127.0.0.1"
    assert get_address_host_port("zmq://1.2.3.4:80") == ("1.2.3.4", 80)
    assert get_address_host_port("zmq://[::1]:80") == ("::1", 80)
    assert resolve_address("zmq://localhost:456") == "zmq://127.0.0.1:456"
    assert resolve_address("zmq://0.0.0.0:456") == "zmq://0.0.0.0:456"
    assert resolve_address("zmq://[::1]:456") == "zmq://[::1]:456"
    assert get_local_address_for("zmq://127.0.0.1:80") == "zmq://127.0.0.1"
    assert get_local_address_for("zmq://8.8.8.8:4444") == f"zmq://{get_ip()}"


@pytest.mark.parametrize(
    ("address", "listening", "contact"),
    [
        ("zmq://127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("zmq://127.0.0.1:0", "127.0.0.1", "127.0.0.1"),
        ("zmq://localhost:0", "localhost", "localhost"),
        ("zmq://0.0.0.0:0", "0.0.0.0", get_ip()),
        ("zmq://", "0.0.0.0", get_ip()),
        ("zmq://:0", "0.0.0.0", get_ip()),
    ],
)
def test_a_listener_is_reached_at_its_contact_address(address: str, listening: str, contact: str) -> None:
    async def test() -> None:
        async with listen(address, echo, xxx="arguments of others are passed over") as listener:
            port = get_address_host_port(listener.listen_address)[1]
            assert listener.listen_address == f"zmq://{listening}:{port}"
            assert listener.contact_address == f"zmq://{contact}:{port}"
            assert port > 1023
            comm = await connect(listener.contact_address, xxx="here too")
            assert comm.peer_address == listener.contact_address
            await comm.write({"op": "ping"})
            assert await comm.read() == {"op": "ping"}
            await comm.close()

    run(test)


def test_a_listener_at_all_interfaces_may_be_given_a_name_for_others() -> None:
    async def test() -> None:
        async with listen("zmq://", echo, default_host="127.0.0.1") as listener:
            assert listener.contact_address.startswith("zmq://127.0.0.1:")

    run(test)


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_ipv6() -> None:
    async def test() -> None:
        async with pair("zmq://[::1]") as (ours, theirs):
            assert ours.peer_address.startswith("zmq://[::1]:")
            assert ours.local_address == theirs.peer_address

    run(test)


def test_both_ends_know_both_addresses() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            assert (ours.peer_address, ours.local_address) == (theirs.local_address, theirs.peer_address)
            assert ours.same_host
            assert theirs.extra_info == {"encrypted": False, "same_host": True}
            for comm in ours, theirs:
                assert comm.local_address in repr(comm)
                assert comm.peer_address in repr(comm)
                assert "closed" not in repr(comm)
            await ours.close()
            assert "closed" in repr(ours)
            await until(theirs.closed)
            assert "closed" in repr(theirs)

    run(test)


def test_a_taken_port_is_said_as_distributed_expects() -> None:
    async def test() -> None:
        async with listen(LOOPBACK, echo) as listener:
            with pytest.raises(OSError, match="port is taken") as refused:
                await listen(listener.listen_address, echo)
            assert refused.value.errno == errno.EADDRINUSE

    run(test)


def test_many_listeners() -> None:
    async def test() -> None:
        listeners = [await listen(address, echo) for address in [LOOPBACK, "zmq://"] * 20]
        assert len({listener.listen_address for listener in listeners}) == len(listeners)
        for listener in listeners:
            listener.stop()

    run(test)


# --- ends -----------------------------------------------------------------------------------------------------------


def test_many_callers_at_once() -> None:
    async def test() -> None:
        async with listen(LOOPBACK, echo) as listener:

            async def call(number: int) -> int:
                comm = await connect(listener.contact_address)
                await comm.write({"data": number})
                answer = await comm.read()
                await comm.close()
                return int(answer["data"])

            assert await asyncio.gather(*map(call, range(50))) == list(range(50))

    run(test)


def test_a_comm_that_the_listener_closes_ends_for_the_caller() -> None:
    async def hang_up(comm: Any) -> None:
        await comm.close()

    async def test() -> None:
        async with listen(LOOPBACK, hang_up) as listener:
            comm = await connect(listener.contact_address)
            with pytest.raises(CommClosedError):
                await comm.read()
            assert comm.closed()
            comm = await connect(listener.contact_address)
            await until(comm.closed)
            with pytest.raises(CommClosedError):
                await comm.write({})

    run(test)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_an_end_reaches_all_readers_and_writers(how: str) -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            reads = [asyncio.create_task(comm.read()) for comm in (ours, theirs)]
            await asyncio.sleep(0)
            await ours.close() if how == "close" else ours.abort()
            for read in reads:
                with pytest.raises(CommClosedError):
                    await read
            for comm in ours, theirs:
                with pytest.raises(CommClosedError):
                    await comm.read()
                with pytest.raises(CommClosedError):
                    await comm.write({})
                assert comm.closed()
            await ours.close()
            await theirs.close()
            ours.abort()

    run(test)


def test_what_was_written_before_a_close_arrives() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            data = os.urandom(1 << 20)
            for number in range(20):
                await ours.write({"number": number, "data": to_serialize(data)})
            closing = asyncio.create_task(ours.close())
            for number in range(20):
                message = await theirs.read()
                assert message["number"] == number
                assert message["data"] == data
            assert theirs.closed() or not closing.done()
            with pytest.raises(CommClosedError):
                await theirs.read()
            await closing

    run(test)


def test_a_close_does_not_wait_for_a_peer_that_is_busy() -> None:
    address: list[str] = []
    got: list[Any] = []
    busy, done = threading.Event(), threading.Event()

    def serve() -> None:
        async def on_comm(comm: Any) -> None:
            got.append(await comm.read())
            busy.set()
            done.wait(DEADLINE_S)  # a task that holds up the loop
            with contextlib.suppress(CommClosedError):
                while True:
                    got.append(await comm.read())

        async def until_done() -> None:
            async with listen(LOOPBACK, on_comm) as listener:
                address.append(listener.contact_address)
                await until(lambda: len(got) == 3)

        run(until_done)

    thread = threading.Thread(target=serve)
    thread.start()

    async def test() -> None:
        await until(lambda: bool(address))
        comm = await connect(address[0])
        await comm.write("first")
        await until(busy.is_set)
        await comm.write("second")
        await comm.write("third")
        began = time.monotonic()
        await comm.close()
        assert time.monotonic() - began < DEADLINE_S / 4
        done.set()
        await asyncio.to_thread(thread.join)

    try:
        run(test)
    finally:
        done.set()
        thread.join()
    assert got == ["first", "second", "third"]


def test_a_read_that_is_given_up_aborts_the_comm() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ours.read(), 0.01)
            assert ours.closed()
            await until(theirs.closed)

    run(test)


def test_nobody_listens() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(OSError, match="Timed out trying to connect"):
            await connect(f"{LOOPBACK}:{port}", timeout=0.15)
        assert time.monotonic() - began >= 0.1
        with pytest.raises(OSError, match="nobody listens"):
            await get_backend("zmq").get_connector().connect(f"127.0.0.1:{port}")

    run(test)


def test_an_address_that_is_none() -> None:
    async def test() -> None:
        with pytest.raises(ValueError, match="missing port"):
            await connect("zmq://127.0.0.1", timeout=1)

    run(test)


def test_whoever_is_connected_to_stays_silent() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="Timed out"):
            await connect(f"{LOOPBACK}:{silent.getsockname()[1]}", timeout=0.2)

    run(test)


def test_a_stranger_who_says_nothing_is_no_comm() -> None:
    async def test() -> None:
        served: list[Any] = []

        async def on_comm(comm: Any) -> None:
            served.append(comm)

        async with listen(LOOPBACK, on_comm) as listener:
            stranger = socket.create_connection(get_address_host_port(listener.contact_address))
            comm = await connect(listener.contact_address)  # the listener goes on
            await until(lambda: len(served) == 1)
            stranger.close()
            comm.abort()
            served[0].abort()

    run(test)


def test_a_stopped_listener_leaves_its_comms_alone_and_its_address_free() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            with pytest.raises(OSError, match="Timed out"):
                await connect(ours.peer_address, timeout=0.2)
            await ours.write("still there")
            assert await theirs.read() == "still there"
            again = await listen(ours.peer_address, echo)
            comm = await connect(again.contact_address)
            await comm.write(1)
            assert await comm.read() == 1
            await comm.close()
            again.stop()
            with pytest.raises(ValueError, match="stopped"):
                _ = again.contact_address

    run(test)


def test_a_comm_that_is_forgotten_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        served: list[Any] = []
        async with listen(LOOPBACK, served.append) as listener:
            comm = await connect(listener.contact_address)
            await until(lambda: bool(served))
        del comm
        gc.collect()
        await until(served[0].closed)

    with caplog.at_level(logging.WARNING):
        run(test)
    assert "Closing dangling link" in caplog.text


def test_a_loop_that_ends_with_comms_open_leaves_no_descriptor() -> None:
    kept: list[Any] = []

    async def test() -> None:
        listener = await listen(LOOPBACK, kept.append)
        kept.append(await connect(listener.contact_address))
        await until(lambda: len(kept) == 2)
        listener.stop()
        await asyncio.sleep(0.01)

    run(test)
    for comm in kept:
        comm.abort()
        assert comm.closed()


def test_loops_of_several_threads_talk_to_each_other() -> None:
    addresses: list[str] = []
    done = threading.Event()

    def serve() -> None:
        async def until_done() -> None:
            async with listen(LOOPBACK, echo) as listener:
                addresses.append(listener.contact_address)
                await asyncio.to_thread(done.wait, DEADLINE_S)

        run(until_done)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()

    async def test() -> None:
        await until(lambda: len(addresses) == len(threads))
        for address in addresses:
            comm = await connect(address)
            await comm.write(address)
            assert await comm.read() == address
            await comm.close()

    try:
        run(test)
    finally:
        done.set()
        for thread in threads:
            thread.join()


# --- messages -------------------------------------------------------------------------------------------------------


def _mixed(data: bytes) -> dict[str, Any]:
    return {"x": data, "to_ser": [to_serialize(data)], "ser": Serialized(*serialize(data))}


@pytest.mark.parametrize("size", [3, 4 << 20])
@pytest.mark.parametrize("wanted", [True, False])
def test_objects_are_deserialized_where_that_is_wanted(wanted: bool, size: int) -> None:
    async def test() -> None:
        data = os.urandom(size)
        async with pair(deserialize=wanted) as (ours, theirs):
            await ours.write(_mixed(data))
            await theirs.write(await theirs.read())  # as a scheduler passes on what it does not look into
            back = await ours.read()
        assert back["x"] == data
        (first,) = back["to_ser"]
        if wanted:
            assert first == back["ser"] == data
        else:
            assert isinstance(back["ser"], Serialized)
            for one in first, back["ser"]:
                assert deserialize(one.header, one.frames) == data

    run(test)


def test_big_arrays_may_be_written_to() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            sent = np.arange(6_000_000.0)
            writing = asyncio.create_task(ours.write({"a": to_serialize(sent), "none": to_serialize(np.empty(0))}))
            message = await theirs.read()
            assert await writing > sent.nbytes
            np.testing.assert_array_equal(message["a"], sent)
            assert message["none"].size == 0
            message["a"] += 1

    run(test)


def _raise_eof() -> None:
    raise EOFError


class _EndsEarly:
    def __reduce__(self) -> Any:
        return _raise_eof, ()


def test_an_eof_error_ends_the_comm() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            await ours.write({"data": to_serialize(_EndsEarly())})
            with pytest.raises(CommClosedError, match="truncated"):
                await theirs.read()
            assert theirs.closed()
            with pytest.raises(CommClosedError):
                await ours.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("distributed.comm.utils"), "disabled", True)
        run(test)


def test_a_writer_waits_for_a_reader_who_does_not_read() -> None:
    async def test() -> None:
        async with pair() as (ours, theirs):
            data = to_serialize(os.urandom(1 << 20))
            written = 0

            async def write() -> None:
                nonlocal written
                for _ in range(200):
                    await ours.write({"data": data})
                    written += 1

            writing = asyncio.create_task(write())
            before = -1
            while written != before:  # it comes to a halt
                before = written
                await asyncio.sleep(0.2)
            assert UNREAD_BYTES >> 20 <= written < 100
            for _ in range(200):
                await theirs.read()
            await writing

    run(test)


# --- what distributed builds on comms -------------------------------------------------------------------------------


def test_servers_pools_and_rpc(tmp_path: Path) -> None:
    async def test() -> None:
        async def double(number: int) -> int:
            return 2 * number

        async def fail() -> None:
            raise KeyError("mine")

        async with contextlib.AsyncExitStack() as stack:
            handlers = {"double": double, "fail": fail}
            servers = [Server(handlers, needs_workdir=False, local_directory=str(tmp_path)) for _ in range(3)]
            for server in servers:
                await server.listen(LOOPBACK)
                stack.push_async_callback(server.close)
            pool = await ConnectionPool(limit=4)
            stack.push_async_callback(pool.close)
            calls = [pool(server.address).double(number=number) for number in range(30) for server in servers]
            assert await asyncio.gather(*calls) == [2 * number for number in range(30) for _ in servers]
            assert pool.open <= 4
            async with rpc(servers[0].address) as remote:
                assert await remote.double(number=21) == 42
                with pytest.raises(KeyError, match="mine"):
                    await remote.fail()
            assert all(server.status == Status.running or server.listener for server in servers)

    run(test)


# --- who gets in ----------------------------------------------------------------------------------------------------


def test_other_keys_are_turned_away_at_once() -> None:
    async def test() -> None:
        security = KeySecurity.temporary()
        served: list[Any] = []
        async with listen(LOOPBACK, served.append, **security.get_listen_args("scheduler")) as listener:
            for stranger in KeySecurity.temporary().get_connection_args("worker"), {}:
                began = time.monotonic()
                with pytest.raises(FatalCommClosedError, match="same key"):
                    await connect(listener.contact_address, timeout=10, **stranger)
                assert time.monotonic() - began < 5
            assert not served
            comm = await connect(listener.contact_address, **security.get_connection_args("client"))
            await until(lambda: len(served) == 1)
            await comm.close()
            await served[0].close()

    run(test)


def test_links_are_encrypted_where_distributed_requires_it() -> None:
    async def test() -> None:
        security = KeySecurity.temporary(require_encryption=True)
        served: list[Any] = []
        async with listen(LOOPBACK, served.append, **security.get_listen_args("scheduler")) as listener:
            comm = await connect(listener.contact_address, **security.get_connection_args("client"))
            assert comm.extra_info["encrypted"]
            await until(lambda: len(served) == 1)
            assert served[0].extra_info["encrypted"]
            await comm.close()
            await served[0].close()
            stranger = {**KeySecurity.temporary().get_connection_args("client"), "require_encryption": False}
            with pytest.raises(FatalCommClosedError, match="cluster key"):
                await connect(listener.contact_address, **stranger)

    run(test)


def test_certificates_are_refused_rather_than_ignored() -> None:
    async def test() -> None:
        security = DistributedSecurity.temporary()
        with pytest.raises(Exception, match="KeySecurity"):
            await listen(LOOPBACK, echo, **security.get_listen_args("scheduler"))
        with pytest.raises(FatalCommClosedError, match="KeySecurity"):
            await connect(f"{LOOPBACK}:1", timeout=5, **security.get_connection_args("client"))

    run(test)


def test_a_key_goes_with_its_security_and_is_not_shown() -> None:
    key = ClusterKey.generate()
    security = KeySecurity(key)
    copy = pickle.loads(pickle.dumps(security))
    assert copy.key == key
    assert isinstance(copy, DistributedSecurity)
    for shown in repr(security), str(security), repr(security.get_connection_args("client")), security._repr_html_():
        assert key.hex() not in shown
