"""With what key links of dask.distributed authenticate, and which of them are encrypted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed.security import Security as DistributedSecurity

from zmqtasks.errors import SecurityError
from zmqtasks.security import ClusterKey, Security, create_key, default_key_path, load_key
from zmqtasks.transports.derive import derive_key

_LABEL = b"zmqtasks dask.distributed comms v1"
_KEY_ARGUMENT = "zmqtasks_key"


class KeySecurity(DistributedSecurity):  # type: ignore[misc]
    """A `distributed.Security` that carries a cluster key: for `security=` of clusters, nannies, workers and clients.

    It may be pickled, since distributed hands it to the processes that it starts, by a pipe: who has such a pickle has the
    key. Its `repr` shows the id of the cluster only.
    """

    # No __slots__: the base class takes its own for the list of its parameters.

    def __init__(self, key: ClusterKey | None = None, *, require_encryption: bool | None = None) -> None:
        """`key`: default, the one in the user's key file, which is made when there is none.

        `require_encryption`: links that stay on this host are encrypted as well.
        """
        super().__init__(require_encryption=require_encryption)
        self._key_hex = (key or create_key(default_key_path())).hex()

    @classmethod
    def temporary(cls, **kwargs: Any) -> KeySecurity:
        """One with a new key, known to nobody else; `kwargs` as for the class."""
        return cls(ClusterKey.generate(), **kwargs)

    @property
    def key(self) -> ClusterKey:
        """The key of the cluster."""
        return ClusterKey.from_hex(self._key_hex)

    def get_connection_args(self, role: str) -> dict[str, Any]:
        """What `connect` gets for a node of `role`."""
        return {**super().get_connection_args(role), _KEY_ARGUMENT: self.key}

    def get_listen_args(self, role: str) -> dict[str, Any]:
        """What `listen` gets for a node of `role`."""
        return {**super().get_listen_args(role), _KEY_ARGUMENT: self.key}

    def __repr__(self) -> str:
        return f"KeySecurity(cluster {self.key.cluster_id.hex()}, require_encryption={self.require_encryption})"


def link_security(arguments: Mapping[str, Any], *, create: bool) -> Security:
    """How links are protected that distributed asks for with these connection arguments.

    `create`: the key file is made when there is none (for listeners). Raises SecurityError when there is no key, and when
    distributed was given certificates, which would go unused.
    """
    if arguments.get("ssl_context") is not None:
        raise SecurityError(
            "distributed was given certificates, and zmq:// has no use for them: it authenticates by a cluster key; take "
            "security=zmqtasks.integrations.distributed_comm.KeySecurity.temporary(), or protocol='tls://'"
        )
    key = arguments.get(_KEY_ARGUMENT)
    if key is None:
        path = default_key_path()
        key = create_key(path) if create else load_key(path)
    return Security(own_key(key), "on" if arguments.get("require_encryption") else None)


def own_key(key: ClusterKey) -> ClusterKey:
    """The key of distributed's links: another than that of zmqtasks nodes, so that neither gets into the other."""
    return ClusterKey(derive_key(bytes.fromhex(key.hex()), _LABEL))
