"""Heat maps of the links of a live cluster: from each worker (row) to each other (column)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .document import Matrix
from .drawing import Plot, new_figure
from .wording import bandwidth_text, time_text

_MOST_TEXTS = 8
"""Workers up to which every cell has its figure written into it."""
_MOST_NAMES = 32
Cells = Sequence[Sequence[float | None]]


def heat_maps(matrix: Matrix) -> list[Plot]:
    """One of bandwidth and one of latency, as far as there are figures."""
    kinds: tuple[tuple[str, str, str, Cells, Callable[[float | None], str], str], ...] = (
        ("matrix-bandwidth", "Bandwidth between workers", "Dark: slow.", matrix.bandwidth, bandwidth_text, "viridis"),
        ("matrix-latency", "Round trips between workers", "Dark: slow.", matrix.latency_us, time_text, "viridis_r"),
    )
    made = []
    for name, title, about, cells, text, colours in kinds:
        if any(cell is not None for row in cells for cell in row):
            draw = partial(_heat_map, matrix.workers, cells, text, colours)
            made.append(Plot(name, title, f"From the row's worker to the column's. {about}", draw))
    return made


def _heat_map(workers: list[str], cells: Cells, text: Callable[[float | None], str], colours: str) -> Any:
    from matplotlib.colors import LogNorm

    count = len(workers)
    values = [[math.nan if cell is None else cell for cell in row] for row in cells]
    known = [cell for row in cells for cell in row if cell is not None]
    low, high = min(known), max(known)
    figure = new_figure(5.0)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    norm = LogNorm(max(low, 1e-9), max(high, low * 1.5, 1e-8))
    image = axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.02)
    bar.ax.xaxis.set_major_formatter(lambda value, _: text(value))
    bar.ax.xaxis.set_minor_formatter(lambda value, _: "")
    bar.ax.set_xticks(sorted({low, math.sqrt(low * high), high}))
    if count <= _MOST_NAMES:
        axes.set_xticks(range(count), workers, rotation=90 if count > 4 else 0)
        axes.set_yticks(range(count), workers)
    else:
        axes.set_xlabel("worker")
        axes.set_ylabel("worker")
    if count <= _MOST_TEXTS:
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                if cell is not None:
                    bright = sum(image.cmap(image.norm(cell))[:3]) > 1.5
                    colour = "black" if bright else "white"
                    axes.text(column, row, text(cell), ha="center", va="center", color=colour, fontsize=7.5)
    axes.tick_params(length=0, labelsize=8)
    return figure
