"""The cuda family: arrays in the memory of a GPU, of cupy, numba and torch, without pickle.

The array's own library copies it to the host, in the stream in which the array is used, so that what was queued before is
in the copy; it travels as a frame like any other, and the same library of the reader makes an array of it, on the GPU with
the same number, or on the current one where there are fewer. That is two copies over the bus and none on the host.

Objects of other types that have `__cuda_array_interface__` can be registered for this family; they come out as arrays of
the first of cupy, numba and torch that the writer has. What is in host memory, has a gradient or a dtype that cannot be told
is left to pickle. Nothing of CUDA is imported before there is something to write or to read.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from zmqtasks.errors import DeserializationError, SerializationError
from zmqtasks.protocol.families import numpy as numpy_family
from zmqtasks.protocol.frames import Buffer, as_bytes_view

__all__ = ["deserialize", "serialize"]

_Written = tuple[int, bytes, Sequence[Buffer]] | None
"""Number of the GPU, metadata of the library's part, and frames; None: left to pickle."""

_TORCH_INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
_TORCH_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128")
_TORCH_FLOATS_8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_TORCH_DTYPES = frozenset(_TORCH_INTEGERS + _TORCH_FLOATS + _TORCH_FLOATS_8)
_MAX_AXES = 64


def serialize(obj: Any) -> tuple[bytes, Sequence[Buffer]] | None:
    """Metadata and a frame on the host with the content; None for what needs pickle."""
    name = type(obj).__module__.partition(".")[0]
    if name not in _LIBRARIES:
        if getattr(obj, "__cuda_array_interface__", None) is None:
            return None
        name, obj = _adopt(obj)
    written = _LIBRARIES[name].write(obj)
    if written is None:
        return None
    device, inner, frames = written
    return msgpack.packb((name, device, inner)), frames


def deserialize(metadata: bytes, frames: Sequence[Buffer]) -> object:
    """The array, on a GPU of this process; DeserializationError where there is none, or its library is missing."""
    try:
        name, device, inner = msgpack.unpackb(metadata)
    except Exception as exc:
        raise DeserializationError(f"metadata of {len(metadata)} bytes describes no array on a GPU: {exc}") from exc
    library = _LIBRARIES.get(name) if type(name) is str else None
    if library is None or type(device) is not int or device < 0 or type(inner) is not bytes:
        raise DeserializationError(f"metadata of {len(metadata)} bytes describes no array on a GPU")
    make = library.prepare_untrusted(inner, frames)
    try:
        module = importlib.import_module(library.module)
    except ImportError as exc:
        raise DeserializationError(
            f"a payload holds an array of {name}, which cannot be imported here ({exc}): install it on this node, or "
            "make the array one of numpy before it is sent here"
        ) from exc
    try:
        count = library.devices(module)
    except Exception as exc:  # each library has its own errors for no driver, a wrong driver, no GPU
        raise _no_gpu(name, f"{type(exc).__name__}: {exc}") from exc
    if count < 1:
        raise _no_gpu(name, f"{name} finds none")
    return make(module, device if device < count else None)


def _no_gpu(name: str, reason: str) -> DeserializationError:
    return DeserializationError(
        f"a payload holds an array of {name} on a GPU, and this process can use none ({reason}): let what takes it run "
        "on a worker with a GPU (`resources`), or make the array one of numpy before it is sent here"
    )


def _adopt(obj: Any) -> tuple[str, Any]:
    """An object that has `__cuda_array_interface__`, seen as an array of a library."""
    reasons = []
    for name, library in _LIBRARIES.items():
        try:
            return name, library.adopt(importlib.import_module(library.module), obj)
        except Exception as exc:
            reasons.append(f"{name}: {type(exc).__name__}: {exc}")
    raise SerializationError(
        f"to write a {type(obj).__qualname__} by its __cuda_array_interface__ takes one of {', '.join(_LIBRARIES)}; "
        + "; ".join(reasons)
    )


# -- cupy and numba, whose arrays on the host are numpy's


_Make = Callable[[Any, int | None], object]
"""Makes the array: of the library's module and the number of the GPU, None: the current one."""


def _prepare_numpy_untrusted(
    inner: bytes, frames: Sequence[Buffer], put: Callable[[Any, int | None, Any], Any]
) -> _Make:
    import numpy as np

    host = numpy_family.deserialize(inner, frames)
    if type(host) is not np.ndarray:
        raise DeserializationError(f"an array on a GPU is described as a {type(host).__name__}")
    return lambda module, device: put(module, device, host)


