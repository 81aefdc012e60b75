"""Shared memory between processes of one host: `shm://name`; see `transport`."""

from zmqtasks.transports.shm.transport import ShmTransport, shm_address

__all__ = ["ShmTransport", "shm_address"]
