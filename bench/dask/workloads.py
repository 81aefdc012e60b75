"""The workloads: what users do with collections, with sizes fixed here, in two sets.

*small*: many small chunks, so that the time is what the engine costs. *big*: few big chunks, so that it is computing and
moving. Each gives a number, which must be the same on all engines.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import xarray as xr

Workload = Callable[[], float]


def _random(side: int, chunk: int) -> Any:
    return da.random.default_rng(7).random((side, side), chunks=chunk)


def _table(rows: int, partitions: int, groups: int) -> Any:
    """A dataframe made on the workers: `key` of so many groups, `value`."""
    each = rows // partitions
    return dd.from_map(_partition, range(partitions), rows=each, groups=groups, meta=_partition(0, 1, groups))


def _partition(number: int, rows: int, groups: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    return pd.DataFrame({"key": rng.integers(0, groups, rows), "value": rng.random(rows), "other": rng.random(rows)})


def array_sum(side: int, chunk: int) -> float:
    return float(_random(side, chunk).sum().compute())


def array_transpose(side: int, chunk: int) -> float:
    x = _random(side, chunk)
    return float((x + x.T).mean().compute())


def array_matmul(side: int, chunk: int) -> float:
    x = _random(side, chunk)
    return float((x @ x).sum().compute())


def array_rechunk(side: int, chunk: int) -> float:
    x = _random(side, chunk).rechunk((side, max(1, chunk // 4))).rechunk((max(1, chunk // 4), side))
    return float(x[::2].sum().compute())


def array_overlap(side: int, chunk: int) -> float:
    smooth = da.map_overlap(_smooth, _random(side, chunk), depth=1, boundary="reflect")
    return float(smooth.sum().compute())


def _smooth(block: np.ndarray) -> np.ndarray:
    return (block + np.roll(block, 1, 0) + np.roll(block, 1, 1)) / 3


def frame_groupby(rows: int, partitions: int) -> float:
    table = _table(rows, partitions, 50)
    return float(table.groupby("key").value.mean().sum().compute())


def frame_shuffle(rows: int, partitions: int) -> float:
    table = _table(rows, partitions, 10_000)
    return float(table.shuffle("key").map_partitions(len).sum().compute())


def frame_merge(rows: int, partitions: int) -> float:
    left = _table(rows, partitions, 10_000)
    right = _table(rows // 4, max(2, partitions // 2), 10_000).groupby("key").other.max().reset_index()
    return float(left.merge(right, on="key").other_y.sum().compute())


def frame_parquet(rows: int, partitions: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "table")
        _table(rows, partitions, 100).to_parquet(path)
        table = dd.read_parquet(path)
        return float(table[table.key < 50].value.sum().compute())


def bag_count(items: int, partitions: int) -> float:
    numbers = db.range(items, npartitions=partitions)
    return float(sum(count for _, count in numbers.map(_digit).frequencies().compute()))


def _digit(number: int) -> int:
    return number * 7919 % 97


def delayed_tree(leaves: int, work: int) -> float:
    level = [dask.delayed(_leaf)(number, work) for number in range(leaves)]
    while len(level) > 1:
        level = [dask.delayed(sum)(level[start : start + 4]) for start in range(0, len(level), 4)]
    return float(level[0].compute())


def _leaf(number: int, work: int) -> float:
    return float(np.arange(work, dtype=float).sum() + number) if work else float(number)


def xarray_anomaly(steps: int, chunk: int, side: int) -> float:
    data = da.random.default_rng(5).random((steps, side, side), chunks=(chunk, side, side))
    field = xr.DataArray(data, dims=("time", "y", "x"), coords={"time": np.arange(steps)})
    anomaly = field - field.mean("time")
    return float((anomaly**2).mean().compute())


SETS: dict[str, dict[str, Workload]] = {
    "small": {
        "array: sum": lambda: array_sum(4000, 100),
        "array: x + x.T": lambda: array_transpose(3000, 100),
        "array: x @ x": lambda: array_matmul(1000, 100),
        "array: rechunk": lambda: array_rechunk(1600, 80),
        "array: overlap": lambda: array_overlap(2000, 100),
        "dataframe: groupby": lambda: frame_groupby(100_000, 500),
        "dataframe: shuffle": lambda: frame_shuffle(20_000, 40),
        "dataframe: merge": lambda: frame_merge(20_000, 30),
        "dataframe: parquet": lambda: frame_parquet(40_000, 100),
        "bag: frequencies": lambda: bag_count(100_000, 1000),
        "delayed: tree": lambda: delayed_tree(4096, 0),
        "xarray: anomaly": lambda: xarray_anomaly(1000, 2, 10),
    },
    "big": {
        "array: sum": lambda: array_sum(12_000, 2000),
        "array: x + x.T": lambda: array_transpose(10_000, 2000),
        "array: x @ x": lambda: array_matmul(4000, 2000),
        "array: rechunk": lambda: array_rechunk(8000, 2000),
        "array: overlap": lambda: array_overlap(8000, 2000),
        "dataframe: groupby": lambda: frame_groupby(8_000_000, 8),
        "dataframe: shuffle": lambda: frame_shuffle(4_000_000, 8),
        "dataframe: merge": lambda: frame_merge(2_000_000, 8),
        "dataframe: parquet": lambda: frame_parquet(4_000_000, 8),
        "bag: frequencies": lambda: bag_count(2_000_000, 8),
        "delayed: tree": lambda: delayed_tree(64, 4_000_000),
        "xarray: anomaly": lambda: xarray_anomaly(64, 8, 1000),
    },
}
"""By set and name."""
