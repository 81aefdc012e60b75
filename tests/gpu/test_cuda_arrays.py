"""Arrays on a GPU, of each library that is installed: `python -m pytest tests/gpu` on a machine with one; see docs/ucx.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zmqtasks.protocol.frames import MIB
from zmqtasks.protocol.payload import Payload
from zmqtasks.protocol.serialize import deserialize, register_serialization, serialize
from zmqtasks.testing.comms import Recorder
from zmqtasks.testing.conformance_base import ConformanceBase


def _cupy(array: np.ndarray) -> Any:
    return pytest.importorskip("cupy").asarray(array)


def _numba(array: np.ndarray) -> Any:
    return pytest.importorskip("numba.cuda").to_device(array)


def _torch(array: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(array).to("cuda")


def _has_gpu() -> bool:
    """By CUDA's own library, which each of the three needs."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


pytestmark = pytest.mark.skipif(not _has_gpu(), reason="needs a GPU with CUDA")

libraries = pytest.mark.parametrize("put", [_cupy, _numba, _torch], ids=["cupy", "numba", "torch"])


def on_host(array: Any) -> np.ndarray:
    """The content of an array of any of them."""
    for name in ("get", "copy_to_host"):
        if hasattr(array, name):
            return getattr(array, name)()
    return array.cpu().numpy()


def there_and_back(array: Any) -> Any:
    """Through bytes of this process's own, as a transport gives them."""
    payload = serialize(array)
    assert b"cuda" in payload.header
    return deserialize(Payload(payload.header, tuple(memoryview(bytearray(frame)) for frame in payload.frames)))


@libraries
@pytest.mark.parametrize("dtype", ["u1", "i8", "f2", "f4", "f8", "c8", "?"])
def test_there_and_back(put: Callable[[np.ndarray], Any], dtype: str) -> None:
    array = (np.arange(2 * 3 * 5).reshape(2, 3, 5) % 3).astype(dtype)
    sent = put(array)
    came = there_and_back(sent)
    assert type(came) is type(sent)
    assert came.dtype == sent.dtype
    assert came.__cuda_array_interface__["data"][0] != sent.__cuda_array_interface__["data"][0]
    np.testing.assert_array_equal(on_host(came), array)


@libraries
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_shapes_with_little_in_them(put: Callable[[np.ndarray], Any], shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    came = there_and_back(put(array))
    assert tuple(came.shape) == shape
    np.testing.assert_array_equal(on_host(came), array)


@pytest.mark.parametrize("put", [_cupy, _torch], ids=["cupy", "torch"])
def test_views_with_gaps_and_other_orders(put: Callable[[np.ndarray], Any]) -> None:
    array = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    sent = put(array)
    np.testing.assert_array_equal(on_host(there_and_back(sent[::2, 1:5])), array[::2, 1:5])
    np.testing.assert_array_equal(on_host(there_and_back(sent.T)), array.T)


def test_read_only_frames() -> None:
    payload = serialize(_torch(np.arange(4.0)))
    came = deserialize(Payload(payload.header, tuple(bytes(frame) for frame in payload.frames)))
    np.testing.assert_array_equal(on_host(came), np.arange(4.0))


def test_what_torch_has_and_numpy_has_not() -> None:
    torch = pytest.importorskip("torch")
    sent = torch.arange(7, dtype=torch.bfloat16, device="cuda")
    came = there_and_back(sent)
    assert came.dtype == torch.bfloat16
    assert torch.equal(came, sent)
    turned = torch.tensor([1 + 2j, 3 - 4j], device="cuda").conj()
    assert torch.equal(there_and_back(turned), turned)


def test_tensors_with_gradients_and_on_the_host_are_pickled() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(3), torch.ones(3, device="cuda", requires_grad=True)):
        payload = serialize(tensor)
        assert b"cuda" not in payload.header
        came = deserialize(payload)
        assert torch.equal(came, tensor)
        assert came.requires_grad == tensor.requires_grad


def test_what_was_queued_before_is_in_it() -> None:
    torch = pytest.importorskip("torch")
    with torch.cuda.stream(torch.cuda.Stream()):
        work = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            work = work @ work / 4096
        assert float(there_and_back(work + 1).min()) == pytest.approx(2.0)


class Named:
    """A type of somebody else, with the interface."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__cuda_array_interface__


@libraries
def test_a_type_of_somebody_else(put: Callable[[np.ndarray], Any]) -> None:
    register_serialization(Named, family="cuda")
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    np.testing.assert_array_equal(on_host(there_and_back(Named(put(array)))), array)
    # Inside of what is pickled too, as somebody has registered it.
    whole = deserialize(serialize({"a": [Named(put(array))]}))
    np.testing.assert_array_equal(on_host(whole["a"][0]), array)


@libraries
def test_over_a_link(put: Callable[[np.ndarray], Any]) -> None:
    """The frames are what any transport takes."""

    class Links(ConformanceBase):
        scheme = "tcp"

    links = Links()
    array = np.random.default_rng(1).integers(0, 256, 8 * MIB, np.uint8)

    async def test() -> None:
        async with links.link() as (ours, theirs):
            there = Recorder(theirs)
            payload = serialize(put(array))
            ours.send([payload.header, *payload.frames])
            await asyncio.wait_for(there.wait_messages(1), 20)
            header, *frames = there.messages[0]
            np.testing.assert_array_equal(on_host(deserialize(Payload(bytes(header), tuple(frames)))), array)

    links.run(test())
