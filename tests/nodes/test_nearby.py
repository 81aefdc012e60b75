"""Data between processes of one host: the second reader costs no copy, and shared memory that fails is done without."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import socket
import sys

import numpy as np
import pytest

from tests.links import CONFIG, SECURITY, listening, run, until
from zmqtasks.config import load_config
from zmqtasks.errors import ConfigError
from zmqtasks.ids import Key, new_instance_id
from zmqtasks.nodes.channel import DataPool, DataServer
from zmqtasks.nodes.nearby import bound_arena, nearby_address
from zmqtasks.nodes.worker.store import LASTING_BYTES, Store
from zmqtasks.protocol.frames import MIB
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files and their seals are of Linux")


def pool_of(**changes: float) -> DataPool:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    return DataPool(security=SECURITY, config=config, instance_id=new_instance_id(), name="asking")


def server_of(store: Store) -> DataServer:
    def read(keys: list[Key]) -> list[tuple[Key, Payload | str | None]]:
        return [(key, store.read(key)) for key in keys]

    return DataServer(read, lambda items: [store.put_payload(*item) for item in items])


def test_the_second_reader_gets_the_block_of_the_first() -> None:
    from zmqtasks.transports.shm.own_arena import process_arena

    arena = process_arena()
    assert arena is not None

    async def main() -> None:
        store = Store()
        array = np.arange(4 * MIB // 8)
        store.put_value("array", array, array.nbytes)
        store.put_value("nested", {"a": array + 1, "b": [array + 2]}, 2 * array.nbytes)
        async with listening("shm", data_server=server_of(store)) as (_, address):
            pools = [pool_of() for _ in range(3)]
            for key, size in (("array", 4 * MIB), ("nested", 8 * MIB)):
                before = arena.copied_bytes
                resident = arena.resident_bytes - arena.free_bytes
                got = [deserialize((await pool.get(address, [key])).values[key]) for pool in pools]
                assert arena.copied_bytes - before == size, "the first reader's copy is the only one"
                assert arena.resident_bytes - arena.free_bytes - resident <= size + MIB, "and is counted once"
                if key == "array":
                    got[0][:] = 0
                    assert np.array_equal(got[1], array), "what one reader writes is its own"
                    again = deserialize((await pools[0].get(address, [key])).values[key])
                    assert np.array_equal(again, array)
                    del again
                del got
            held = arena.held_blocks
            assert held == 3
            store.drop(["array", "nested"])
            del array
            gc.collect()
            await until(lambda: arena.held_blocks == 0)
            for pool in pools:
                await pool.close()

    run(main())


def test_only_what_costs_nothing_is_kept_for_the_next_reader() -> None:
    store = Store()
    square = np.ones((1000, 1000))
    store.put_value("whole", square, 1)
    store.put_value("columns", square.T, 1)
    store.put_value("gaps", square[::2, ::3], 1)
    store.put_value("text", "x" * MIB, 1)
    store.put_value("small", np.ones(LASTING_BYTES // 8 - 100), 1)
    same = {}
    for key in store.entries:
        one, other = store.read(key), store.read(key)
        assert isinstance(one, Payload)
        same[key] = one is other
    assert same == {"whole": True, "columns": True, "gaps": False, "text": False, "small": False}


def test_a_name_that_answers_nothing_leaves_the_address() -> None:
    """Somebody listens at the name for shared memory, and never says a word (a stopped process does that)."""

    async def main() -> None:
        store = Store()
        store.put_value("x", np.ones(1000), 8000)
        async with listening("tcp", data_server=server_of(store)) as (_, address):
            nearby = nearby_address(address, CONFIG)
            assert nearby is not None
            with socket.socket(socket.AF_UNIX) as silent:
                silent.bind("\0zmqtasks-shm/" + nearby.removeprefix("shm://"))
                silent.listen()
                pool = pool_of(connect_timeout_s=1.0, handshake_timeout_s=1.0)
                async with asyncio.timeout(10):
                    fetched = await pool.get(address, ["x"])
                assert deserialize(fetched.values["x"]).sum() == 1000
                assert pool.about(address).transport == "tcp"
                await pool.close()

    run(main())


def test_the_bound_of_what_is_lent_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    from zmqtasks.transports.shm.own_arena import default_limit_bytes, process_arena

    arena = process_arena()
    assert arena is not None
    monkeypatch.setattr(arena, "limit_bytes", default_limit_bytes())
    config = load_config({"ZMQTASKS_SHARED_MEMORY_BYTES": str(100 * MIB)})
    bound_arena(config)
    assert arena.limit_bytes == 100 * MIB
    bound_arena(config, 200 * MIB)
    assert arena.limit_bytes == 100 * MIB
    bound_arena(CONFIG, 200 * MIB)
    assert arena.limit_bytes == 50 * MIB


@pytest.mark.parametrize(
    ("wanted", "memory_limit", "said"),
    [
        (1000, 0, "=1000 is less than the 1048576 bytes that lending needs: set ZMQTASKS_SHARED_MEMORY=0"),
        (3 * MIB, 2 * MIB, "=3145728 is more than the memory limit of the worker, 2097152 bytes: lower it"),
        (1 << 60, 0, "is more than this machine can lend, .* bytes: lower it, or leave it at 0"),
    ],
)
def test_a_bound_that_cannot_be_is_explained(wanted: int, memory_limit: int, said: str) -> None:
    config = dataclasses.replace(CONFIG, shared_memory_bytes=wanted)
    with pytest.raises(ConfigError, match=f"ZMQTASKS_SHARED_MEMORY_BYTES.*{said}"):
        bound_arena(config, memory_limit)
