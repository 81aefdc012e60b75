"""Large frames by UCX (InfiniBand, shared memory, ...), everything else over TCP: `ucx://host:port`; see docs/ucx.md."""

from zmqtasks.transports.ucx.transport import UcxTransport

__all__ = ["UcxTransport"]
