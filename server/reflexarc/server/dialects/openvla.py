"""OpenVLA's REST interface, ``POST /act``, and that of OpenVLA-OFT.

OpenVLA: ``{image, instruction}``, answered with one action. OFT: ``{full_image, *wrist*, state,
instruction}``, answered with a list of actions. Arrays are json-numpy's maps, in the reply too;
``{"encoded": "<json>"}`` is answered with JSON text inside a JSON string. The gripper runs from 1
open to 0 closed, as in OpenVLA's datasets. ``unnorm_key`` is ignored: a checkpoint has its own
statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import ContractViolationError
from reflexarc.server.dialects.conversions import (
    SCENE_CAMERA,
    WRIST_CAMERA,
    as_map,
    explained,
    gripper_commands,
    libero_refusal,
    required,
    state_vector,
    text,
    upright_to_camera,
)
from reflexarc.server.dialects.json_arrays import (
    array_to_json,
    image_from_json,
    parse_json,
    vector_from_json,
)

NAME = "openvla"
_ONE, _CHUNK = "image", "full_image"
_KEY_OF_FIELD = {
    f"images.{SCENE_CAMERA}": _CHUNK,
    f"images.{WRIST_CAMERA}": "wrist_image",
}


def refusal(contract: PolicyContract) -> str | None:
    """Why OpenVLA's and OFT's LIBERO clients cannot drive this policy, or None."""
    return libero_refusal(contract, "openvla")


def unwrapped(message: object) -> tuple[object, bool]:
    """A request, and whether it came as ``{"encoded": "<json>"}``, which asks for such a reply."""
    if isinstance(message, Mapping) and isinstance(message.get("encoded"), str):
        return parse_json(message["encoded"]), True
    return message, False


def observation_from_request(contract: PolicyContract, message: object) -> Observation:
    """Raises CodecError or ContractViolationError naming the key that is missing or wrong."""
    expected = _expected(contract)
    request = as_map(message, expected)
    keys = {SCENE_CAMERA: _ONE if _CHUNK not in request else _CHUNK}
    if WRIST_CAMERA in contract.camera_names:
        keys[WRIST_CAMERA] = _wrist_key(request)
    images = {}
    for camera in contract.cameras:
        key = keys[camera.name]
        value = required(request, key, f"images.{camera.name}", expected)
        images[camera.name] = upright_to_camera(camera, image_from_json(key, value), key)
    if request.get("state") is not None:
        request = {**request, "state": vector_from_json("state", request["state"])}
    return Observation(
        images=images,
        state=state_vector(contract, request, "state", expected),
        instruction=text(request, "instruction"),
    )


def _wrist_key(request: Mapping[Any, Any]) -> str:
    keys = [key for key in request if isinstance(key, str) and "wrist" in key]
    if len(keys) > 1:
        raise ContractViolationError(
            f"{keys[1][:40]}: the policy has one wrist camera, images.{WRIST_CAMERA}; "
            f"{len(keys)} images came",
            field=keys[1][:40],
        )
    return keys[0] if keys else "wrist_image"


def reply(contract: PolicyContract, chunk: ActionChunk, message: object) -> Any:
    """One action for OpenVLA's ``image``, a list of them for OFT's ``full_image``."""
    actions = gripper_commands(contract, chunk.actions, opens=1.0, closes=0.0)
    whole = isinstance(message, Mapping) and _CHUNK in message
    return [array_to_json(row) for row in actions] if whole else array_to_json(actions[0])


def error_map(error: ReflexarcError) -> dict[str, Any]:
    """``{"error": {"code", "message", "field"}}``."""
    return {"error": explained(error, NAME, _KEY_OF_FIELD)}


def _expected(contract: PolicyContract) -> str:
    images = [
        f"{_KEY_OF_FIELD[f'images.{name}']} uint8 (H, W, 3)" for name in contract.camera_names
    ]
    state = [f"state float ({contract.state.dimension},)"] if contract.state.dimension else []
    return ", ".join([*images, *state, "instruction"])
