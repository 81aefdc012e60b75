"""Messages over ZeroMQ: socket work in C++ threads that Python's GIL cannot stop.

The connecting side has a fresh DEALER socket per comm, the listening side one ROUTER per listener, both with a monitor.
Sessions are opened by HELLO and ACCEPT, parts of data flow by credits, and FIN with its answer ends a session in good
order; see `control` for the parts, `comm` for the flow, `router` for what is shared and how strangers are bounded.
ZeroMQ never connects again by itself: a comm that has lost its connection is broken, and no message can land in another
session.
"""

from __future__ import annotations

from zmqtasks.transports.zeromq.transport import ZmqTransport

__all__ = ["ZmqTransport"]
