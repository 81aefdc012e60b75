"""The second half of the demo: the mean of x + x.T for a 6,000 x 6,000 array, held in blocks by the workers.

Block (i, j) of the sum needs block (j, i) of x, which is often on another worker: the workers fetch it from each other,
and neither the scheduler nor the program ever sees a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zmqtasks.client import Client

SIZE = 6_000
BLOCK = 1_000
BLOCKS = SIZE // BLOCK


def make_block(i: int, j: int) -> NDArray[np.float64]:
    """Block (i, j) of x: random numbers, the same ones in every process."""
    return np.random.default_rng((i, j)).random((BLOCK, BLOCK))


def sum_with_transposed(block: NDArray[np.float64], mirrored: NDArray[np.float64]) -> float:
    """The sum of all elements of one block of x + x.T."""
    return float((block + mirrored.T).sum())


def mean_of_sums(sums: list[float]) -> float:
    """The mean of all elements, from the sums of the blocks."""
    return sum(sums) / SIZE**2


def submit(client: Client) -> list[Any]:
    """Futures of all tasks; the last one has the mean."""
    places = [(i, j) for i in range(BLOCKS) for j in range(BLOCKS)]
    rows, columns = zip(*places, strict=True)
    x = dict(zip(places, client.map(make_block, rows, columns), strict=True))
    sums = client.map(sum_with_transposed, [x[i, j] for i, j in places], [x[j, i] for i, j in places])
    return [*x.values(), *sums, client.submit(mean_of_sums, sums)]


def check(mean: float) -> str:
    """Compares with numpy on the whole array, and says what was found."""
    x = np.block([[make_block(i, j) for j in range(BLOCKS)] for i in range(BLOCKS)])
    expected = float((x + x.T).mean())
    if not np.isclose(mean, expected, rtol=1e-12):
        raise AssertionError(f"the mean is {mean!r}, and numpy says {expected!r}")
    return f"{SIZE:,} x {SIZE:,} float64 ({x.nbytes / 1e6:,.0f} MB) in {BLOCKS**2} blocks; mean {mean:.9f}"
