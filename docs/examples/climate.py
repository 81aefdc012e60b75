# %% [markdown]
# # xarray: a climate from netCDF, to zarr and back
#
# xarray gives arrays names: of dimensions, coordinates and units. With `chunks=`, its variables are dask arrays, and all of
# it runs on a cluster. This example makes netCDF files of daily temperatures, one per year, takes the mean course of the year
# from them, and writes how far each day is from it as zarr, a store whose chunks are files that workers write in parallel.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from engines import compare, size

from zmqtasks import Client

YEARS = range(2001, 2005)
LATITUDES, LONGITUDES = size(18, 180), size(36, 360)

# %% [markdown]
# ## The data
#
# Warm at the equator, a season that is opposite in the south, and chance.

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
latitude = np.linspace(-85, 85, LATITUDES)
longitude = np.linspace(0, 350, LONGITUDES)
for year in YEARS:
    days = pd.date_range(f"{year}-01-01", f"{year}-12-31")
    season = -np.cos(2 * np.pi * days.day_of_year.to_numpy() / 365)
    shape = (len(days), LATITUDES, LONGITUDES)
    celsius = 28 - np.abs(latitude)[:, None] / 2 + 10 * season[:, None, None] * np.sin(np.radians(latitude))[:, None]
    celsius = celsius + np.random.default_rng(year).normal(0, 2, shape)
    xr.Dataset(
        {"celsius": (("time", "latitude", "longitude"), celsius, {"units": "degree_Celsius"})},
        coords={"time": days, "latitude": latitude, "longitude": longitude},
    ).to_netcdf(folder / f"year-{year}.nc", engine="h5netcdf")

# %% [markdown]
# ## The question
#
# `open_mfdataset` looks at the files, and reads nothing of the temperatures. The mean course of the year is a mean by month;
# the anomaly is what differs from it. The workers write it; then a new dataset, of the zarr store, is asked how much days
# differ in the north and in the south.
#
# (`by_month - by_month.mean()` would say the same, but picks one mean for each day, in thousands of tasks.)


# %%
def from_their_mean(days):
    return days - days.mean("time")


def anomalies():
    files = sorted(folder.glob("year-*.nc"))
    with xr.open_mfdataset(files, engine="h5netcdf", chunks={"time": -1}) as data:
        anomaly = data.celsius.groupby("time.month").map(from_their_mean)
        anomaly = anomaly.chunk(time=366).to_dataset(name="anomaly")
        anomaly.to_zarr(folder / "anomaly.zarr", mode="w", consolidated=False)
    with xr.open_zarr(folder / "anomaly.zarr", consolidated=False) as stored:
        spread = stored.anomaly.std("time").mean("longitude").compute()
    return np.array([spread.sel(latitude=slice(0, 90)).mean(), spread.sel(latitude=slice(-90, 0)).mean()])


# %% [markdown]
# ## On a cluster

# %%
client = Client(n_workers=2, threads_per_worker=1)
north, south = anomalies()
print(f"answer: days differ from their month by {north:.4f} degrees in the north, {south:.4f} in the south")

# %% [markdown]
# ## Is it right, and what does it take?
#
# The same with numpy, on arrays without names.

# %%
parts = []
for year in YEARS:
    with xr.open_dataset(folder / f"year-{year}.nc", engine="h5netcdf") as data:
        parts.append((data.celsius.values, data.time.dt.month.values))
celsius, month = (np.concatenate(each) for each in zip(*parts, strict=True))
for each in range(1, 13):
    celsius[month == each] -= celsius[month == each].mean(axis=0)
spread = celsius.std(axis=0).mean(axis=1)
expected = np.array([spread[latitude >= 0].mean(), spread[latitude <= 0].mean()])

compare(anomalies, expected, client)

# %%
scratch.cleanup()
