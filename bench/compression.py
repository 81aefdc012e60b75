"""What compression costs and gives: codecs on blocks, and values over a data link with it forced, against none.

    python -m bench.compression

All figures of a line come from the same run, in turns, and ratios are taken within each round; "off again" is a second
link without compression: what it differs from the first is noise. Loopback stands for a link that is faster than any codec,
so the lines show the price, and those for data that does not shrink the price of looking.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np
import uvloop

from zmqtasks.config import Config
from zmqtasks.ids import new_instance_id
from zmqtasks.nodes.channel import Acceptor, Admission, DataPool, DataServer
from zmqtasks.protocol import compression
from zmqtasks.protocol.payload import Payload
from zmqtasks.security import ClusterKey, Security

MIB = 1 << 20


def kinds(size: int) -> dict[str, bytes]:
    """Data that does not shrink, shrinks somewhat, and shrinks well."""
    random = np.random.default_rng(1)
    return {
        "random bytes": random.bytes(size),
        "floats, 3 digits": np.round(random.normal(size=size // 8), 3).tobytes(),
        "steps": (np.arange(size // 8) // 7).tobytes(),
    }


def noise(size: int) -> dict[str, bytes]:
    """Data that does not shrink: not at all; by zeros at its ends alone; by zeros where samples are taken alone."""
    random = np.random.default_rng(1)
    raw = random.bytes(size)
    patch = min(20_000, size // 100)
    halo = bytes(patch) + raw[2 * patch :] + bytes(patch)
    traps = bytearray(raw)
    for fifth in range(5):
        middle = size * (2 * fifth + 1) // 10
        traps[middle - patch // 2 : middle + patch // 2] = bytes(patch)
    return {"random bytes": raw, "halo of zeros": halo, "zeros at samples": bytes(traps)}


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


async def price() -> None:
    """Gets of data that does not shrink, a codec forced, as a share of what off gives in the same round."""
    print(
        f"\n{'does not shrink':18} {'MiB':>6} {'off GB/s':>9} {'off again':>16} {'lz4':>16} {'zstd':>16}   median, quartiles"
    )
    for size in (MIB // 16, MIB // 4, MIB, 16 * MIB, 64 * MIB):
        for kind, raw in noise(size).items():
            rates = await _rates(raw, ("off", "off again", "lz4", "zstd"), 61)
            cells = []
            for mode in ("off again", "lz4", "zstd"):
                ratios = [a / b for a, b in zip(rates[mode], rates["off"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                cells.append(f"{middle:5.3f} {low:4.2f}-{high:4.2f}")
            off = statistics.median(rates["off"])
            print(f"{kind:18} {size / MIB:6.2f} {off:9.2f} " + " ".join(f"{c:>16}" for c in cells))


async def links() -> None:
    """Gets of data that shrinks over tcp on loopback, by mode: what a link faster than the codec loses."""
    modes = ("off", "lz4", "zstd")
    print(f"\n{'shrinks':18} {'MiB':>6} " + " ".join(f"{mode + ' GB/s':>11} {'of off':>7}" for mode in modes))
    for size in (MIB // 16, MIB, 16 * MIB):
        for kind, raw in kinds(size).items():
            if kind == "random bytes":
                continue
            rates = await _rates(raw, modes, 7)
            off = rates["off"]
            ratios = {
                mode: statistics.median(a / b for a, b in zip(each, off, strict=True)) for mode, each in rates.items()
            }
            cells = (f"{statistics.median(each):11.2f} {ratios[mode]:7.3f}" for mode, each in rates.items())
            print(f"{kind:18} {size / MIB:6.2f} " + " ".join(cells))


async def _rates(raw: bytes, modes: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """By mode ("off again" is off), the rate of each round; every second round goes backwards."""
    security = Security(ClusterKey.generate())
    payload = Payload(b"", [memoryview(raw)])
    ends = []
    rates: dict[str, list[float]] = {}
    for mode in modes:
        config = dataclasses.replace(Config(), compression=mode.split()[0])
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
    gets = max(1, min(100, 16 * MIB // len(raw)))
    for number in range(rounds + 2):
        for mode, _, _, pool, address in ends if number % 2 else reversed(ends):
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


async def main() -> None:
    """Both."""
    await price()
    await links()


if __name__ == "__main__":
    codecs()
    uvloop.run(main())
