"""vla-eval's websocket protocol, version 1: one observation a step, one action back.

Frames are maps ``{type, payload, seq, timestamp}``. The client says ``hello``, then for each
episode ``episode_start``, an ``observation`` a step, ``episode_end``. An observation is
``{images: {agentview, wrist}, task_description, states}``; its answer is an ``action`` with the
same seq and ONE action ``float32 (D,)``, so the connection's :class:`Session` keeps the chunk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import ActionChunk, HistoryRow, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CodecError
from reflexarc.server.dialects.conversions import (
    REFUSAL_BYTES,
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

NAME = "vla_eval"
PROTOCOL_VERSION = 1
TYPES = ("hello", "observation", "episode_start", "episode_end", "error")
_IMAGE_KEYS = {SCENE_CAMERA: "agentview", WRIST_CAMERA: "wrist"}
_KEY_OF_FIELD = {
    **{f"images.{camera}": f"images.{key}" for camera, key in _IMAGE_KEYS.items()},
    "state": "states",
    "instruction": "task_description",
}
_EXPECTED = "images {agentview, wrist}, states float (8,), task_description"
_STATE_SPEC = {"name": "state", "dims": 8, "format": "eef_pos3_axisangle3_gripper2"}
_IMAGE_SPEC = {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}


@dataclass(frozen=True)
class Message:
    """A frame: ``kind`` is one of TYPES; ``seq`` is echoed in its answer."""

    kind: str
    payload: Mapping[Any, Any]
    seq: int


def message_from_map(message: object) -> Message:
    """Raises CodecError naming the key that is wrong."""
    fields = as_map(message, "type, payload, seq, timestamp")
    kind, payload = fields.get("type"), fields.get("payload")
    if not isinstance(kind, str) or kind not in TYPES:
        raise CodecError(f"type: {str(kind)[:40]!r} is not one of {', '.join(TYPES)}", field="type")
    if not isinstance(payload, Mapping):
        raise CodecError(f"payload: expected a map, got {type(payload).__name__}", field="payload")
    return Message(kind, payload, seq_of(fields))


def seq_of(message: object) -> int:
    """The number to echo, also when the rest of the message is wrong."""
    seq = message.get("seq") if isinstance(message, Mapping) else None
    return seq if isinstance(seq, int) else 0


def refusal(contract: PolicyContract, hello: Mapping[Any, Any] | None = None) -> str | None:
    """Why this client cannot drive the policy, or None; at most 123 bytes."""
    came = PROTOCOL_VERSION if hello is None else hello.get("protocol_version")
    if type(came) is not int or came != PROTOCOL_VERSION:  # an array has no truth value
        shown = str(came)[:20]
        reason = f"vla-eval: protocol_version: {shown} came, version {PROTOCOL_VERSION} is spoken"
        return reason[:REFUSAL_BYTES]
    return libero_refusal(contract, "vla-eval", history=True)


def replan_steps(contract: PolicyContract, came: str | None) -> int:
    """Actions of a chunk that are executed: as the URL says, else all. Raises CodecError."""
    horizon = contract.action.horizon
    if came is None:
        return horizon
    if not came.isascii() or not came.isdigit() or not 1 <= int(came[:9]) <= horizon:
        raise CodecError(
            f"replan_steps: {came[:20]!r} is not in 1..{horizon}", field="replan_steps"
        )
    return int(came)


def hello_reply(contract: PolicyContract, seq: int) -> dict[str, Any]:
    """What the policy needs; the harness merges ``observation_params`` into the benchmark's."""
    wrist = WRIST_CAMERA in contract.camera_names
    images = [key for camera, key in _IMAGE_KEYS.items() if camera in contract.camera_names]
    return _frame(
        "hello",
        {
            "harness_version": f"reflexarc {version('reflexarc')}",
            "protocol_version": PROTOCOL_VERSION,
            "model_server": f"reflexarc {contract.family}",
            "capabilities": {},
            "observation_params": {
                "send_state": contract.state.dimension > 0,
                "send_wrist_image": wrist,
                # LIBERO's demonstrations hold robosuite's axis-angle, which keeps the sign.
                "quat_no_antipodal": True,
            },
            "action_spec": {
                "position": _spec("position", 3, "delta_xyz", -1, 1),
                "rotation": _spec("rotation", 3, "axis_angle", -3.15, 3.15),
                "gripper": _spec("gripper", 1, "binary_close_positive", -1, 1),
            },
            "observation_spec": {
                **dict.fromkeys(images, _IMAGE_SPEC),
                **({"state": _STATE_SPEC} if contract.state.dimension else {}),
                "language": {"name": "language", "dims": 0, "format": "language"},
            },
        },
        seq,
    )


