"""Messages as bytes: msgpack with numpy arrays, the same bytes as openpi's, made safe.

An array travels as ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}`` and a numpy scalar as
``{b"__npgeneric__": True, b"data", b"dtype"}``. Decoding first walks the frame's structure
without allocating (depth, container lengths, total values, every length inside the frame), then
lets msgpack decode it; an array's dtype, shape and length are checked before the view is made.
Arrays come back as read-only views of the bytes that msgpack copied out of the frame.

Also understood when decoding: the same map with ``str`` keys (vla-eval), msgpack-numpy's
``{b"nd": ...}`` without its pickle path, and ``__image__`` maps, which become
:class:`EncodedImage` and are decoded later, away from the event loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as short
from typing import Any

import msgpack
import numpy as np

from reflexarc.contract.errors import CodecError, FrameTooLargeError
from reflexarc.contract.frame_structure import (
    MAX_CONTAINER_LENGTH,
    MAX_DEPTH,
    MAX_VALUES,
    check_structure,
)

__all__ = [
    "MAX_CONTAINER_LENGTH",
    "MAX_DEPTH",
    "MAX_FRAME_BYTES",
    "MAX_VALUES",
    "EncodedImage",
    "array_from_bytes",
    "pack",
    "unpack",
]

MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_DIMENSIONS = 6
MAX_DIMENSION = 65_536
_IMAGE_FORMATS = ("jpeg", "png", "raw")
_DTYPE = re.compile(
    r"(?:[<>|=]?(?:f[248]|[iu][1248]|b1)|bool|float(?:16|32|64)|u?int(?:8|16|32|64))"
)


@dataclass(frozen=True)
class EncodedImage:
    """A compressed image inside a message: ``format`` is ``jpeg``, ``png`` or ``raw``."""

    format: str
    data: bytes
    shape: tuple[int, ...] | None = None


def pack(message: object) -> bytes:
    """Encode a message. Raises CodecError naming a type or dtype that cannot travel."""
    try:
        packed: bytes = msgpack.packb(message, default=_to_map)
    except (TypeError, ValueError, OverflowError) as error:
        raise CodecError(f"this message cannot be encoded: {error}") from error
    return packed


def unpack(frame: bytes | bytearray | memoryview, *, max_bytes: int = MAX_FRAME_BYTES) -> Any:
    """Decode one frame.

    Raises:
        FrameTooLargeError: the frame is longer than ``max_bytes``.
        CodecError: anything else that is wrong with it. No other error leaves this function,
            and no allocation exceeds a small multiple of the frame's length.
    """
    if len(frame) > max_bytes:
        raise FrameTooLargeError(f"frame of {len(frame)} bytes is above the cap of {max_bytes}")
    check_structure(frame)
    try:
        return msgpack.unpackb(
            frame,
            object_hook=_from_map,
            strict_map_key=True,
            max_array_len=MAX_CONTAINER_LENGTH,
            max_map_len=MAX_CONTAINER_LENGTH,
            max_ext_len=0,
        )
    except CodecError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        # UnicodeDecodeError, ExtraData, FormatError and StackError are ValueErrors.
        reason = str(error) or type(error).__name__
        raise CodecError(f"the frame is not a valid message: {reason[:200]}") from error


def _to_map(value: object) -> object:
    if isinstance(value, np.ndarray):
        _refuse_kind(value.dtype)
        if value.ndim > MAX_DIMENSIONS or max(value.shape, default=0) > MAX_DIMENSION:
            raise TypeError(
                f"an array {value.shape} cannot travel; at most {MAX_DIMENSIONS} dimensions of "
                f"at most {MAX_DIMENSION}"
            )
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        _refuse_kind(value.dtype)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    if isinstance(value, EncodedImage):
        return {
            b"__image__": True,
            b"format": value.format,
            b"data": value.data,
            b"shape": value.shape,
        }
    raise TypeError(f"no encoding for {type(value).__module__}.{type(value).__qualname__}")


def _refuse_kind(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf" or _DTYPE.fullmatch(dtype.str) is None:
        raise TypeError(f"dtype {dtype} cannot travel; use bool, integers or floats up to 64 bits")


def _from_map(fields: dict[Any, Any]) -> Any:
    if _TAGS.isdisjoint(fields):  # most maps; this hook runs for each of a frame
        return fields
    if _tagged(fields, "__ndarray__"):
        return _array(_get(fields, "data"), _get(fields, "dtype"), _get(fields, "shape"))
    if _tagged(fields, "__npgeneric__"):
        return _scalar(_get(fields, "data"), _get(fields, "dtype"))
    if _tagged(fields, "__image__"):
        return _image(fields)
    if _tagged(fields, "nd"):  # msgpack-numpy
        if _get(fields, "kind") not in (b"", "", None):
            raise CodecError("a msgpack-numpy array of this kind would need pickle: refused")
        return _array(_get(fields, "data"), _get(fields, "type"), _get(fields, "shape"))
    if _get(fields, "nd") is False and _get(fields, "type") is not None:  # its scalar
        return _array(_get(fields, "data"), _get(fields, "type"), ())[()]
    return fields


_TAGS = frozenset(
    form
    for tag in ("__ndarray__", "__npgeneric__", "__image__", "nd")
    for form in (tag, tag.encode())
)


def _tagged(fields: Mapping[Any, Any], tag: str) -> bool:
    return fields.get(tag.encode()) is True or fields.get(tag) is True


def _get(fields: Mapping[Any, Any], key: str) -> Any:
    return fields.get(key.encode(), fields.get(key))


def parse_dtype(text: object) -> np.dtype[Any]:
    """A bool, integer or float dtype up to 64 bits from its name; CodecError otherwise."""
    if not isinstance(text, str | bytes):
        raise CodecError(f"dtype {short(text)} is refused; use bool, integers or floats")
    return _dtype_named(text)


@lru_cache(maxsize=256)
def _dtype_named(text: str | bytes) -> np.dtype[Any]:
    name = text.decode("ascii", errors="replace") if isinstance(text, bytes) else text
    if _DTYPE.fullmatch(name) is None:
        raise CodecError(f"dtype {short(name)} is refused; use bool, integers or floats")
    return np.dtype(name)


def array_from_bytes(data: bytes, dtype: object, shape: object) -> np.ndarray[Any, Any]:
    """A read-only view of ``data``, after dtype, dimensions and length were checked."""
    return _array(data, dtype, shape)


def _array(data: object, dtype: object, shape: object) -> np.ndarray[Any, Any]:
    parsed = parse_dtype(dtype)
    if not isinstance(data, bytes):
        raise CodecError(f"array data must be bytes, got {type(data).__name__}")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise CodecError(f"array shape must be a list of at most {MAX_DIMENSIONS} dimensions")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_DIMENSION:
            raise CodecError(f"array dimension {short(size)} is outside 0..{MAX_DIMENSION}")
    # Python integers do not overflow, so a huge product cannot wrap to the data's length.
    expected = math.prod(shape) * parsed.itemsize
    if expected != len(data):
        raise CodecError(f"array {parsed} {tuple(shape)} needs {expected} bytes, got {len(data)}")
    try:
        return np.frombuffer(data, dtype=parsed).reshape(shape)
    except ValueError as error:  # an empty array whose other dimensions overflow
        raise CodecError(f"array shape {tuple(shape)} is refused: {error}") from error


def _scalar(value: object, dtype: object) -> np.generic:
    parsed = parse_dtype(dtype)
    if parsed.kind == "b":
        fits = isinstance(value, bool)
    elif parsed.kind == "f":
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        limits = np.iinfo(parsed)
        fits = type(value) is int and limits.min <= value <= limits.max
    if not fits:
        raise CodecError(f"{short(value)} ({type(value).__name__}) does not fit into {parsed}")
    with np.errstate(over="ignore"):
        scalar: np.generic = parsed.type(value)
    return scalar


def _image(fields: Mapping[Any, Any]) -> EncodedImage:
    image_format, data, shape = (_get(fields, key) for key in ("format", "data", "shape"))
    if isinstance(image_format, bytes):
        image_format = image_format.decode("ascii", errors="replace")
    if image_format not in _IMAGE_FORMATS:
        raise CodecError(f"image format {short(image_format)} is not one of {_IMAGE_FORMATS}")
    if not isinstance(data, bytes):
        raise CodecError(f"image data must be bytes, got {type(data).__name__}")
    if shape is None:
        return EncodedImage(image_format, data)
    if not isinstance(shape, list | tuple) or len(shape) > 3:
        raise CodecError("image shape must be a list of at most 3 dimensions")
    if not all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape):
        raise CodecError(f"image shape {short(shape)} is refused")
    return EncodedImage(image_format, data, tuple(shape))
