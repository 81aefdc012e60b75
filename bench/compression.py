"""What compression costs and gives: codecs on blocks, and values over a data link with it forced, against none.

    python -m bench.compression

All figures of a line come from the same run, in turns; loopback stands for a link that is faster than any codec, so
the lines show the price, and the one for data that does not shrink the price of looking.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np
import uvloop

from zmqtasks.config import Config
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, DataPool, DataServer
from zmqtasks.protocol import compression
from zmqtasks.protocol.payload import Payload
from zmqtasks.security import ClusterKey, Security

MIB = 1 << 20
ROUNDS = 15


def kinds(size: int) -> dict[str, bytes]:
    """Data that does not shrink, shrinks somewhat, and shrinks well."""
    random = np.random.default_rng(1)
    return {
        "random bytes": random.bytes(size),
        "floats, 3 digits": np.round(random.normal(size=size // 8), 3).tobytes(),
        "steps": (np.arange(size // 8) // 7).tobytes(),
    }


def codecs() -> None:
    """Ratio and rates of each codec, and the time that samples take as a share of a plain copy."""
    size = 16 * MIB
    print(f"{'data':18} {'codec':6} {'ratio':>6} {'pack GB/s':>10} {'unpack GB/s':>12} {'samples us':>11}")
    for kind, raw in kinds(size).items():
        for name, codec in compression.available().items():
            began = time.perf_counter()
            for _ in range(20):
                sampled = compression.sampled_ratio(raw, codec)
            sampling = (time.perf_counter() - began) / 20
            began = time.perf_counter()
            made = compression.compress(raw, codec)
            middle = time.perf_counter()
            if made is None:
                print(f"{kind:18} {name:6} {sampled:6.2f} {'-':>10} {'-':>12} {sampling * 1e6:11.0f}")
                continue
            compression.decompress_untrusted(memoryview(made), name, size, lambda n: memoryview(bytearray(n)))
            pack, unpack = size / (middle - began) / 1e9, size / (time.perf_counter() - middle) / 1e9
            print(f"{kind:18} {name:6} {len(made) / size:6.2f} {pack:10.2f} {unpack:12.2f} {sampling * 1e6:11.0f}")


async def links() -> None:
    """Gets over tcp on loopback, by mode; the median of the rounds, each a few gets of every mode in turn."""
    print(
        f"\n{'data':18} {'MiB':>6} "
        + " ".join(f"{mode + ' GB/s':>11} {'of off':>7}" for mode in ("off", "lz4", "zstd"))
    )
    for size in (MIB // 16, MIB, 16 * MIB, 64 * MIB):
        for kind, raw in kinds(size).items():
            rates = await _rates(raw)
            off = rates["off"]
            ratios = {
                mode: statistics.median(a / b for a, b in zip(each, off, strict=True)) for mode, each in rates.items()
            }
            cells = (f"{statistics.median(each):11.2f} {ratios[mode]:7.3f}" for mode, each in rates.items())
            print(f"{kind:18} {size / MIB:6.2f} " + " ".join(cells))


async def _rates(raw: bytes) -> dict[str, list[float]]:
    security = Security(ClusterKey.generate())
    payload = Payload(b"", [memoryview(raw)])
    ends = []
    rates: dict[str, list[float]] = {}
    for mode in ("off", "lz4", "zstd"):
        config = dataclasses.replace(Config(), compression=mode)
        server = DataServer(lambda keys: [(key, payload) for key in keys], lambda items: None)
        acceptor = Acceptor(
            security=security,
            config=config,
            epoch=0,
            instance_id=new_instance_id(),
            admit=lambda _, peer, server=server: Admission(data_handler=server),
        )
        address = await acceptor.listen("tcp://127.0.0.1:0")
        pool = DataPool(security=security, config=config, instance_id=new_instance_id(), name="bench")
        ends.append((mode, acceptor, server, pool, address))
        rates[mode] = []
    gets = max(1, min(50, 4 * MIB // len(raw)))
    for number in range(ROUNDS + 2):
        for mode, _, _, pool, address in ends:
            began = time.perf_counter()
            for _ in range(gets):
                await pool.get(address, [1])
            if number > 1:
                rates[mode].append(gets * len(raw) / (time.perf_counter() - began) / 1e9)
    for _, acceptor, server, pool, _ in ends:
        await pool.close()
        await server.close()
        await acceptor.close()
    return rates


if __name__ == "__main__":
    codecs()
    uvloop.run(links())
