"""The numpy family: arrays and scalars without pickle, without a copy on either side.

An array in any layout is a *block*, contiguous memory with the axes in the order in which they lie there, seen
through three operations: some axes reversed (negative strides), the axes permuted (Fortran order, transposes), some
axes repeated (stride 0, broadcast). The frame is the block's own memory; the metadata tells the operations, and the
reader applies them to the frame. Only an array with real gaps is copied, once, into a block with its axes in the same
order.

Objects, subclasses, dtypes of third parties and dtypes with attached metadata are left to pickle. The metadata comes
from a
peer: it can't name a Python object, make numpy take memory, or see beyond the frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.frames import Buffer, as_bytes_view

__all__ = ["deserialize", "serialize"]

_ARRAY, _SCALAR, _TEXT, _BYTES = range(4)

_USER_DTYPES_FROM = 24
"""Type numbers up to 23 are numpy's own; StringDType and third parties' dtypes lie above, and need pickle."""

_MAX_DTYPE_DEPTH = 32
_MAX_AXES = 64

_SIMPLE_DTYPE = re.compile(r"[<>|]([biufc]\d{1,2}|[SUV]\d{1,10}|[mM]8(\[[0-9a-zA-Z]{1,24}\])?)")

_LONG_DOUBLES = (np.dtype(np.longdouble).num, np.dtype(np.clongdouble).num)
_MANTISSA_BITS = int(np.finfo(np.longdouble).nmant)

Dtype = np.dtype[Any]
Array = np.ndarray[Any, Any]


class _Unsupported(Exception):
    """This dtype is left to pickle."""


def serialize(obj: Any) -> tuple[bytes, Sequence[Buffer]] | None:
    """Metadata and the one frame, a view of the array's memory; None for what needs pickle."""
    if type(obj) is np.str_:
        return msgpack.packb((_TEXT,)), (str(obj).encode("utf-8", "surrogatepass"),)
    if type(obj) is np.bytes_:
        return msgpack.packb((_BYTES,)), (bytes(obj),)
    if isinstance(obj, np.generic):
        kind = _SCALAR
        dtype = obj.dtype
        if type(obj) is not dtype.type:
            return None
        if dtype.kind in "biufcmM":
            return _scalar_metadata(dtype), (obj.tobytes(),)
    elif type(obj) is np.ndarray or type(obj) is np.memmap:
        kind = _ARRAY
    else:
        return None
    array = np.asarray(obj)
    try:
        encoded = _encode_dtype(array.dtype, 0)
    except _Unsupported:
        return None
    block, order, reversed_axes = _block_of(array)
    metadata = msgpack.packb((kind, encoded, array.shape, block.shape, order, reversed_axes))
    if block.nbytes == 0:
        return metadata, ()
    return metadata, (block.reshape(-1).view(np.uint8).data,)


@lru_cache(256)
def _scalar_metadata(dtype: Dtype) -> bytes:
    """Metadata of a scalar that is a number or a time: task results often are, and the few dtypes are soon all known."""
    metadata: bytes = msgpack.packb((_SCALAR, _encode_dtype(dtype, 0), (), (), (), ()))
    return metadata


def _block_of(array: Array) -> tuple[Array, list[int], list[int]]:
    """The array's memory as a C-contiguous block; the array's axes in its order; the axes that run backwards."""
    if array.flags.c_contiguous or array.nbytes == 0:
        return array, [], []
    # A repeated axis has all its items in one place: send that place once.
    array = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]
    reversed_axes = [axis for axis, stride in enumerate(array.strides) if stride < 0 and array.shape[axis] > 1]
    if reversed_axes:
        backwards = slice(None, None, -1)
        array = array[tuple(backwards if axis in reversed_axes else slice(None) for axis in range(array.ndim))]
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]) if array.shape[axis] > 1 else 0)
    return np.ascontiguousarray(array.transpose(order)), order, reversed_axes


def _encode_dtype(dtype: Dtype, depth: int) -> Any:
    """A dtype as text, `[base, shape]` (subarray) or `[names, formats, offsets, titles, itemsize, aligned]`."""
    if depth > _MAX_DTYPE_DEPTH or dtype.num >= _USER_DTYPES_FROM or dtype.hasobject or dtype.metadata:
        raise _Unsupported
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_encode_dtype(base, depth + 1), shape]
    if dtype.names is None or dtype.fields is None:
        if dtype.num in _LONG_DOUBLES:
            # 80-bit and 128-bit formats share the text "<f16": say which one it is.
            return f"{dtype.str}:{_MANTISSA_BITS}"
        if dtype.kind == "V" and dtype.type is not np.void:
            raise _Unsupported
        return dtype.str
    if dtype.type is not np.void:
        raise _Unsupported
    fields = [dtype.fields[name] for name in dtype.names]
    titles = [field[2] if len(field) == 3 else None for field in fields]
    if not all(title is None or type(title) is str for title in titles):
        raise _Unsupported
    formats = [_encode_dtype(field[0], depth + 1) for field in fields]
    return [dtype.names, formats, [field[1] for field in fields], titles, dtype.itemsize, dtype.isalignedstruct]