def _put_cupy(cupy: Any, device: int | None, host: Any) -> Any:
    with cupy.cuda.Device(device):  # None: the current one
        return cupy.asarray(host)


def _put_numba(cuda: Any, device: int | None, host: Any) -> Any:
    with cuda.gpus[device] if device is not None else contextlib.nullcontext():
        return cuda.to_device(host)


def _write_cupy(obj: Any) -> _Written:
    if type(obj).__name__ != "ndarray":
        return None
    device = int(obj.device.id)
    with obj.device:
        written = numpy_family.serialize(obj.get(order="A"))
    return None if written is None else (device, *written)


def _write_numba(obj: Any) -> _Written:
    if getattr(obj, "__cuda_array_interface__", None) is None:
        return None
    from numba import cuda

    owner = getattr(getattr(obj, "gpu_data", None), "context", None)
    device = int(owner.device.id) if owner is not None else int(cuda.get_current_device().id)
    with cuda.gpus[device]:
        written = numpy_family.serialize(obj.copy_to_host())
    return None if written is None else (device, *written)


# -- torch, which has dtypes that numpy has not


def _write_torch(obj: Any) -> _Written:
    import torch

    if type(obj) is not torch.Tensor or not obj.is_cuda or obj.layout is not torch.strided or obj.requires_grad:
        return None
    dtype = str(obj.dtype).rpartition(".")[2]
    if dtype not in _TORCH_DTYPES:
        return None
    inner = msgpack.packb((dtype, tuple(obj.shape), obj.element_size()))
    if obj.numel() == 0:
        return obj.device.index, inner, ()
    flat = obj.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return obj.device.index, inner, (flat.view(torch.uint8).cpu().numpy().data,)


def _prepare_torch_untrusted(inner: bytes, frames: Sequence[Buffer]) -> _Make:
    try:
        dtype, shape, item_bytes = msgpack.unpackb(inner)
    except Exception as exc:
        raise DeserializationError(f"metadata of {len(inner)} bytes describes no tensor: {exc}") from exc
    if (
        type(dtype) is not str
        or dtype not in _TORCH_DTYPES
        or type(shape) is not list
        or len(shape) > _MAX_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
        or type(item_bytes) is not int
        or not 0 < item_bytes <= 16
    ):
        raise DeserializationError(f"metadata of {len(inner)} bytes describes no tensor")
    size_bytes = math.prod(shape) * item_bytes
    if sum(memoryview(frame).nbytes for frame in frames) != size_bytes or len(frames) != (1 if size_bytes else 0):
        raise DeserializationError(f"a tensor of {size_bytes} bytes has {len(frames)} frames")
    return lambda torch, device: _make_torch(torch, device, dtype, shape, item_bytes, frames)


def _make_torch(
    torch: Any, device: int | None, dtype: str, shape: list[int], item_bytes: int, frames: Sequence[Buffer]
) -> object:
    kind = getattr(torch, dtype, None)
    if kind is None or kind.itemsize != item_bytes:
        raise DeserializationError(f"a tensor is of {dtype}, which torch {torch.__version__} does not have")
    made = torch.empty(shape, dtype=kind, device="cuda" if device is None else f"cuda:{device}")
    if frames:
        view = as_bytes_view(frames[0])
        # torch warns of memory that it must not write to, although it only reads this.
        made.view(-1).view(torch.uint8).copy_(
            torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
        )
    return made


class _Library(NamedTuple):
    """What of a library is used, given the module that it is found in."""

    module: str
    write: Callable[[Any], _Written]
    prepare_untrusted: Callable[[bytes, Sequence[Buffer]], _Make]
    """Checks what a peer wrote, before anything of the library is touched."""
    devices: Callable[[Any], int]
    adopt: Callable[[Any, Any], Any]


_LIBRARIES = {
    "cupy": _Library(
        "cupy",
        _write_cupy,
        lambda inner, frames: _prepare_numpy_untrusted(inner, frames, _put_cupy),
        lambda cupy: int(cupy.cuda.runtime.getDeviceCount()),
        lambda cupy, obj: cupy.asarray(obj),
    ),
    "numba": _Library(
        "numba.cuda",
        _write_numba,
        lambda inner, frames: _prepare_numpy_untrusted(inner, frames, _put_numba),
        lambda cuda: len(cuda.gpus),
        lambda cuda, obj: cuda.as_cuda_array(obj),
    ),
    "torch": _Library(
        "torch",
        _write_torch,
        _prepare_torch_untrusted,
        lambda torch: int(torch.cuda.device_count()),
        lambda torch, obj: torch.as_tensor(obj, device="cuda"),
    ),
}
