"""Named steps between what foreign clients send or execute and what a contract says.

Clients of other projects send upright images (LIBERO's, turned by half a turn) of any size, the
scene camera before the wrist camera, LIBERO's state as one vector, and execute LIBERO's seven
numbers with their own gripper commands. What no step here can bridge is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import Camera, EncodedImage, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CodecError, ContractViolationError
from reflexarc.contract.images import UInt8Image, decode_image, resize_bilinear, rotate_180
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF

SCENE_CAMERA, WRIST_CAMERA = "agentview", "eye_in_hand"
REFUSAL_BYTES = 123  # what the reason of a websocket's close frame holds
_KEYS_NAMED = 300


def libero_refusal(contract: PolicyContract, client: str, *, history: bool = False) -> str | None:
    """Why a client that sends LIBERO's observations cannot drive a policy, or None when it can.

    Args:
        contract: of the policy.
        client: whose clients they are.
        history: whether earlier steps of an episode can be supplied.

    Names the contract's field. At most 123 bytes, because it is the reason of a close frame: the
    one place where unmodified clients show what a server says before the first request.
    """
    other = [name for name in contract.camera_names if name not in (SCENE_CAMERA, WRIST_CAMERA)]
    if other:
        reason = f"images.{other[0][:40]}: only {SCENE_CAMERA} and {WRIST_CAMERA} are sent"
    elif contract.state.dimension and contract.state.layout != LIBERO_STATE_EEF.layout:
        needed = contract.state.layout[:40]
        reason = f"state: {LIBERO_STATE_EEF.layout} is sent, policy needs {needed}"
    elif contract.history.rows > 1 and not history:
        reason = f"history: none is sent, policy sees {contract.history.rows} steps"
    elif contract.needs_goal_image:
        reason = "goal_image: none is sent, policy needs one"
    elif not _executable_in_libero(contract):
        reason = "action: 7 deltas with a gripper are executed, policy gives others"
    else:
        return None
    return f"{client}: {reason}"[:REFUSAL_BYTES]


def refused(refusal: str) -> ContractViolationError:
    """The error of a refusal, for a request that came nevertheless."""
    _, field, reason = refusal.split(": ", 2)
    return ContractViolationError(f"{field}: {reason}", field=field)


def _executable_in_libero(contract: PolicyContract) -> bool:
    action = contract.action
    gripper = action.gripper
    return (
        action.kind == "delta_osc"
        and action.dimension == 7
        and gripper is not None
        and gripper.index == 6
    )


def upright_to_camera(camera: Camera, image: object, key: str) -> UInt8Image:
    """A client's upright image as the contract's camera gives it, ``uint8 (height, width, 3)``.

    Steps: decode (the header's size is checked first), ``rotate_180`` for a camera whose images
    are LIBERO's own, ``resize_bilinear``. An image of another shape is not squeezed in silence.

    Raises CodecError or ContractViolationError naming ``key``.
    """
    if isinstance(image, EncodedImage):
        try:
            image = decode_image(image, camera=camera)
        except CodecError as error:
            raise CodecError(f"{key}: {error.message}", field=key) from error
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise ContractViolationError(
            f"{key}: expected uint8 (H, W, 3) RGB, got {described(image)}", field=key
        )
    height, width = image.shape[:2]
    if height == 0 or height * camera.width != width * camera.height:
        raise ContractViolationError(
            f"{key}: {height} high and {width} wide, where the policy's camera has "
            f"{camera.height} and {camera.width}; crop or pad it to that shape",
            field=key,
        )
    turned = rotate_180(image) if camera.orientation == "opengl" else image
    return np.ascontiguousarray(resize_bilinear(turned, camera.height, camera.width))


def without_leading_ones(array: object, dimensions: int, key: str) -> npt.NDArray[Any]:
    """An array without the axes of length 1 that stand for batch and time.

    Raises ContractViolationError naming ``key`` where an axis that has to go is longer.
    """
    if not isinstance(array, np.ndarray):
        raise CodecError(f"{key}: expected an array, got {described(array)}", field=key)
    extra = max(array.ndim - dimensions, 0)
    if any(size != 1 for size in array.shape[:extra]):
        raise ContractViolationError(
            f"{key}: one observation is answered at a time, got {described(array)}", field=key
        )
    reshaped: npt.NDArray[Any] = array.reshape(array.shape[extra:])
    return reshaped


def gripper_commands(
    contract: PolicyContract, actions: npt.NDArray[np.float32], *, opens: float, closes: float
) -> npt.NDArray[np.float32]:
    """Actions ``(T, D)`` whose gripper column runs from the client's ``opens`` to ``closes``.

    Other columns, and a robot without gripper, are left as they are.
    """
    gripper = contract.action.gripper
    if gripper is None or (gripper.open, gripper.closed) == (opens, closes):
        return actions
    converted: npt.NDArray[np.float32] = actions.copy()
    closed = (actions[:, gripper.index] - gripper.open) / (gripper.closed - gripper.open)
    converted[:, gripper.index] = opens + closed * (closes - opens)
    return converted


def state_vector(
    contract: PolicyContract, message: Mapping[Any, Any], key: str, expected: str
) -> Any:
    """The state ``(S,)`` under ``key``, without axes of length 1; empty for a policy without."""
    if contract.state.dimension == 0:
        return np.zeros(0)
    return without_leading_ones(required(message, key, "state", expected), 1, key)


def as_map(message: object, expected: str) -> Mapping[Any, Any]:
    """The message, which has to be a map; CodecError saying what was expected."""
    if not isinstance(message, Mapping):
        raise CodecError(f"expected a map with {expected}, got {type(message).__name__}")
    return message


def required(message: Mapping[Any, Any], key: str, field: str, expected: str) -> Any:
    """The value under ``key``.

    Raises ContractViolationError naming the key, the contract's field that it stands for, what
    was expected and which keys came.
    """
    if message.get(key) is None:
        came = ", ".join(sorted(map(str, message)))[:_KEYS_NAMED] or "none"
        raise ContractViolationError(
            f"{key}: missing, the policy's {field} comes from it; expected {expected}; "
            f"keys that came: {came}",
            field=key,
        )
    return message[key]


def text(message: Mapping[Any, Any], key: str) -> str | None:
    """A text under ``key``, or None where nothing came. Raises CodecError naming the key."""
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise CodecError(f"{key}: expected text, got {type(value).__name__}", field=key)
    return value


def explained(
    error: ReflexarcError, dialect: str, key_of_field: Mapping[str, str]
) -> dict[str, Any]:
    """``{"code", "message", "field"}`` with the client's keys in place of the contract's fields."""
    message = error.message
    if key_of_field:
        fields = "|".join(map(re.escape, key_of_field))
        message = re.sub(
            rf"(?<![\w.])({fields}): ", lambda match: f"{key_of_field[match.group(1)]}: ", message
        )
    return {
        "code": error.code,
        "message": f"dialect {dialect}: {message}",
        "field": None if error.field is None else key_of_field.get(error.field, error.field),
    }


def described(value: object) -> str:
    """Dtype and shape of an array, the type of anything else."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return type(value).__name__
