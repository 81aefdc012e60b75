"""Compression on data links over real sockets: when, when not, both ways, and peers that lie about it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.links import CONFIG, SECURITY, listening, run, until
from tests.nodes.test_data import Store, blob, pool_of
from zmqtasks.errors import LimitExceededError
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes import data_packing, links
from zmqtasks.nodes.channel import DataServer
from zmqtasks.protocol import compression, ops
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.compression import BLOCK_BYTES, Counters
from zmqtasks.protocol.frames import DATA_LIMITS, KIB, MIB
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, serialize
from zmqtasks.transports import Comm, LinkSettings, connect, listen
from zmqtasks.transports.host_memory import available_memory_bytes

BETWEEN_PROCESSES = ["tcp", "zmq"]
every_link = pytest.mark.parametrize("scheme", BETWEEN_PROCESSES)


@every_link
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_forced_compression_goes_both_ways(scheme: str, codec: str) -> None:
    async def main() -> None:
        store = Store()
        server = store.server()
        config = dataclasses.replace(CONFIG, compression=codec)
        async with listening(scheme, config=config, data_server=server) as (_, address):
            pool = pool_of(compression=codec)
            array = np.arange(5 * MIB // 8)
            noise = os.urandom(2 * MIB)
            await pool.put(address, [("x", serialize(array)), ("n", Payload(b"h", [memoryview(noise)])), (1, blob(10))])
            stored = store.values["x"]
            assert isinstance(stored, Payload)
            np.testing.assert_array_equal(deserialize(stored), array)
            fetched = await pool.get(address, ["x", "n", 1, "gone"])
            received = deserialize(fetched.values["x"])
            np.testing.assert_array_equal(received, array)
            received[0] = 1  # memory of its own
            assert received.ctypes.data % 64 == 0
            assert bytes(fetched.values["n"].frames[0]) == noise
            assert fetched.missing == ["gone"]
            counted = pool.about(address).compression
            assert counted == pool.compression.as_dict()
            for side in (pool.compression, server.compression):
                assert (side.compressed, side.declined_by_sample, side.declined_by_rate) == (1, 1, 0)
                assert side.decompressed == 1
                assert side.bytes_in == array.nbytes
                assert 0 < side.bytes_out < 0.8 * array.nbytes
            await pool.close()

    run(main())


@pytest.mark.parametrize(
    ("scheme", "mode"),
    [(scheme, mode) for scheme in ("tcp", "zmq", "unix", "shm", "inproc") for mode in ("auto", "off")]
    + [(scheme, "lz4") for scheme in ("unix", "shm", "inproc")],
)
def test_links_within_a_host_are_left_alone(scheme: str, mode: str) -> None:
    """Asking for a codec compresses on loopback, for tests of it; where no byte can leave the host it means nothing."""

    async def main() -> None:
        store = Store()
        server = store.server()
        config = dataclasses.replace(CONFIG, compression=mode)
        async with listening(scheme, config=config, data_server=server) as (_, address):
            pool = pool_of(compression=mode)
            await pool.put(address, [(1, blob(4 * MIB))])
            await pool.get(address, [1])
            assert not any(pool.compression.as_dict().values())
            assert not any(server.compression.as_dict().values())
            await pool.close()

    run(main())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each frame that is sampled."""
    looks: list[int] = []
    sampled_ratio = compression.sampled_ratio

    def counting(frame: memoryview, codec: compression.Codec) -> float:
        looks.append(frame.nbytes)
        return sampled_ratio(frame, codec)

    monkeypatch.setattr(compression, "sampled_ratio", counting)
    return looks


def test_data_that_does_not_shrink_as_its_samples_is_not_looked_at_each_time(looks: list[int]) -> None:
    async def main() -> None:
        store = Store()
        noise = bytearray(os.urandom(2 * MIB))
        for tenths in (1, 3, 5, 7, 9):  # where samples are taken
            middle = len(noise) * tenths // 10
            noise[middle - 10_000 : middle + 10_000] = bytes(20_000)
        store.values["noise"] = Payload(b"h", [memoryview(noise)])
        server = store.server()
        config = dataclasses.replace(CONFIG, compression="lz4")
        async with listening("tcp", config=config, data_server=server) as (_, address):
            pool = pool_of()
            for _ in range(20):
                await pool.get(address, ["noise"])
            assert server.compression.as_dict() == Counters(declined_by_sample=20).as_dict()
            assert compression.sampled_ratio(memoryview(noise), compression.available()["lz4"]) < 0.1
            assert len(looks) <= 7
            await pool.close()

    run(main())


