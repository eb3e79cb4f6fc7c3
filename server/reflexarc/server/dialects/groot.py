"""GR00T's HTTP interface: ``POST /act {"observation": {...}}``.

The observation holds ``video.<camera>`` uint8 (1, H, W, 3), ``state.<part>`` float (1, D) and
``annotation.human.action.task_description`` as text or a list of one. The reply has a list
``action.<part>`` of the chunk's rows for each part. Cameras and parts of LIBERO bear the names of
GR00T's LIBERO example; those of other robots are the contract's own. The gripper runs from 1 open
to 0 closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CodecError, ContractViolationError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action
from reflexarc.server.dialects.conversions import (
    REFUSAL_BYTES,
    SCENE_CAMERA,
    WRIST_CAMERA,
    as_map,
    described,
    explained,
    gripper_commands,
    required,
    upright_to_camera,
    without_leading_ones,
)
from reflexarc.server.dialects.json_arrays import image_from_json, vector_from_json

NAME = "groot"
OBSERVATION = "observation"
_VIDEO_NAMES = {SCENE_CAMERA: "image", WRIST_CAMERA: "wrist_image"}
_LIBERO_PARTS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_INSTRUCTION_KEYS = (
    "annotation.human.action.task_description",
    "annotation.human.task_description",
    "annotation.human.coarse_action",
)
_PART = re.compile(r"([A-Za-z_][A-Za-z_]*)(\d+)")


def speaks(message: object) -> bool:
    """Whether a body of ``POST /act`` is GR00T's and not OpenVLA's."""
    return isinstance(message, Mapping) and OBSERVATION in message


def refusal(contract: PolicyContract) -> str | None:
    """Why no GR00T client can drive this policy, or None. Cameras and parts go by their names."""
    if contract.history.rows > 1:
        reason = f"history: none is sent, policy sees {contract.history.rows} steps"
    elif contract.needs_goal_image:
        reason = "goal_image: none is sent, policy needs one"
    elif contract.state.dimension and not state_parts(contract):
        reason = f"state: the parts of {contract.state.layout[:60]} have no names and lengths"
    else:
        return None
    return f"groot: {reason}"[:REFUSAL_BYTES]


def state_parts(contract: PolicyContract) -> dict[str, int]:
    """Length of each ``state.<part>``, in the contract's order; empty where unclear."""
    if contract.state.layout == LIBERO_STATE_EEF.layout:
        return {part: 2 if part == "gripper" else 1 for part in _LIBERO_PARTS}
    found = [_PART.fullmatch(part) for part in contract.state.layout.split("+")]
    parts = {match[1]: int(match[2]) for match in found if match is not None}
    clear = None not in found and sum(parts.values()) == contract.state.dimension
    return parts if clear else {}


def observation_from_request(contract: PolicyContract, message: object) -> Observation:
    """Raises CodecError or ContractViolationError naming the key that is missing or wrong."""
    expected = _expected(contract)
    body = as_map(message, OBSERVATION)
    fields = as_map(required(body, OBSERVATION, OBSERVATION, expected), expected)
    images = {}
    for camera in contract.cameras:
        key = _video_key(camera.name)
        value = image_from_json(key, required(fields, key, f"images.{camera.name}", expected))
        images[camera.name] = upright_to_camera(camera, without_leading_ones(value, 3, key), key)
    parts = [
        _state_part(fields, f"state.{part}", length, expected)
        for part, length in state_parts(contract).items()
    ]
    return Observation(
        images=images,
        state=np.concatenate(parts) if parts else np.zeros(0),
        instruction=_instruction(fields),
    )


def reply(contract: PolicyContract, chunk: ActionChunk, message: object) -> Any:
    """``{"action.<part>": rows of the chunk, (T, 1)}``."""
    actions = gripper_commands(contract, chunk.actions, opens=1.0, closes=0.0)
    names = contract.action.names
    parts = _LIBERO_PARTS if names == libero_action(1).names else names
    return {f"action.{part}": actions[:, i : i + 1].tolist() for i, part in enumerate(parts)}


def error_map(error: ReflexarcError) -> dict[str, Any]:
    """``{"error": {"code", "message", "field"}, "detail": message}``, the latter as FastAPI's."""
    keys = {f"images.{camera}": f"video.{name}" for camera, name in _VIDEO_NAMES.items()}
    told = explained(error, NAME, {**keys, "instruction": _INSTRUCTION_KEYS[0]})
    return {"error": told, "detail": told["message"]}


def _video_key(camera: str) -> str:
    return f"video.{_VIDEO_NAMES.get(camera, camera)}"


def _state_part(
    fields: Mapping[Any, Any], key: str, length: int, expected: str
) -> npt.NDArray[Any]:
    value = vector_from_json(key, required(fields, key, "state", expected))
    part = without_leading_ones(value, 1, key)
    if part.dtype.kind != "f" or part.shape != (length,):
        raise ContractViolationError(
            f"{key}: expected floats ({length},), got {described(part)}", field=key
        )
    return part


def _instruction(fields: Mapping[Any, Any]) -> str | None:
    for key in _INSTRUCTION_KEYS:
        value = fields.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            return value
        if value is not None:
            raise CodecError(f"{key}: expected a text or a list of one", field=key)
    return None


def _expected(contract: PolicyContract) -> str:
    videos = [f"{_video_key(camera.name)} uint8 (1, H, W, 3)" for camera in contract.cameras]
    states = [f"state.{part} ({length},)" for part, length in state_parts(contract).items()]
    return ", ".join([*videos, *states, _INSTRUCTION_KEYS[0]])
