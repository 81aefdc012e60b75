"""Who a node is in TLS: one key and one certificate, which follow from the cluster's secret and are pinned by both ends."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from zmqtasks.transports.derive import derive_key

_KEY_LABEL = b"zmqtasks tls identity v1"
_NAME = "zmqtasks node"


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What every node with the same secret presents, and accepts."""

    certificate: bytes
    """DER."""
    client: ssl.SSLContext = field(repr=False)
    server: ssl.SSLContext = field(repr=False)


@functools.lru_cache(maxsize=8)
def tls_identity(secret: bytes) -> TlsIdentity:
    """The identity that belongs to a cluster's encryption secret; made once per process."""
    private_key, certificate = _make_certificate(secret)
    contexts = []
    with _key_file(private_key, certificate) as (path, password):
        for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            context = ssl.SSLContext(protocol)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(path, password=password)
            context.load_verify_locations(cadata=certificate)
            contexts.append(context)
    client, server = contexts
    server.num_tickets = 0
    return TlsIdentity(certificate, client, server)


def certificate_of(secret: bytes) -> bytes:
    """The certificate (DER) of a cluster's encryption secret; it is no secret itself."""
    return _make_certificate(secret)[1]


def _make_certificate(secret: bytes) -> tuple[object, bytes]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding

    private_key = Ed25519PrivateKey.from_private_bytes(derive_key(secret, _KEY_LABEL))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(1)  # and Ed25519 signs without randomness: all nodes make the same bytes
        .not_valid_before(datetime.datetime(1950, 1, 1))  # the first and last dates that X.509 can say (RFC 5280)
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private_key, None)
    )
    return private_key, certificate.public_bytes(Encoding.DER)


@contextlib.contextmanager
def _key_file(private_key: object, certificate: bytes) -> Iterator[tuple[str, bytes]]:
    """A file from which `ssl`, which reads keys from files only, can load; encrypted, and in memory where possible."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    assert isinstance(private_key, Ed25519PrivateKey)
    password = secrets.token_hex(16).encode()
    pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    pem += ssl.DER_cert_to_PEM_cert(certificate).encode()
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("zmqtasks", os.MFD_CLOEXEC)
        path, temporary = f"/proc/self/fd/{descriptor}", False
    else:
        descriptor, path = tempfile.mkstemp(prefix="zmqtasks-")
        temporary = True
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pem)
        yield path, password
    finally:
        os.close(descriptor)
        if temporary:
            os.unlink(path)