def test_data_that_does_not_shrink_is_not_looked_at_each_time(looks: list[int]) -> None:
    async def main() -> None:
        store = Store()
        store.values["noise"] = Payload(b"h", [memoryview(os.urandom(256 * KIB))])
        store.values["text"] = blob(256 * KIB)
        server = store.server()
        async with listening("tcp", config=dataclasses.replace(CONFIG, compression="lz4"), data_server=server) as (
            _,
            address,
        ):
            pool = pool_of()
            for _ in range(20):
                await pool.get(address, ["noise"])
            assert 2 <= len(looks) <= 4
            assert server.compression.as_dict() == Counters(declined_by_sample=20).as_dict()
            for _ in range(40):  # 10 MiB: past what the declines above may spare
                await pool.get(address, ["text"])
            assert server.compression.compressed > 20
            await pool.close()

    run(main())


def test_a_peer_that_cannot_read_a_codec_is_not_sent_it() -> None:
    async def main() -> None:
        store = Store()
        store.values["x"] = blob(4 * MIB)
        config = dataclasses.replace(CONFIG, compression="zstd")
        async with listening("tcp", config=config, data_server=store.server()) as (_, address):
            for codecs, columns in ([], ([], [])), (["lz4"], ([], [])), (["zstd"], (["zstd"], [4 * MIB])):
                asking = await Raw.dial(address, codecs)
                asking.comm.send([Codec(ops.DataRequest).encode(0, 0, [ops.GetData(1, ["x"])])])
                await until(lambda asking=asking: asking.messages)
                (sent,) = Codec(ops.DataReply).decode_untrusted(asking.messages[0][0])[2]
                assert (sent.codecs, sent.raw_sizes) == columns
                await asking.comm.close()

    run(main())


def test_messages_keep_their_order_behind_one_that_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small values that follow a large compressed one are handled after it, though the link is paused meanwhile."""
    monkeypatch.setattr(data_packing, "AHEAD_BYTES", 1)

    async def main() -> None:
        order: list[object] = []
        store = Store()
        server = data_server_of(store, order)
        async with listening("tcp", data_server=server) as (_, address):
            pool = pool_of(compression="lz4")
            large = asyncio.ensure_future(pool.put(address, [("large", blob(64 * MIB))]))
            await until(lambda: pool.compression.compressed)
            await asyncio.gather(large, *(pool.put(address, [(number, blob(10))]) for number in range(50)))
            assert order == ["large", *range(50)]
            await pool.close()

    run(main())


def data_server_of(store: Store, order: list[object]) -> DataServer:
    def write(items: list[tuple[object, Payload]]) -> None:
        order.extend(key for key, _ in items)

    return DataServer(store.read, write)


class Raw:
    """The asking side of a data link, by hand."""

    def __init__(self) -> None:
        self.messages: list[list[memoryview]] = []
        self.ended: Exception | None = None

    @classmethod
    async def dial(cls, address: str, codecs: list[str]) -> Raw:
        raw = cls()
        request = LinkRequest(ops.DataIntroduction("raw", codecs), new_instance_id(), b"")
        dialed = await links.dial(address, request, security=SECURITY, config=CONFIG, limits=DATA_LIMITS)
        raw.comm = dialed.comm
        raw.comm.set_handler(raw)
        raw.comm.resume_receiving()
        return raw

    def message_received(self, frames: list[memoryview]) -> None:
        self.messages.append(frames)

    def comm_ended(self, error: Exception) -> None:
        self.ended = error


BLOCKS = b"\x05\0\0\0hello"
ZEROS = struct.pack("<I", 5000) + bytes(5000)
RAW_5 = b"".join((struct.pack("<I", len(block := compression.Zstd().compress(memoryview(b"hello")))), block))
LIES = [
    ("an unknown codec", ["gzip"], [5], [BLOCKS], "compressed by 'gzip'"),
    ("a column too short", [], [5], [BLOCKS], "1 frames with 0 codecs and 1 sizes"),
    ("a column too long", ["lz4", ""], [5, 0], [BLOCKS], "1 frames with 2 codecs"),
    ("no size", ["lz4"], [0], [BLOCKS], "compressed frame of 0 bytes"),
    ("a size of a plain frame", [""], [7], [BLOCKS], "size of 7 bytes for a frame that is not compressed"),
    ("a size beyond memory", ["lz4"], [1 << 60], [BLOCKS], "75% of the memory here"),
    ("sizes that are beyond memory together", ["zstd"] * 2, [5, 1 << 46], [RAW_5, BLOCKS], "75% of the memory here"),
    ("a block too few", ["lz4"], [2 * BLOCK_BYTES], [ZEROS], "1 blocks for a frame of"),
    ("a block of nothing", ["lz4"], [5], [bytes(4)], "block of 0 bytes for 5"),
    ("a truncated block", ["lz4"], [5], [BLOCKS[:-1]], "8 bytes in 1 blocks"),
    ("a small block of nonsense", ["lz4"], [5], [BLOCKS], "a block"),
    ("a large block of nonsense", ["zstd"], [BLOCK_BYTES], [ZEROS], "block that zstd cannot read"),
]


@pytest.mark.parametrize(("codecs", "sizes", "frames", "says"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_lies_about_compression_end_the_link(
    codecs: list[str], sizes: list[int], frames: list[bytes], says: str
) -> None:
    async def main() -> None:
        store = Store()
        async with listening("tcp", data_server=store.server()) as (_, address):
            asking = await Raw.dial(address, [])
            op = ops.PutData(1, ["x"], [b"h"], [1], codecs, sizes)
            asking.comm.send([Codec(ops.DataRequest).encode(0, 0, [op]), *frames])
            await until(lambda: asking.ended)
            (goodbye,) = Codec(ops.DataReply).decode_untrusted(asking.messages[-1][0])[2]
            assert says in goodbye.reason
            await asking.comm.close()
            assert store.values == {}

    run(main())


def test_a_message_of_honest_blocks_for_more_than_the_memory_is_refused() -> None:
    block = compression.Zstd().compress(memoryview(bytes(BLOCK_BYTES)))
    count = available_memory_bytes() // BLOCK_BYTES // 2
    frame = memoryview((struct.pack("<I", len(block)) + block) * count)
    size = count * BLOCK_BYTES
    half, whole = (ops.PutData(1, ["x"] * n, [b"h"] * n, [1] * n, ["zstd"] * n, [size] * n) for n in (1, 2))
    assert data_packing._packed_untrusted([half], [memoryview(b""), frame]) is half
    with pytest.raises(LimitExceededError, match="75% of the memory here"):
        data_packing._packed_untrusted([whole], [memoryview(b""), frame, frame])


def test_values_pass_while_the_threads_of_the_loop_wait_for_them() -> None:
    """As in `asyncio.gather(*[asyncio.to_thread(future.result) for future in futures])`."""

    async def main() -> None:
        store = Store()
        config = dataclasses.replace(CONFIG, compression="lz4")
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as threads:
            loop.set_default_executor(threads)
            async with listening("tcp", config=config, data_server=store.server()) as (_, address):
                pool = pool_of(compression="lz4")

                async def back_and_forth() -> int:
                    await pool.put(address, [(1, blob(4 * MIB))])
                    return (await pool.get(address, [1])).values[1].frames[0].nbytes

                waiting = asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(back_and_forth(), loop).result(10))
                assert await waiting == 4 * MIB
                assert pool.compression.compressed == pool.compression.decompressed == 1
                await pool.close()

    run(main())


FORKED = """
import os, sys
from zmqtasks.nodes import data_packing

