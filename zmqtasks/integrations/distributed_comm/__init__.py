"""dask.distributed on these transports: its own scheduler, nannies, workers and clients, at addresses `zmq://host:port`.

Nothing needs to be imported: the entry point `distributed.comm.backends` brings `LocalCluster(protocol="zmq://")`,
`dask scheduler --protocol zmq` and `DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME=zmq`. Links authenticate by the cluster key and
are encrypted as those of zmqtasks are; `KeySecurity` hands a key to a cluster, else the user's key file has it.

How it is made: `frames` has the link beneath (dial and accept, by the handshake of zmqtasks), `comm` the object that
distributed reads from and writes to, `backend` its connectors, listeners and addresses, `security` where keys come from.
"""

from zmqtasks.integrations.distributed_comm.backend import ZmqBackend
from zmqtasks.integrations.distributed_comm.security import KeySecurity
from zmqtasks.integrations.distributed_comm.threads import start_threads

__all__ = ["KeySecurity", "ZmqBackend", "start_threads"]
