"""Messages as bytes: msgpack with numpy arrays, the same bytes as openpi's, made safe.

An array travels as ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}`` and a numpy scalar as
``{b"__npgeneric__": True, b"data", b"dtype"}``. Decoding first walks the frame's structure
without allocating (depth, container lengths, total values, every length inside the frame), then
lets msgpack decode it; an array's dtype, shape and length are checked before the view is made.
Arrays come back as read-only views of the received bytes.

Also understood when decoding: the same map with ``str`` keys (vla-eval), msgpack-numpy's
``{b"nd": True, ...}`` without its pickle path, and ``__image__`` maps, which become
:class:`EncodedImage` and are decoded later, away from the event loop.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from reflexarc.contract.errors import CodecError, FrameTooLargeError

MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 32
MAX_CONTAINER_LENGTH = 65_536
MAX_VALUES = 262_144
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
    _check_structure(frame)
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
    return fields


def _tagged(fields: Mapping[Any, Any], tag: str) -> bool:
    return fields.get(tag.encode()) is True or fields.get(tag) is True


def _get(fields: Mapping[Any, Any], key: str) -> Any:
    return fields.get(key.encode(), fields.get(key))


def parse_dtype(text: object) -> np.dtype[Any]:
    """A bool, integer or float dtype up to 64 bits from its name; CodecError otherwise."""
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    if not isinstance(text, str) or _DTYPE.fullmatch(text) is None:
        raise CodecError(f"dtype {str(text)[:40]!r} is refused; use bool, integers or floats")
    return np.dtype(text)


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
            raise CodecError(f"array dimension {str(size)[:40]} is outside 0..{MAX_DIMENSION}")
    # Python integers do not overflow, so a huge product cannot wrap to the data's length.
    expected = math.prod(shape) * parsed.itemsize
    if expected != len(data):
        raise CodecError(f"array {parsed} {tuple(shape)} needs {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype=parsed).reshape(shape)


def _scalar(value: object, dtype: object) -> np.generic:
    parsed = parse_dtype(dtype)
    if not isinstance(value, bool | int | float):
        raise CodecError(f"a numpy scalar must hold a number, got {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            scalar: np.generic = parsed.type(value)
    except (OverflowError, ValueError) as error:
        raise CodecError(f"{str(value)[:40]} does not fit into {parsed}") from error
    return scalar


def _image(fields: Mapping[Any, Any]) -> EncodedImage:
    image_format, data, shape = (_get(fields, key) for key in ("format", "data", "shape"))
    if isinstance(image_format, bytes):
        image_format = image_format.decode("ascii", errors="replace")
    if image_format not in _IMAGE_FORMATS:
        raise CodecError(f"image format {str(image_format)[:40]!r} is not one of {_IMAGE_FORMATS}")
    if not isinstance(data, bytes):
        raise CodecError(f"image data must be bytes, got {type(data).__name__}")
    if shape is None:
        return EncodedImage(image_format, data)
    if not isinstance(shape, list | tuple) or len(shape) > 3:
        raise CodecError("image shape must be a list of at most 3 dimensions")
    if not all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape):
        raise CodecError(f"image shape {shape} is refused")
    return EncodedImage(image_format, data, tuple(shape))


# First byte of a msgpack value -> how it continues: https://github.com/msgpack/msgpack spec.md
_FIXED_PAYLOAD = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
_LENGTH_FORMAT = {
    0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I",
    0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I",
}  # fmt: skip


def _check_structure(frame: bytes | bytearray | memoryview) -> None:
    """Walk the frame without decoding it; raise CodecError before anything is allocated.

    A list of one-byte values costs eight bytes of pointers a value once decoded, so the number
    of values is bounded here, and a container's stated length is checked against the cap.
    """
    position, values = 0, 0
    remaining = [1]  # values still to come in each open container
    while remaining:
        if remaining[-1] == 0:
            remaining.pop()
            continue
        remaining[-1] -= 1
        values += 1
        if values > MAX_VALUES:
            raise CodecError(f"more than {MAX_VALUES} values in one frame; send arrays as arrays")
        position, children = _next_value(frame, position)
        if children:
            if len(remaining) > MAX_DEPTH:
                raise CodecError(f"nested deeper than {MAX_DEPTH}")
            remaining.append(children)
    if position != len(frame):
        raise CodecError(f"{len(frame) - position} bytes follow the message")


def _next_value(frame: bytes | bytearray | memoryview, position: int) -> tuple[int, int]:
    """``(position after the value's header and payload, number of child values)``."""
    if position >= len(frame):
        raise CodecError(f"the frame ends in the middle of a message, after {len(frame)} bytes")
    first = frame[position]
    position += 1
    payload, children = 0, 0
    if first <= 0x7F or first >= 0xE0:
        pass
    elif first <= 0x8F:
        children = 2 * (first & 0x0F)
    elif first <= 0x9F:
        children = first & 0x0F
    elif first <= 0xBF:
        payload = first & 0x1F
    elif first in _FIXED_PAYLOAD:
        payload = _FIXED_PAYLOAD[first]
    elif first in _LENGTH_FORMAT:
        try:
            (length,) = struct.unpack_from(_LENGTH_FORMAT[first], frame, position)
        except struct.error:
            raise CodecError("the frame ends in the middle of a length") from None
        position += struct.calcsize(_LENGTH_FORMAT[first])
        if first < 0xDC:
            payload = length
        elif length > MAX_CONTAINER_LENGTH:
            raise CodecError(f"a container of {length} values is above {MAX_CONTAINER_LENGTH}")
        else:
            children = length if first <= 0xDD else 2 * length
    else:
        raise CodecError(f"byte 0x{first:02x} at {position - 1}: extension types are refused")
    if position + payload > len(frame):
        raise CodecError(f"a value of {payload} bytes runs past the end of the frame")
    return position + payload, children
