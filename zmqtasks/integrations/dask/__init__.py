"""dask's collections on a cluster: with a default client, `x.compute()`, `x.persist()` and all that is made of them run there.

A client that becomes the default one puts itself into dask's configuration if dask was imported by then. When dask is imported
later, import this module too (or make the client after it):

>>> from zmqtasks import Client
>>> client = Client()
>>> import dask.array as da, zmqtasks.integrations.dask
>>> da.ones((1000, 1000), chunks=100).sum().compute()
np.float64(1000000.0)
"""

from __future__ import annotations

from zmqtasks.integrations.dask.collections import compute, futures_in, get, is_dasks, persist
from zmqtasks.integrations.dask.defaults import ClientScheduler, refresh, scheduler

__all__ = ["ClientScheduler", "compute", "futures_in", "get", "is_dasks", "persist", "refresh", "scheduler"]

refresh()