def unpacked():
    return data_packing._threads().submit(len, b"12345").result(10)

assert unpacked() == 5
child = os.fork()
if child == 0:
    try:
        os._exit(0 if unpacked() == 5 else 1)
    finally:
        os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_codec_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_link_that_ends_while_an_answer_is_unpacked_gives_the_answer() -> None:
    async def main() -> None:
        store = Store()
        store.values["x"] = blob(64 * MIB)
        config = dataclasses.replace(CONFIG, compression="lz4")
        server = store.server()
        async with listening("tcp", config=config, data_server=server) as (_, address):
            pool = pool_of()
            asked = asyncio.ensure_future(pool.get(address, ["x"]))
            await until(lambda: server.compression.compressed)
            await server.close()
            fetched = await asked
            assert fetched.values["x"].frames[0].nbytes == 64 * MIB
            await pool.close()

    run(main())


def test_each_reason_for_a_pause_must_be_over_before_more_is_received() -> None:
    async def main() -> None:
        arrived: asyncio.Future[Comm] = asyncio.get_running_loop().create_future()
        listener = await listen("inproc://pauses", arrived.set_result, LinkSettings(limits=DATA_LIMITS))
        asking = await connect(listener.address, LinkSettings(limits=DATA_LIMITS))
        comm = await arrived
        handled: list[bytes] = []
        inbox = data_packing.Inbox(
            comm,
            lambda batch, frames: handled.append(bytes(frames[0])),
            lambda error: None,
            lambda count: None,
        )

        class Handler:
            def message_received(self, frames: list[memoryview]) -> None:
                inbox.received_untrusted((), frames)

            def comm_ended(self, error: Exception) -> None:
                pass

        comm.start(Handler())
        inbox.pause()
        inbox.pause()
        asking.send([b"held"])
        inbox.resume()
        asking.send([b"held too"])
        for _ in range(3):
            await asyncio.sleep(0)  # inproc delivers in the next turn of the loop
        assert handled == []
        inbox.resume()
        await until(lambda: handled == [b"held", b"held too"])
        await asking.close()
        await comm.close()
        await listener.close()

    run(main())
