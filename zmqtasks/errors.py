"""The whole exception tree.

Every error that zmqtasks raises itself is a `ZmqTasksError`; errors of user code are re-raised as themselves. A message
names the thing, its value and the way out. Errors of libraries are translated at the edge of the module that uses the
library, with the original as `__cause__`.
"""

from __future__ import annotations

import concurrent.futures
from typing import Literal

__all__ = [
    "ActorLostError",
    "AddressError",
    "AuthenticationError",
    "CancelledError",
    "ClientClosedError",
    "CommBrokenError",
    "CommClosedError",
    "CommError",
    "ConfigError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionRefusedByPeerError",
    "DeserializationError",
    "InvalidTransitionError",
    "KeyConflictError",
    "KilledWorker",
    "LimitExceededError",
    "LocalProtocolError",
    "LostDataError",
    "NoWorkerError",
    "NodeStartError",
    "PayloadTooLargeError",
    "PeerIdentityError",
    "PluginError",
    "ProtocolError",
    "QueueError",
    "RemoteProtocolError",
    "SchedulerLostError",
    "SecurityError",
    "SerializationError",
    "TaskTimeoutError",
    "VersionMismatchError",
    "ZmqTasksError",
]


class ZmqTasksError(Exception):
    """Base of all errors that zmqtasks raises on its own account."""


# --- set-up ---------------------------------------------------------------------------------------------------------


class ConfigError(ZmqTasksError, ValueError):
    """A setting or an argument has a value that cannot be used."""


class AddressError(ConfigError):
    """A text is not an address that a transport understands."""


class SecurityError(ZmqTasksError):
    """A key file is missing, malformed, or readable by others."""


class NodeStartError(ZmqTasksError):
    """A scheduler, nanny or worker process could not be started; the message has what it printed."""


# --- links ----------------------------------------------------------------------------------------------------------


class CommError(ZmqTasksError, OSError):
    """A link could not be made, or is no more."""


class CommClosedError(CommError):
    """The comm was closed in good order; `by` tells by which side."""

    def __init__(self, message: str, by: Literal["local", "peer"] = "local") -> None:
        super().__init__(message)
        self.by = by


class CommBrokenError(CommError):
    """The link broke without a word from the peer; `__cause__` has the cause where there is one."""


class ConnectError(CommError):
    """No link could be made to an address."""


class ConnectionRefusedByPeerError(ConnectError):
    """Nobody listens at the address, or the listener turned the connection away."""


class ConnectTimeoutError(ConnectError, TimeoutError):
    """Nothing answered at the address within the time allowed."""


# --- protocol -------------------------------------------------------------------------------------------------------


class ProtocolError(ZmqTasksError):
    """A message breaks the rules of the protocol."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that are not a valid message: the peer's fault, the link is closed."""


class LimitExceededError(RemoteProtocolError):
    """The peer announced a message over the limits in force; no memory was taken for it."""


class VersionMismatchError(ProtocolError):
    """The two sides speak different versions of the protocol; the message names both."""


class AuthenticationError(ProtocolError):
    """The peer could not prove that it holds the cluster key (or this side could not)."""


class PeerIdentityError(ConnectError, AuthenticationError):
    """The encrypted link came to nothing because the two sides do not have the same cluster key."""


# --- payloads -------------------------------------------------------------------------------------------------------


class SerializationError(ZmqTasksError, TypeError):
    """An object cannot be turned into bytes; the message names the object and the family that was tried."""


class PayloadTooLargeError(SerializationError):
    """A payload is over the size that its place in the protocol allows."""


class DeserializationError(ZmqTasksError, ValueError):
    """Bytes cannot be turned back into an object."""


# --- tasks ----------------------------------------------------------------------------------------------------------


class InvalidTransitionError(ZmqTasksError):
    """A state machine was asked for a transition that its table does not list: a bug; carries the task's story."""


class KeyConflictError(ZmqTasksError, ValueError):
    """A key was submitted again with a different function or different arguments."""


class KilledWorker(ZmqTasksError):  # the name that users of dask.distributed know
    """A task was executing on too many workers that died; the message names the exit signal of the last one."""


class LeaseError(ZmqTasksError, RuntimeError):
    """A lock or semaphore was released too often, is closed, or is in use with another number of leases."""


class LostDataError(ZmqTasksError):
    """A result is gone and cannot be computed again (scattered data, or a forgotten task)."""


class NoWorkerError(ZmqTasksError):
    """No worker satisfies the restrictions or resources of a task."""


class ActorLostError(ZmqTasksError):
    """An actor is gone with its worker; the message names both. `Client.retry` of its future makes a new one."""


class CancelledError(ZmqTasksError, concurrent.futures.CancelledError):
    """The future was cancelled, or what it stood for is gone; the message has the reason."""


class TaskTimeoutError(ZmqTasksError, TimeoutError):
    """A wait ran out of time; what was waited for goes on."""


class QueueError(ZmqTasksError, RuntimeError):
    """A queue was closed, or is in use with another `maxsize`."""


class ClientClosedError(ZmqTasksError):
    """The client is closed: make a new one."""


class PluginError(ZmqTasksError):
    """A plugin or an uploaded file failed on a worker, which the message names; `__cause__` has the error."""


class SchedulerLostError(ZmqTasksError):
    """The link to the scheduler is gone and could not be resumed."""
