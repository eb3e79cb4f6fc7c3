"""openpi's websocket protocol with the keys of its LIBERO client.

Request: ``observation/image`` and ``observation/wrist_image`` uint8 (H, W, 3), both turned by
180°, ``observation/state`` float (8,) and ``prompt``. Reply: ``actions`` float32 (H, 7), gripper
-1 open, and timings. openpi's chunk broker slices every array of a reply along its first axis,
so the reply holds no other array. Keys that are not listed here are ignored, as openpi does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError, pack
from reflexarc.contract.errors import CodecError, ContractViolationError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF
from reflexarc.server.inference import Inference, handshake

CAMERA_KEYS = {"agentview": "observation/image", "eye_in_hand": "observation/wrist_image"}
STATE_KEY = "observation/state"
PROMPT_KEY = "prompt"
_KEY_OF_FIELD = {
    **{f"images.{camera}": key for camera, key in CAMERA_KEYS.items()},
    "state": STATE_KEY,
    "instruction": PROMPT_KEY,
}
_FIELD = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, _KEY_OF_FIELD)) + r"): ")


def refusal(contract: PolicyContract) -> str | None:
    """Why a LIBERO client of openpi cannot drive this policy, or None when it can.

    At most 123 bytes, because it is the reason of the websocket's close frame: that is the one
    place where an unmodified client shows what a server says before the first request.
    """
    supplied = set(CAMERA_KEYS)
    missing = [name for name in contract.camera_names if name not in supplied]
    if missing:
        return f"openpi sends cameras {', '.join(CAMERA_KEYS)}; policy needs {missing[0]}"[:123]
    if contract.state.layout != LIBERO_STATE_EEF.layout:
        needed = contract.state.layout[:40]
        return f"openpi LIBERO sends state {LIBERO_STATE_EEF.layout}; policy needs {needed}"
    turned = [camera for camera in contract.cameras if camera.orientation != "rotated_180"]
    if turned:
        return f"openpi sends images rotated_180; policy needs {turned[0].orientation}"
    if contract.history.rows > 1:
        return f"openpi sends no history; policy sees {contract.history.rows} steps"
    if contract.needs_goal_image:
        return "openpi sends no goal image; policy needs one"
    gripper = contract.action.gripper
    if (
        contract.action.dimension != 7
        or gripper is None
        or (gripper.open, gripper.closed) != (-1, 1)
    ):
        return (
            "openpi LIBERO executes 7 numbers with gripper -1 open, 1 closed; policy gives others"
        )
    return None


def metadata_frame(inference: Inference) -> bytes:
    """The first frame: openpi's clients keep it as the server's metadata."""
    return pack(handshake(inference))


def reply(chunk: ActionChunk, infer_ms: float, prev_total_ms: float | None) -> bytes:
    """The packed reply.

    Args:
        chunk: the answer.
        infer_ms: milliseconds from the request's arrival until now.
        prev_total_ms: how long this connection's previous request took, None for the first.
    """
    server_timing = {"infer_ms": infer_ms}
    if prev_total_ms is not None:
        server_timing["prev_total_ms"] = prev_total_ms
    return pack(
        {
            "actions": np.ascontiguousarray(chunk.actions, dtype=np.float32),
            "server_timing": server_timing,
            "policy_timing": {"infer_ms": chunk.timing["infer_ms"]},
        }
    )


def observation_from_request(contract: PolicyContract, message: object) -> Observation:
    """An Observation of the request's values. Raises CodecError naming a missing key."""
    if not isinstance(message, Mapping):
        raise CodecError(f"expected a map with {_expected(contract)}, got {type(message).__name__}")
    keys = [CAMERA_KEYS[name] for name in contract.camera_names] + [STATE_KEY]
    if contract.needs_language:
        keys.append(PROMPT_KEY)
    for key in keys:
        if key not in message:
            came = ", ".join(sorted(map(str, message)))[:300] or "none"
            raise ContractViolationError(
                f"{key}: missing; expected {_expected(contract)}; keys that came: {came}", field=key
            )
    prompt = message.get(PROMPT_KEY)
    if prompt is not None and not isinstance(prompt, str):
        raise CodecError(f"{PROMPT_KEY}: expected text, got {type(prompt).__name__}")
    images: dict[str, Any] = {name: message[CAMERA_KEYS[name]] for name in contract.camera_names}
    return Observation(images=images, state=message[STATE_KEY], instruction=prompt)


def error_text(error: ReflexarcError) -> str:
    """The text frame of an error, with openpi's keys in place of our fields."""
    message = _FIELD.sub(lambda match: f"{_KEY_OF_FIELD[match.group(1)]}: ", error.message)
    return f"reflexarc [{error.code}], dialect openpi (LIBERO): {message}"


def _expected(contract: PolicyContract) -> str:
    cameras = [
        f"{CAMERA_KEYS[camera.name]} uint8 ({camera.height}, {camera.width}, 3)"
        for camera in contract.cameras
    ]
    return ", ".join([*cameras, f"{STATE_KEY} float ({contract.state.dimension},)", PROMPT_KEY])
