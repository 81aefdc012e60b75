"""Keys from a secret: every use has a key of its own, so that none serves two purposes."""

from __future__ import annotations

import hashlib
import hmac

_NO_SALT = bytes(hashlib.sha256().digest_size)


def derive_key(secret: bytes, label: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt, one block of output; `label` names what they are for."""
    extracted = hmac.digest(_NO_SALT, secret, "sha256")
    return hmac.digest(extracted, label + b"\x01", "sha256")
