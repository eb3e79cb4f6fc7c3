"""Observations as JSON for ``POST /v1/actions``, and chunks as JSON back.

Images: ``{"format": "jpeg" | "png", "data": base64}`` or, in json-numpy's form,
``{"__numpy__": base64, "dtype", "shape"}``. The state is a list of numbers or json-numpy. Actions
come back as lists: a float32 printed as JSON reads back as the same float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from reflexarc.contract import ActionChunk, EncodedImage, Observation
from reflexarc.contract.codec import MAX_CONTAINER_LENGTH
from reflexarc.contract.errors import CodecError
from reflexarc.server.dialects.json_arrays import array_from_json, bytes_from_base64


def observation_from_json(value: object) -> Observation:
    """Build an Observation; raises CodecError naming the field that has the wrong form."""
    if not isinstance(value, Mapping):
        raise CodecError(f"an observation must be a JSON object, got {type(value).__name__}")
    fields: dict[str, Any] = dict(value)
    _seen(fields, "")
    if isinstance(fields.get("goal_image"), Mapping):
        fields["goal_image"] = _images(fields["goal_image"], "goal_image")
    if isinstance(fields.get("history"), list):
        fields["history"] = [
            _row(row, f"history[{index}].") for index, row in enumerate(fields["history"])
        ]
    for name in ("action_prefix", "action_guide"):
        if fields.get(name) is not None:
            fields[name] = _actions(fields[name], name)
    return Observation.from_wire(fields)


def _row(value: object, where: str) -> object:
    """A row of history with arrays; of another form than a map it is left for the next check."""
    if not isinstance(value, Mapping):
        return value
    row = dict(value)
    _seen(row, where)
    return row


def _seen(fields: dict[str, Any], where: str) -> None:
    """Images and state of an observation or of a row, in place."""
    if isinstance(fields.get("images"), Mapping):
        fields["images"] = _images(fields["images"], f"{where}images")
    if "state" in fields:
        fields["state"] = _state(fields["state"], f"{where}state")


def _images(images: Mapping[str, object], where: str) -> dict[str, Any]:
    return {name: _image(f"{where}.{name[:64]}", image) for name, image in images.items()}


def chunk_to_json(chunk: ActionChunk) -> dict[str, Any]:
    """The chunk's wire map with actions as lists."""
    return {**chunk.to_wire(), "actions": chunk.actions.tolist()}


def dump(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _image(field: str, value: object) -> EncodedImage | np.ndarray[Any, Any]:
    if isinstance(value, Mapping) and "__numpy__" in value:
        return array_from_json(field, value)
    if not isinstance(value, Mapping) or not {"format", "data"} <= set(value):
        raise CodecError(
            f"{field}: expected {{'format': 'jpeg' or 'png', 'data': base64}} or "
            "{'__numpy__': base64, 'dtype', 'shape'}",
            field=field,
        )
    if value["format"] not in ("jpeg", "png"):
        came = str(value["format"])[:40]
        raise CodecError(f"{field}: format {came!r} is not jpeg or png", field=field)
    return EncodedImage(value["format"], bytes_from_base64(field, value["data"]))


def _state(value: object, field: str) -> np.ndarray[Any, Any]:
    if isinstance(value, Mapping) and "__numpy__" in value:
        return array_from_json(field, value)
    if not isinstance(value, list) or len(value) > MAX_CONTAINER_LENGTH:
        raise CodecError(
            f"{field}: expected a list of numbers, got {type(value).__name__}", field=field
        )
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        raise CodecError(f"{field}: expected a flat list of numbers", field=field)
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError as error:
        raise CodecError(f"{field}: a number does not fit into float64", field=field) from error


def _actions(value: object, field: str) -> np.ndarray[Any, Any]:
    """Rows of equal length as ``float64 (N, D)``."""
    if isinstance(value, Mapping) and "__numpy__" in value:
        return array_from_json(field, value)
    if not isinstance(value, list) or not value or len(value) > MAX_CONTAINER_LENGTH:
        raise CodecError(f"{field}: expected a list of rows of numbers", field=field)
    rows = [_state(row, f"{field}[{index}]") for index, row in enumerate(value)]
    if len({len(row) for row in rows}) != 1:
        raise CodecError(f"{field}: rows differ in length", field=field)
    return np.stack(rows)
