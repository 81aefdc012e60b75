# %% [markdown]
# # A grid search with scikit-learn
#
# scikit-learn hands its loops to joblib, and joblib runs them on whatever backend it is told to: one line of the program
# moves a grid search to a cluster. This one finds parameters of a classifier of handwritten digits.

# %%
import joblib
import numpy as np
from engines import WORKERS, compare, size
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, ParameterGrid, cross_val_score
from sklearn.svm import SVC

from zmqtasks import Client

images, labels = load_digits(return_X_y=True)
images, labels = images[: size(300, 1_797)] / 16, labels[: size(300, 1_797)]
grid = {"C": [0.1, 1.0, 10.0], "gamma": np.geomspace(0.001, 1, size(4, 16)).tolist()}

# %% [markdown]
# ## The search
#
# Nothing of it knows where it runs. `n_jobs=-1` stands for all threads that the backend has.


# %%
def best():
    search = GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(images, labels)
    return search.best_params_, round(search.best_score_, 9)


# %% [markdown]
# ## On a cluster
#
# `"zmqtasks"` stands for the cluster of the default client. The images go to the workers once, not with each of the fits.


# %%
def best_on(backend, **options):
    with joblib.parallel_config(backend, **options):
        return best()


client = Client(n_workers=2, threads_per_worker=1)
parameters, score = best_on("zmqtasks")
print(f"answer: {parameters} is best, with {score:.4f} of the digits recognised")

# %% [markdown]
# ## Is it right, and what does it take?
#
# A plain loop over the grid. dask's own threads play no part in joblib: its backend "threading" takes their place, and "dask"
# is the one of dask.distributed.

# %%
tried = [(cross_val_score(SVC(**each), images, labels, cv=3).mean(), each) for each in ParameterGrid(grid)]
score, parameters = max(tried, key=lambda pair: pair[0])

compare(
    lambda: best_on("zmqtasks"),
    expected=(parameters, round(score, 9)),
    client=client,
    threads=lambda: best_on("threading", n_jobs=WORKERS),
    threads_are="joblib's threads",
    distributed=lambda: best_on("dask"),
)
