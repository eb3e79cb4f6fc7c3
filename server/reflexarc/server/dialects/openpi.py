"""openpi's websocket protocol with the keys of its LIBERO client.

Request: ``observation/image`` and ``observation/wrist_image`` uint8 (H, W, 3), both upright and
of the contract's size, ``observation/state`` float (8,) and ``prompt``. Reply: ``actions``
float32 (H, 7), gripper -1 open, and timings. openpi's chunk broker slices every array of a reply
along its first axis, so the reply holds no other array. Keys that are not listed here are
ignored, as openpi does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reflexarc.contract import (
    ActionChunk,
    Camera,
    Observation,
    PolicyContract,
    ReflexarcError,
    pack,
)
from reflexarc.contract.errors import ContractViolationError
from reflexarc.contract.images import rotate_180
from reflexarc.server.dialects.conversions import (
    SCENE_CAMERA,
    WRIST_CAMERA,
    as_map,
    described,
    explained,
    gripper_commands,
    libero_refusal,
    required,
    state_vector,
    text,
)

NAME = "openpi"
CAMERA_KEYS = {SCENE_CAMERA: "observation/image", WRIST_CAMERA: "observation/wrist_image"}
STATE_KEY = "observation/state"
PROMPT_KEY = "prompt"
_KEY_OF_FIELD = {
    **{f"images.{camera}": key for camera, key in CAMERA_KEYS.items()},
    "state": STATE_KEY,
    "instruction": PROMPT_KEY,
}


def refusal(contract: PolicyContract) -> str | None:
    """Why a LIBERO client of openpi cannot drive this policy, or None when it can."""
    return libero_refusal(contract, "openpi")


def reply(
    contract: PolicyContract, chunk: ActionChunk, infer_ms: float, prev_total_ms: float | None
) -> bytes:
    """The packed reply, gripper -1 open and 1 closed.

    Args:
        contract: of the policy.
        chunk: the answer.
        infer_ms: milliseconds from the request's arrival until now.
        prev_total_ms: how long this connection's previous request took, None for the first.
    """
    server_timing = {"infer_ms": infer_ms}
    if prev_total_ms is not None:
        server_timing["prev_total_ms"] = prev_total_ms
    actions = gripper_commands(contract, chunk.actions, opens=-1.0, closes=1.0)
    return pack(
        {
            "actions": np.ascontiguousarray(actions, dtype=np.float32),
            "server_timing": server_timing,
            "policy_timing": {"infer_ms": chunk.timing["infer_ms"]},
        }
    )


def observation_from_request(contract: PolicyContract, message: object) -> Observation:
    """An Observation of the request's values. Raises CodecError naming a missing key."""
    expected = _expected(contract)
    request = as_map(message, expected)
    images = {}
    for camera in contract.cameras:
        name = camera.name
        image = required(request, CAMERA_KEYS[name], f"images.{name}", expected)
        images[name] = _oriented(camera, image)
    if contract.needs_language:
        required(request, PROMPT_KEY, "instruction", expected)
    return Observation(
        images=images,
        state=state_vector(contract, request, STATE_KEY, expected),
        instruction=text(request, PROMPT_KEY),
    )


def _oriented(camera: Camera, image: Any) -> Any:
    """openpi's clients resize by themselves, so that an image of another size is an error."""
    if camera.orientation != "opengl":
        return image
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        key = CAMERA_KEYS[camera.name]
        raise ContractViolationError(
            f"{key}: expected a uint8 array (H, W, 3), got {described(image)}", field=key
        )
    return rotate_180(image)


def error_text(error: ReflexarcError) -> str:
    """The text frame of an error, with openpi's keys in place of our fields."""
    return f"reflexarc [{error.code}], {explained(error, NAME, _KEY_OF_FIELD)['message']}"


def _expected(contract: PolicyContract) -> str:
    cameras = [
        f"{CAMERA_KEYS[camera.name]} uint8 ({camera.height}, {camera.width}, 3)"
        for camera in contract.cameras
    ]
    return ", ".join([*cameras, f"{STATE_KEY} float ({contract.state.dimension},)", PROMPT_KEY])
