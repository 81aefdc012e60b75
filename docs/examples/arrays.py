# %% [markdown]
# # Arrays: mean and transpose
#
# A dask array is a grid of numpy arrays, its chunks. An expression of it becomes a graph of tasks, each of which works on
# a few chunks: the whole need not fit into memory, and the tasks run in parallel.

# %%
import dask.array as da
import numpy as np
from engines import compare, size

from zmqtasks import Client

SIDE = size(3_000, 20_000)
CHUNK = size(500, 2_000)

# %% [markdown]
# ## The expression
#
# Random numbers, made chunk by chunk from one seed, so that they are the same on every run. Adding the transpose brings
# together chunks from both sides of the diagonal; the mean of each row is taken of chunks first, then of their means.


# %%
def matrix():
    return da.random.default_rng(seed=1).random((SIDE, SIDE), chunks=CHUNK)


def row_means():
    x = matrix()
    y = x + x.T
    return y[::2, SIDE // 2 :].mean(axis=1).compute()


# %% [markdown]
# ## On a cluster
#
# `compute()` gives a numpy array. For a result that is too large for this process, `persist()` leaves the chunks on the
# workers, and gives a dask array of them.

# %%
client = Client(n_workers=2, threads_per_worker=1)
means = row_means()
print(f"answer: {means.size} means, the first is {means[0]:.6f}, their mean {means.mean():.6f}")

x = matrix().persist()
print(f"answer: the largest of {x.size} elements, persisted, is {x.max().compute():.9f}")

# %% [markdown]
# ## Is it right, and what does it take?
#
# The same with numpy, on the whole matrix at once.

# %%
whole = x.compute()
del x  # the workers forget what nobody holds
expected = (whole + whole.T)[::2, SIDE // 2 :].mean(axis=1)
np.testing.assert_allclose(means, expected)
del whole

compare(row_means, expected, client)
