# %% [markdown]
# # Dataframes: groupby on CSV and on parquet
#
# A dask dataframe is a row of pandas dataframes, its partitions, often one per file. This example writes CSV files of
# readings of sensors, groups them, writes them as parquet, and asks the same of that.

# %%
import tempfile
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
from engines import compare, size

from zmqtasks import Client

FILES = 8
ROWS = size(20_000, 1_000_000)
SENSORS = 40

# %% [markdown]
# ## The data

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
for number in range(FILES):
    rng = np.random.default_rng(number)
    readings = pd.DataFrame(
        {
            "sensor": [f"sensor-{which:02}" for which in rng.integers(0, SENSORS, ROWS)],
            "celsius": rng.normal(20, 5, ROWS).round(3),
            "volts": rng.normal(3.3, 0.1, ROWS).round(4),
        }
    )
    readings.to_csv(folder / f"readings-{number}.csv", index=False)

# %% [markdown]
# ## The questions
#
# The same expression for both formats. `read_csv` guesses the types from the beginning of the first file, and reads all of
# every file: columns cannot be left out in CSV. Of parquet, only the two columns that are used are read.


# %%
def mean_by_sensor(table):
    means = table.groupby("sensor").celsius.mean().compute()
    return {str(sensor): round(float(mean), 9) for sensor, mean in sorted(means.items())}


def from_csv():
    return mean_by_sensor(dd.read_csv(folder / "readings-*.csv"))


def from_parquet():
    return mean_by_sensor(dd.read_parquet(folder / "readings.parquet"))


# %% [markdown]
# ## On a cluster
#
# The workers read the files, and write the parquet ones; this process sees the means alone.

# %%
client = Client(n_workers=2, threads_per_worker=1)
means = from_csv()
warmest = max(means, key=means.get)
print(f"answer: {len(means)} sensors in {FILES * ROWS} rows; the warmest is {warmest} with {means[warmest]:.4f}")

dd.read_csv(folder / "readings-*.csv").to_parquet(folder / "readings.parquet")
print(f"answer: from {len(list(folder.glob('readings.parquet/*')))} parquet files the same: {from_parquet() == means}")

# %% [markdown]
# ## Is it right, and what does it take?
#
# pandas, on all rows at once. The times are for both formats together.

# %%
everything = pd.concat(pd.read_csv(path) for path in sorted(folder.glob("*.csv")))
grouped = everything.groupby("sensor").celsius.mean()
expected = {sensor: round(float(mean), 9) for sensor, mean in sorted(grouped.items())}

compare(lambda: [from_csv(), from_parquet()], [expected, expected], client)

# %%
scratch.cleanup()
