"""HDF5 attributes and small arrays as JSON and back, with their types."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from reflexarc.contract.errors import DatasetError


def encode_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """All attributes of a group by name."""
    return {name: encode_value(value) for name, value in attributes.items()}


def write_attributes(target: Any, encoded: Mapping[str, Any]) -> None:
    """The reverse of :func:`encode_attributes`."""
    for name, value in encoded.items():
        target.attrs[name] = decode_value(value)


def encode_value(value: Any) -> dict[str, Any]:
    """One value; DatasetError for a type that JSON cannot hold here."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, h5py.Empty):
        return {"empty": str(value.dtype)}
    array = np.asarray(value)
    if array.dtype.kind in "biufS":
        data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}
    if array.dtype.kind in "OU":
        texts = [v.decode() if isinstance(v, bytes) else str(v) for v in array.reshape(-1)]
        return {"texts": texts, "shape": list(array.shape)}
    raise DatasetError(f"an HDF5 value of type {array.dtype} cannot be converted")


def decode_value(encoded: Mapping[str, Any]) -> Any:
    """The reverse of :func:`encode_value`."""
    if "text" in encoded:
        return encoded["text"]
    if "bytes" in encoded:
        return np.bytes_(base64.b64decode(encoded["bytes"]))
    if "empty" in encoded:
        return h5py.Empty(np.dtype(encoded["empty"]))
    shape = tuple(encoded["shape"])
    if "texts" in encoded:
        return np.array(encoded["texts"], dtype=h5py.string_dtype()).reshape(shape)
    raw = np.frombuffer(base64.b64decode(encoded["data"]), dtype=np.dtype(encoded["dtype"]))
    return raw.reshape(shape).copy() if shape else raw[0]