def deserialize(metadata: bytes, frames: Sequence[Buffer]) -> object:
    """The array, on the frame's memory: writable if the frame is, unless it is broadcast; or the scalar."""
    try:
        return _deserialize_untrusted(metadata, frames)
    except DeserializationError:
        raise
    except Exception as exc:  # msgpack's errors, too few fields, numpy's for a wrong dtype or shape
        raise DeserializationError(
            f"metadata of {len(metadata)} bytes describes no numpy object: {type(exc).__name__}: {exc}"
        ) from exc


def _deserialize_untrusted(metadata: bytes, frames: Sequence[Buffer]) -> object:
    kind, *layout = msgpack.unpackb(metadata, use_list=True)
    if kind in (_TEXT, _BYTES):
        if layout or len(frames) != 1:
            raise DeserializationError(f"a numpy text has {len(frames)} frames, not one")
        data = bytes(frames[0])
        return np.str_(data.decode("utf-8", "surrogatepass")) if kind == _TEXT else np.bytes_(data)
    if kind not in (_ARRAY, _SCALAR):
        raise DeserializationError(f"a numpy payload of the unknown kind {kind!r}")
    encoded, shape, block_shape, order, reversed_axes = layout
    dtype = _decode_dtype_untrusted(encoded, 0)
    array = _block_on_frame_untrusted(dtype, _sizes(block_shape), frames)
    if order:
        if sorted(order) != list(range(array.ndim)):
            raise DeserializationError(f"{order!r:.100} is not an order of {array.ndim} axes")
        array = array.transpose(sorted(range(array.ndim), key=order.__getitem__))
    for axis in reversed_axes:
        if axis not in range(array.ndim):
            raise DeserializationError(f"{axis!r:.100} is not one of {array.ndim} axes")
        array = array[(slice(None),) * axis + (slice(None, None, -1),)]
    if list(array.shape) != shape:
        array = np.broadcast_to(array, _sizes(shape))
    if kind == _SCALAR:
        if array.shape:
            raise DeserializationError(f"a numpy scalar has the shape {array.shape}")
        return array[()]
    return array


def _block_on_frame_untrusted(dtype: Dtype, shape: tuple[int, ...], frames: Sequence[Buffer]) -> Array:
    nbytes = math.prod(shape) * dtype.itemsize
    if len(frames) != (1 if nbytes else 0):
        raise DeserializationError(f"a numpy array of {nbytes} bytes has {len(frames)} frames")
    frame = as_bytes_view(frames[0]) if nbytes else memoryview(bytearray())
    if frame.nbytes != nbytes:
        raise DeserializationError(
            f"a numpy array of shape {shape} and {dtype} takes {nbytes} bytes, not {frame.nbytes}"
        )
    array: Array = np.ndarray(shape, dtype, buffer=frame)
    # Transports align frames; a buffer of other origin may be odd, and numpy is slow or wrong on such memory.
    return array if array.flags.aligned else array.copy()


def _sizes(values: Any) -> tuple[int, ...]:
    """A shape from a peer: a list of integers, none negative, and not more than numpy has axes."""
    if (
        type(values) is not list
        or len(values) > _MAX_AXES
        or not all(type(value) is int and value >= 0 for value in values)
    ):
        raise DeserializationError(f"{values!r:.100} is not a shape")
    return tuple(values)


def _decode_dtype_untrusted(encoded: Any, depth: int) -> Dtype:
    if depth > _MAX_DTYPE_DEPTH:
        raise DeserializationError(f"a numpy dtype is nested more than {_MAX_DTYPE_DEPTH} deep")
    if type(encoded) is str:
        return _simple_dtype_untrusted(encoded)
    if len(encoded) == 2:
        base, shape = encoded
        return np.dtype((_decode_dtype_untrusted(base, depth + 1), _sizes(shape)))
    names, formats, offsets, titles, itemsize, aligned = encoded
    dtypes = [_decode_dtype_untrusted(item, depth + 1) for item in formats]
    for dtype, offset in zip(dtypes, offsets, strict=True):
        if not 0 <= offset <= itemsize - dtype.itemsize:
            raise DeserializationError(f"a field at {offset} reaches out of a numpy dtype of {itemsize} bytes")
    fields = {"names": names, "formats": dtypes, "offsets": offsets, "itemsize": itemsize}
    if any(title is not None for title in titles):
        fields["titles"] = titles
    return np.dtype(fields, align=aligned)  # type: ignore[call-overload,no-any-return]


@lru_cache(256)
def _simple_dtype_untrusted(encoded: str) -> Dtype:
    text, _, mantissa = encoded.partition(":")
    if not _SIMPLE_DTYPE.fullmatch(text):
        raise DeserializationError(f"{text!r:.100} is not a numpy dtype that may be sent")
    if mantissa and int(mantissa) != _MANTISSA_BITS:
        raise DeserializationError(
            f"a long double with {mantissa} bits of mantissa: this machine's has {_MANTISSA_BITS}; send float64"
        )
    return np.dtype(text)
