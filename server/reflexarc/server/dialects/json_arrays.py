"""Arrays inside JSON: json-numpy's form, and lists of numbers.

``json_numpy.patch()`` is never called: it changes the json module of the whole process and turns
a foreign dtype into an array unchecked. Here dtype, shape and length are checked first.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.codec import array_from_bytes
from reflexarc.contract.errors import CodecError, FrameTooLargeError

# A list of small numbers takes four times its JSON text once parsed: cap lower than for msgpack.
MAX_JSON_BYTES = 16 * 1024 * 1024
_DATA_KEYS = ("__numpy__", "__ndarray__")  # json-numpy; GR00T's clients in C++


def parse_json(body: bytes | str) -> object:
    """The JSON value of a body. Raises FrameTooLargeError or CodecError."""
    if len(body) > MAX_JSON_BYTES:
        raise FrameTooLargeError(
            f"JSON of {len(body)} bytes is above the cap of {MAX_JSON_BYTES}; send msgpack"
        )
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise CodecError(f"the body is not JSON: {reason}") from error


def array_from_json(key: str, value: object) -> npt.NDArray[Any]:
    """An array from json-numpy's map, from that map as JSON text, or from (nested) lists.

    Raises CodecError naming ``key``.
    """
    if isinstance(value, str):
        value = parse_json(value)
    if isinstance(value, list):
        return _from_lists(key, value)
    if isinstance(value, Mapping):
        for data_key in _DATA_KEYS:
            if data_key in value:
                data = bytes_from_base64(key, value[data_key])
                try:
                    return array_from_bytes(data, value.get("dtype"), value.get("shape"))
                except CodecError as error:
                    raise CodecError(f"{key}: {error.message}", field=key) from error
    raise CodecError(
        f"{key}: expected {{'__numpy__': base64, 'dtype', 'shape'}} or lists of numbers, got "
        f"{type(value).__name__}",
        field=key,
    )


def image_from_json(key: str, value: object) -> npt.NDArray[Any]:
    """As :func:`array_from_json`; whole numbers from 0 to 255 in lists become ``uint8``."""
    array = array_from_json(key, value)
    fits = array.dtype == np.int64 and array.size > 0 and 0 <= array.min() <= array.max() <= 255
    return array.astype(np.uint8) if fits else array


def vector_from_json(key: str, value: object) -> npt.NDArray[Any]:
    """As :func:`array_from_json`; whole numbers in lists become ``float64``."""
    array = array_from_json(key, value)
    return array.astype(np.float64) if array.dtype == np.int64 else array


def array_to_json(array: npt.NDArray[Any]) -> dict[str, Any]:
    """json-numpy's map."""
    return {
        "__numpy__": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def bytes_from_base64(key: str, value: object) -> bytes:
    """Raises CodecError naming ``key``."""
    if not isinstance(value, str):
        raise CodecError(f"{key}: data must be base64 text, got {type(value).__name__}", field=key)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CodecError(f"{key}: the data is not base64: {error}", field=key) from error


def _from_lists(key: str, value: list[Any]) -> npt.NDArray[Any]:
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise CodecError(f"{key}: the lists are no array: {str(error)[:100]}", field=key) from error
    if array.dtype.kind not in "if":
        raise CodecError(f"{key}: expected lists of numbers, got {array.dtype.name}", field=key)
    return array
