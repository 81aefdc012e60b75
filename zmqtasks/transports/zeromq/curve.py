"""CURVE below ZeroMQ links: who has the cluster's secret can open and read a link, nobody else.

- *Keys.* The secret gives one key pair for listeners and another for callers, the same on every node. A caller talks to
  whom has the listeners' key only; a listener lets in whom has the callers' key only, so that it is of no use to know
  the public key of a listener.
- *Admission.* libzmq asks for it by ZAP (RFC 27), from a socket with a fixed name in its context: a thread answers there
  (a listener's loop may be any, and libzmq's I/O threads do not wait). The domain of a listener *is* the one public key
  that may come in, so the thread needs to know nothing.
- *What is left in plain* is ZMTP's greeting; handshakes are short-lived on both sides, so none can be used again.
"""

from __future__ import annotations

import functools
import hmac
import threading
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from zmqtasks.transports.derive import derive_key
from zmqtasks.transports.zeromq.sockets import MonitoredSocket, ZmqContext, ZmqSocket

_LISTENER_LABEL = b"zmqtasks curve listener v1"
_CALLER_LABEL = b"zmqtasks curve caller v1"
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The key pairs of a cluster, as libzmq writes keys (Z85, 40 characters)."""

    listener_public: bytes
    caller_public: bytes
    listener_secret: bytes = field(repr=False)
    caller_secret: bytes = field(repr=False)


@functools.lru_cache(maxsize=8)
def curve_keys(secret: bytes) -> CurveKeys:
    """The keys that belong to a cluster's encryption secret."""
    listener, caller = (z85.encode(derive_key(secret, label)) for label in (_LISTENER_LABEL, _CALLER_LABEL))
    return CurveKeys(zmq.curve_public(listener), zmq.curve_public(caller), listener, caller)


def protect_caller(sock: MonitoredSocket, secret: bytes) -> None:
    """Makes a socket that is about to connect talk to listeners of the cluster only."""
    keys = curve_keys(secret)
    sock.zmq.set(zmq.CURVE_SERVERKEY, keys.listener_public)
    sock.zmq.set(zmq.CURVE_PUBLICKEY, keys.caller_public)
    sock.zmq.set(zmq.CURVE_SECRETKEY, keys.caller_secret)


def protect_listener(sock: MonitoredSocket, secret: bytes) -> None:
    """Makes a socket that is about to be bound let in callers of the cluster only."""
    keys = curve_keys(secret)
    _have_gatekeeper(sock.context)
    sock.zmq.set(zmq.CURVE_SERVER, 1)
    sock.zmq.set(zmq.CURVE_SECRETKEY, keys.listener_secret)
    sock.zmq.set(zmq.ZAP_DOMAIN, keys.caller_public)
    sock.zmq.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gatekeeper nobody comes in


def _have_gatekeeper(context: ZmqContext) -> None:
    """Starts the thread that answers libzmq in this context, unless there is one; it ends with the context."""
    sock = context.socket(zmq.REP)
    try:
        sock.bind(_ZAP_ENDPOINT)
    except zmq.ZMQError as exc:
        sock.close(linger=0)
        if exc.errno != zmq.EADDRINUSE:
            raise
        return
    threading.Thread(target=_keep_gate, args=(sock,), name="zmqtasks-zap", daemon=True).start()


def _keep_gate(sock: ZmqSocket) -> None:
    try:
        while True:
            version, request, domain, _address, _routing_id, mechanism, *credentials = sock.recv_multipart()
            public = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
            welcome = version == _ZAP_VERSION and hmac.compare_digest(public, domain)
            sock.send_multipart([_ZAP_VERSION, request, b"200" if welcome else b"400", b"", b"", b""])
    except zmq.ContextTerminated:
        pass
    finally:
        sock.close(linger=0)
