"""starVLA's messages, on the same websocket as openpi's.

Request: ``{examples: [{image: [scene, wrist], lang, state?}], ...}``, or wrapped as ``{type:
"infer" | "predict_action" | "ping", request_id, payload}``. Reply: ``{status, ok, type,
request_id, data: {actions: float32 (B, T, D)}}``, gripper 1 open and 0 closed. ``unnorm_key`` and
the sampler's options are ignored: actions are un-normalised by the checkpoint's own statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CodecError, ContractViolationError
from reflexarc.contract.messages import MAX_IDENTIFIER_CHARACTERS
from reflexarc.server.dialects.conversions import (
    SCENE_CAMERA,
    WRIST_CAMERA,
    described,
    explained,
    gripper_commands,
    libero_refusal,
    required,
    state_vector,
    text,
    upright_to_camera,
)

NAME = "starvla"
MAX_EXAMPLES = 16
_ORDER = (SCENE_CAMERA, WRIST_CAMERA)
_EXPECTED = "examples: [{image: [agentview, eye_in_hand], lang: text, state: float (8,)}]"
_INFER = ("infer", "predict_action")


@dataclass(frozen=True)
class Request:
    """``kind`` is ``infer``, ``ping``, or what came and is unknown."""

    kind: str
    request_id: str
    payload: Mapping[Any, Any]


def speaks(message: object) -> bool:
    """Whether a message on the shared websocket is starVLA's and not openpi's."""
    return isinstance(message, Mapping) and ("examples" in message or "type" in message)


def refusal(contract: PolicyContract) -> str | None:
    """Why a starVLA client for LIBERO cannot drive this policy, or None when it can."""
    return libero_refusal(contract, "starVLA")


def metadata(contract: PolicyContract) -> dict[str, Any]:
    """What starVLA's clients read of the first frame."""
    sizes = {(camera.height, camera.width) for camera in contract.cameras}
    return {
        "action_chunk_size": contract.action.horizon,
        "training_obs_image_size": list(sizes.pop()) if len(sizes) == 1 else None,
        "available_unnorm_keys": [contract.family],
        "default_unnorm_key": contract.family,
    }


def request_from_message(message: Mapping[Any, Any]) -> Request:
    """The request, flat or wrapped. Raises CodecError where its payload is no map."""
    kind = message.get("type", "infer")
    payload = message.get("payload", message)
    if not isinstance(payload, Mapping):
        raise CodecError(f"payload: expected a map with {_EXPECTED}", field="payload")
    if not isinstance(kind, str):
        raise CodecError(f"type: expected text, got {described(kind)}", field="type")
    kind = "infer" if kind in _INFER else kind[:MAX_IDENTIFIER_CHARACTERS]
    return Request(kind, request_id_of(message), payload)


def request_id_of(message: Mapping[Any, Any]) -> str:
    """The id to echo; ``default`` where none came, as starVLA's server says."""
    request_id = message.get("request_id")
    known = isinstance(request_id, str | int)
    return str(request_id)[:MAX_IDENTIFIER_CHARACTERS] if known else "default"


def observations_from_payload(
    contract: PolicyContract, payload: Mapping[Any, Any]
) -> list[Observation]:
    """One observation an example. Raises CodecError or ContractViolationError naming the key."""
    examples = required(payload, "examples", "observation", _EXPECTED)
    if not isinstance(examples, list | tuple) or not 1 <= len(examples) <= MAX_EXAMPLES:
        came = f"{len(examples)} of them" if isinstance(examples, list | tuple) else "no list"
        raise CodecError(
            f"examples: expected a list of 1 to {MAX_EXAMPLES}, got {came}", field="examples"
        )
    return [_observation(contract, example, index) for index, example in enumerate(examples)]


def _observation(contract: PolicyContract, example: object, index: int) -> Observation:
    where = f"examples[{index}]"
    if not isinstance(example, Mapping):
        raise CodecError(f"{where}: expected a map, got {described(example)}", field=where)
    images = required(example, "image", "images", _EXPECTED)
    if not isinstance(images, list | tuple):
        raise CodecError(
            f"{where}.image: expected a list of images, got {described(images)}",
            field=f"{where}.image",
        )
    seen = {}
    for camera in contract.cameras:
        place = _ORDER.index(camera.name)
        if place >= len(images):
            raise ContractViolationError(
                f"{where}.image[{place}]: missing, the policy's images.{camera.name} comes from "
                f"it; {len(images)} images came, expected {', '.join(_ORDER)} in this order",
                field=f"{where}.image",
            )
        seen[camera.name] = upright_to_camera(camera, images[place], f"{where}.image[{place}]")
    return Observation(
        images=seen,
        state=state_vector(contract, example, "state", _EXPECTED),
        instruction=text(example, "lang"),
    )


def reply(
    contract: PolicyContract, request: Request, chunks: Sequence[ActionChunk]
) -> dict[str, Any]:
    """The answer to an ``infer``: gripper 1 opens and 0 closes, as its LIBERO client reads."""
    rows = [gripper_commands(contract, c.actions, opens=1.0, closes=0.0) for c in chunks]
    actions = np.ascontiguousarray(np.stack(rows), dtype=np.float32)
    return {**_head("inference_result", request.request_id, ok=True), "data": {"actions": actions}}


def pong(request: Request) -> dict[str, Any]:
    return _head("ping", request.request_id, ok=True)


def unknown_type(request: Request) -> dict[str, Any]:
    message = f"dialect {NAME}: type: {request.kind!r} is unknown; send infer or ping"
    return {**_head("unknown", request.request_id, ok=False), "error": {"message": message}}


def error_reply(error: ReflexarcError, request_id: str) -> dict[str, Any]:
    keys = {"instruction": "examples.lang", "state": "examples.state"}
    keys |= {f"images.{name}": f"examples.image[{place}]" for place, name in enumerate(_ORDER)}
    head = _head("inference_result", request_id, ok=False)
    return {**head, "error": explained(error, NAME, keys)}


def _head(kind: str, request_id: str, *, ok: bool) -> dict[str, Any]:
    return {
        "status": "ok" if ok else "error",
        "ok": ok,
        "type": kind,
        "request_id": request_id,
    }
