"""The cuda family where there is no GPU: what it leaves to others, and what it says. With a GPU: tests/gpu."""

from __future__ import annotations

import importlib.util
import sys

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol import families
from zmqtasks.protocol.families import cuda
from zmqtasks.protocol.families import numpy as numpy_family
from zmqtasks.protocol.payload import Payload, make_header
from zmqtasks.protocol.serialize import deserialize, serialize


def numpy_part(array: np.ndarray) -> tuple[bytes, tuple]:
    written = numpy_family.serialize(array)
    assert written is not None
    return written[0], tuple(written[1])


def payload(name: str, device: object, inner: object, frames: tuple) -> Payload:
    return Payload(make_header("cuda", msgpack.packb((name, device, inner))), frames)


@pytest.mark.parametrize("name", ["cupy", "numba", "torch"])
def test_what_cannot_be_made_here_is_said(name: str) -> None:
    if name == "torch":
        inner, frames = msgpack.packb(("float32", (2, 3), 4)), (bytearray(24),)
    else:
        inner, frames = numpy_part(np.arange(6.0))
    try:
        made = deserialize(payload(name, 0, inner, frames))
    except DeserializationError as exc:
        said = str(exc)
        expected = "install it" if importlib.util.find_spec(name) is None else "on a worker with a GPU"
        assert name in said
        assert expected in said
    else:  # there is a GPU
        assert hasattr(made, "__cuda_array_interface__")


_TORCH = msgpack.packb(("float32", (2, 3), 4))


@pytest.mark.parametrize(
    ("name", "device", "inner", "frames"),
    [
        ("jax", 0, b"", ()),
        (["cupy"], 0, b"", ()),
        ("cupy", -1, b"", ()),
        ("cupy", True, b"", ()),
        ("cupy", 0, "text", ()),
        ("cupy", 0, b"\x01", ()),
        ("numba", 0, numpy_part(np.arange(6.0))[0], (bytes(47),)),
        ("cupy", 0, *numpy_part(np.array(5.0)[()])),
        ("torch", 0, b"\xc1", ()),
        ("torch", 0, _TORCH, ()),
        ("torch", 0, _TORCH, (bytes(12), bytes(12))),
        ("torch", 0, _TORCH, (bytes(23),)),
        ("torch", 0, msgpack.packb(("load", (2,), 4)), (bytes(8),)),
        ("torch", 0, msgpack.packb(("float32", (-2, -1), 4)), (bytes(8),)),
        ("torch", 0, msgpack.packb(("float32", (2,), 17)), (bytes(34),)),
        ("torch", 0, msgpack.packb((["float32"], (2,), 4)), (bytes(8),)),
    ],
)
def test_lies(name: object, device: object, inner: object, frames: tuple) -> None:
    before = set(sys.modules)
    with pytest.raises(DeserializationError) as caught:
        cuda.deserialize(msgpack.packb((name, device, inner)), frames)
    assert "install" not in str(caught.value)
    assert not {"cupy", "torch"} & (set(sys.modules) - before)  # found before anything of the library is touched


@given(st.binary(max_size=64), st.lists(st.binary(max_size=16), max_size=3))
def test_any_metadata_is_read_or_refused(metadata: bytes, frames: list[bytes]) -> None:
    with pytest.raises(DeserializationError):
        cuda.deserialize(metadata, frames)


class Named:
    """Has the interface, and no GPU behind it."""

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": (0,), "typestr": "<f4", "data": (0, False), "version": 3}


def test_a_type_of_somebody_else_needs_a_library() -> None:
    if any(importlib.util.find_spec(name) for name in ("cupy", "numba", "torch")):
        pytest.skip("one of the libraries is installed")
    with pytest.raises(SerializationError, match="takes one of cupy, numba, torch"):
        serialize(Named(), family="cuda")


def test_what_is_on_the_host_is_left_to_pickle() -> None:
    assert cuda.serialize(np.arange(3)) is None
    with pytest.raises(SerializationError, match="let pickle do it"):
        serialize([1, 2], family="cuda")


def test_types_are_known_by_their_path() -> None:
    pending = {path: family for waiting in families._pending.values() for path, family in waiting.items()}
    for path, root in (("cupy:ndarray", "cupy"), ("torch:Tensor", "torch")):
        if root not in sys.modules:
            assert pending[path] == ("cuda", False)
