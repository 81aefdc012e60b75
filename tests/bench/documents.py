"""Documents of runs that were never made, for tests of what is made of them."""

from __future__ import annotations

from bench.network.document import Matrix, Report, Series, Skipped, Subject
from bench.network.figures import KIB, MIB, Quantiles


def series(*, trip_us: float, bandwidth: float, rounds: int = 3, noise: float = 0.02) -> Series:
    """Figures around the given ones, a little more in each round."""
    factors = [1 + noise * number for number in range(rounds)]
    trips = [
        Quantiles(2000, trip_us, trip_us * each, trip_us * each * 2, trip_us * each * 5, trip_us) for each in factors
    ]
    return Series(
        latency_us={1: trips, 64 * KIB: trips},
        bandwidth={size: [bandwidth * each for each in factors] for size in (KIB, 64 * KIB, MIB, 64 * MIB)},
        rates={"messages_per_s": [1e6 * each for each in factors], "fan_in_bytes_per_s": [bandwidth / 2]},
    )


def report(*, slower: float = 1.0, matrix: bool = False) -> Report:
    """A run of a transport and its baseline; `slower` divides what the transport gives."""
    subjects = [
        Subject(id="raw-socket", name="raw socket", kind="baseline", idle=series(trip_us=20, bandwidth=3e9)),
        Subject(
            id="tcp",
            name="tcp",
            kind="transport",
            baseline="raw-socket",
            idle=series(trip_us=30 * slower, bandwidth=2.9e9 / slower),
            gil=series(trip_us=10_000, bandwidth=4e8),
        ),
    ]
    return Report(
        command="zmqtasks bench net",
        started="2026-01-02T03:04:05+00:00",
        seconds=12.5,
        rounds=3,
        machine={"processor": "A processor", "processors": 2, "packages": {"pyzmq": "27.3.0"}},
        plan={"idle": {"peers": 4}},
        subjects=subjects,
        skipped=[Skipped("ucx", "ucxx is not installed")],
        matrix=cluster() if matrix else None,
    )


def cluster() -> Matrix:
    """Four workers, the last of them slow."""
    names = [f"node{number}" for number in range(4)]

    def cells(fast: float, slow: float) -> list[list[float | None]]:
        return [
            [None if row == column else slow if 3 in (row, column) else fast for column in range(4)] for row in range(4)
        ]

    return Matrix(
        workers=names,
        hosts=names,
        latency_us=cells(60, 400),
        bandwidth=cells(1e9, 12e6),
        findings=["node3 is slow: 12 MB/s where others have 1 GB/s."],
    )
