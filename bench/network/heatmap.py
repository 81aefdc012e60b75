"""Heat maps of the links of a live cluster: from each worker (row) to each other (column)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .document import Matrix
from .drawing import Plot, new_figure
from .wording import bandwidth_text, time_text

_MOST_TEXTS = 5
"""Workers up to which every cell has room for its figure."""
_MOST_NAMES = 32
_LEVEL_LETTERS = 36
"""Names of columns that have more stand upright."""
_LEAST_SPAN = 3.0
"""From the darkest colour to the brightest: less than this between links is no reason to look."""
_UNMEASURED = "#8b8d98"
"""Neither among the colours of figures nor that of a page, light or dark."""
Cells = Sequence[Sequence[float | None]]


def heat_maps(matrix: Matrix) -> list[Plot]:
    """One of bandwidth and one of latency, as far as there are figures."""
    kinds: tuple[tuple[str, str, Cells, Callable[[float | None], str], str], ...] = (
        ("matrix-bandwidth", "Bandwidth between workers", matrix.bandwidth, bandwidth_text, "viridis"),
        ("matrix-latency", "Round trips between workers", matrix.latency_us, time_text, "viridis_r"),
    )
    about = "From the row's worker to the column's. Dark: slow; grey, hatched: not measured."
    if len(matrix.workers) > _MOST_NAMES:
        about += f" One of {_step(len(matrix.workers))} workers is named."
    made = []
    for name, title, cells, text, colours in kinds:
        if any(cell is not None for row in cells for cell in row):
            made.append(Plot(name, title, about, partial(_heat_map, matrix.workers, cells, text, colours)))
    return made


def _heat_map(workers: list[str], cells: Cells, text: Callable[[float | None], str], colours: str) -> Any:
    from matplotlib.colors import LogNorm

    count = len(workers)
    known = [cell for row in cells for cell in row if cell is not None]
    low, high = _range(min(known), max(known))
    figure = new_figure(4.8)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    _hatch(axes, count)
    values = [[math.nan if cell is None else cell for cell in row] for row in cells]
    image = axes.imshow(values, cmap=colours, norm=LogNorm(low, high), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.02)
    bar.ax.set_xticks([low, math.sqrt(low * high), high])
    bar.ax.xaxis.set_major_formatter(lambda value, _: text(value))
    bar.ax.xaxis.set_minor_formatter(lambda value, _: "")
    named = range(0, count, _step(count))
    names = [workers[number] for number in named]
    axes.set_xticks(named, names, rotation=90 if sum(map(len, names)) > _LEVEL_LETTERS else 0)
    axes.set_yticks(named, names)
    if count <= _MOST_TEXTS:
        _write(axes, image, cells, text)
    axes.tick_params(length=0, labelsize=8)
    return figure


def _step(count: int) -> int:
    """Of how many workers one is named."""
    return -(-count // _MOST_NAMES)


def _range(low: float, high: float) -> tuple[float, float]:
    """Of the colours: what the figures have, about their middle at least `_LEAST_SPAN`."""
    low, high = max(low, 1e-9), max(high, 1e-9)
    wider = math.sqrt(max(1.0, _LEAST_SPAN * low / high))
    return low / wider, high * wider


def _hatch(axes: Any, count: int) -> None:
    """Behind the cells: it is seen where there is no figure."""
    from matplotlib.patches import Rectangle

    place = ((-0.5, -0.5), count, count)
    axes.add_patch(Rectangle(*place, facecolor=_UNMEASURED, alpha=0.35, linewidth=0, zorder=-2))
    axes.add_patch(Rectangle(*place, fill=False, hatch="////", edgecolor=_UNMEASURED, linewidth=0, zorder=-1))


def _write(axes: Any, image: Any, cells: Cells, text: Callable[[float | None], str]) -> None:
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell is not None:
                # The eye sees green as brightest; from here on black has the better contrast (WCAG 2, relative luminance).
                red, green, blue = (part**2.2 for part in image.cmap(image.norm(cell))[:3])
                bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18
                colour = "black" if bright else "white"
                axes.text(column, row, text(cell), ha="center", va="center", color=colour, fontsize=8)