def action_reply(action: npt.NDArray[np.float32], seq: int) -> dict[str, Any]:
    # Unlike openpi's codec, vla-eval's has text for the keys of an array's map.
    array = {
        "__ndarray__": True,
        "data": action.tobytes(),
        "dtype": action.dtype.str,
        "shape": list(action.shape),
    }
    return _frame("action", {"actions": array}, seq)


def error_reply(error: ReflexarcError, seq: int) -> dict[str, Any]:
    return _frame("error", {"error": explained(error, NAME, _KEY_OF_FIELD)["message"]}, seq)


class Session:
    """What one connection keeps between observations.

    Args:
        contract: of the policy.
        replan_steps: actions of a chunk that are executed.
    """

    def __init__(self, contract: PolicyContract, replan_steps: int) -> None:
        self.contract, self._replan_steps = contract, replan_steps
        self.begin_episode()

    def begin_episode(self) -> None:
        """Forget what is left of the last chunk, and the steps before."""
        self._step = 0
        self._left: deque[npt.NDArray[np.float32]] = deque()
        self._rows: list[HistoryRow] = []
        self._seen_later: set[int] = set()

    @property
    def is_due(self) -> bool:
        """Whether the next observation needs a decision."""
        return not self._left

    def observation(self, payload: Mapping[Any, Any]) -> Observation:
        """The decision's observation. Raises CodecError or ContractViolationError naming a key."""
        return Observation(
            images=self._images(payload),
            state=self._state(payload),
            instruction=text(payload, "task_description"),
            step_index=self._step,
            history=tuple(self._rows),
        )

    def accept(self, chunk: ActionChunk) -> None:
        """Keep a decision's chunk, gripper -1 open and 1 closed."""
        actions = gripper_commands(self.contract, chunk.actions, opens=-1.0, closes=1.0)
        self._left.extend(actions[: self._replan_steps])
        self._rows.clear()
        due = self._step + len(self._left)
        history = self.contract.history
        self._seen_later = {*history.frame_steps(due), *history.state_steps(due)} - {due}

    @property
    def sees_this_step_later(self) -> bool:
        """Whether the next decision's window has a row of this step."""
        return self._step in self._seen_later

    def keep_row(self, payload: Mapping[Any, Any]) -> None:
        """Keep an observation between two decisions for the next decision's history."""
        row = HistoryRow(self._step, self._state(payload), self._images(payload))
        self._rows.append(row)

    def next_action(self) -> npt.NDArray[np.float32]:
        """One action ``(D,)``; the step after it begins."""
        self._step += 1
        return self._left.popleft()

    def _images(self, payload: Mapping[Any, Any]) -> dict[str, Any]:
        images = as_map(required(payload, "images", "images", _EXPECTED), "agentview, wrist")
        return {
            camera.name: upright_to_camera(
                camera,
                required(
                    images, _IMAGE_KEYS[camera.name], f"images.{camera.name}", "agentview, wrist"
                ),
                f"images.{_IMAGE_KEYS[camera.name]}",
            )
            for camera in self.contract.cameras
        }

    def _state(self, payload: Mapping[Any, Any]) -> npt.NDArray[Any]:
        state: npt.NDArray[Any] = state_vector(self.contract, payload, "states", _EXPECTED)
        return state


def _frame(kind: str, payload: Mapping[str, Any], seq: int) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}


def _spec(name: str, dims: int, form: str, low: float, high: float) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": form, "range": [low, high]}
