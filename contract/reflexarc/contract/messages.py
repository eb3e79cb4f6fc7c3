"""Observations and action chunks, and the check of an observation against a contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import CodecError, ContractViolationError
from reflexarc.contract.policy_contract import PolicyContract

MAX_INSTRUCTION_CHARACTERS = 4096
MAX_IDENTIFIER_CHARACTERS = 128
_CAMERAS_NAMED = 8


@dataclass(frozen=True)
class Observation:
    """What a robot or simulator sees before it asks for a chunk.

    Attributes:
        images: camera name to ``uint8 (H, W, 3)`` RGB, as the contract's camera states.
        state: ``(S,)`` floating point, units and order of the contract's state layout.
        instruction: what to do, in words; needed where the contract says so.
        session_id: names one episode's stream; None means this connection.
        request_id: echoed in the reply.
        seed: seed of the sampling noise; None lets the server draw one and say which.
        step_index: environment steps executed so far in the episode.
        denoising_steps: Euler steps of the flow-matching sampler; None takes the policy's own.
    """

    images: Mapping[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[Any]
    instruction: str | None = None
    session_id: str | None = None
    request_id: str | None = None
    seed: int | None = None
    step_index: int | None = None
    denoising_steps: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """A map for the codec; fields that are None are left out."""
        message: dict[str, Any] = {"images": dict(self.images), "state": self.state}
        for name in _OPTIONAL_TYPES:
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message

    @classmethod
    def from_wire(cls, message: object) -> Observation:
        """Build from a decoded map; raises CodecError naming an unknown, missing or wrong field.

        Shapes and values are for :func:`check_observation`; this checks only the form.
        """
        if not isinstance(message, Mapping):
            raise CodecError(f"an observation must be a map, got {type(message).__name__}")
        known = {f.name for f in fields(cls)}
        for key in message:
            if key not in known:
                raise CodecError(
                    f"unknown field {short(key)} in an observation; "
                    f"known: {', '.join(sorted(known))}",
                    field=str(key)[:MAX_IDENTIFIER_CHARACTERS],
                )
        for key in ("images", "state"):
            if key not in message:
                raise CodecError(f"an observation needs the field {key!r}", field=key)
        if not isinstance(message["images"], Mapping):
            raise CodecError("images must be a map from camera name to image", field="images")
        for key, expected in _OPTIONAL_TYPES.items():
            value = message.get(key)
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                raise CodecError(
                    f"{key} must be {expected.__name__}, got {type(value).__name__}", field=key
                )
        return cls(**{str(key): value for key, value in message.items()})


_OPTIONAL_TYPES: dict[str, type] = {
    "instruction": str,
    "session_id": str,
    "request_id": str,
    "seed": int,
    "step_index": int,
    "denoising_steps": int,
}


@dataclass(frozen=True)
class ActionChunk:
    """A server's answer.

    Attributes:
        actions: ``float32 (horizon, dimension)`` in the robot's own units, first row first.
        seed: the seed that the sampling noise was drawn from.
        request_id: as it came.
        session_id: as it came.
        timing: milliseconds spent by name (``queue``, ``preprocess``, ``device``, ...).
    """

    actions: npt.NDArray[np.float32]
    seed: int
    request_id: str | None = None
    session_id: str | None = None
    timing: Mapping[str, float] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "actions": self.actions,
            "seed": self.seed,
            "timing": dict(self.timing),
        }
        if self.request_id is not None:
            message["request_id"] = self.request_id
        if self.session_id is not None:
            message["session_id"] = self.session_id
        return message

    @classmethod
    def from_wire(cls, message: object) -> ActionChunk:
        """Build from a decoded map; raises CodecError when it is not an action chunk."""
        if not isinstance(message, Mapping) or "actions" not in message:
            raise CodecError("the reply is no action chunk: it has no field 'actions'")
        try:  # JSON brings lists; what overflows float32 becomes inf, which the client refuses
            with np.errstate(over="ignore"):
                actions = np.asarray(message["actions"], dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise CodecError(f"actions are not numbers: {error}", field="actions") from error
        if actions.ndim != 2:
            raise CodecError(
                f"actions must be (horizon, dimension), got shape {actions.shape}", field="actions"
            )
        for key, expected in _REPLY_TYPES.items():
            value = message.get(key)
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                raise CodecError(
                    f"{key} must be {expected.__name__}, got {type(value).__name__}", field=key
                )
        return cls(
            actions=actions,
            seed=message.get("seed") or 0,
            request_id=message.get("request_id"),
            session_id=message.get("session_id"),
            timing=dict(message.get("timing") or {}),
        )


_REPLY_TYPES: dict[str, type] = {"seed": int, "request_id": str, "session_id": str, "timing": dict}


def check_observation(contract: PolicyContract, observation: Observation) -> None:
    """Raise ContractViolationError naming every field that differs, what came and what to send."""
    found = [
        *_image_problems(contract, observation),
        *_state_problems(contract, observation),
        *_text_problems(contract, observation),
    ]
    if found:
        raise ContractViolationError(
            "the observation violates the policy's contract: "
            + "; ".join(f"{name}: {what}" for name, what in found),
            field=found[0][0],
        )


def _image_problems(contract: PolicyContract, observation: Observation) -> list[tuple[str, str]]:
    found = []
    wanted = set(contract.camera_names)
    unknown = [str(name)[:64] for name in observation.images if name not in wanted]
    for name in unknown[:_CAMERAS_NAMED]:  # a frame may hold thousands of them
        found.append((f"images.{name}", f"no such camera; expected {sorted(wanted)}"))
    for camera in contract.cameras:
        key = f"images.{camera.name}"
        if camera.name not in observation.images:
            came = sorted(str(name)[:64] for name in observation.images)[:_CAMERAS_NAMED]
            found.append((key, f"missing; cameras that came: {came or 'none'}"))
            continue
        image = observation.images[camera.name]
        expected = (camera.height, camera.width, 3)
        if not isinstance(image, np.ndarray):
            found.append((key, f"expected a uint8 array {expected}, got {type(image).__name__}"))
        elif image.dtype != np.uint8 or image.shape != expected:
            found.append(
                (key, f"expected uint8 {expected} RGB, got {image.dtype} {image.shape}; resize it")
            )
    return found


def _state_problems(contract: PolicyContract, observation: Observation) -> list[tuple[str, str]]:
    state, spec = observation.state, contract.state
    if not isinstance(state, np.ndarray):
        return [("state", f"expected an array ({spec.dimension},), got {type(state).__name__}")]
    if state.dtype.kind != "f" or state.shape != (spec.dimension,):
        return [
            (
                "state",
                f"expected floats ({spec.dimension},) in the layout {spec.layout}, "
                f"got {state.dtype} {state.shape}",
            )
        ]
    if not np.isfinite(state).all():
        bad = [spec.names[i] for i in np.flatnonzero(~np.isfinite(state))]
        return [("state", f"not finite in {', '.join(bad)}")]
    return []


def _text_problems(contract: PolicyContract, observation: Observation) -> list[tuple[str, str]]:
    found = []
    if contract.needs_language and not observation.instruction:
        found.append(("instruction", "this policy needs an instruction, none came"))
    if observation.instruction and len(observation.instruction) > MAX_INSTRUCTION_CHARACTERS:
        found.append(("instruction", f"longer than {MAX_INSTRUCTION_CHARACTERS} characters"))
    for name in ("session_id", "request_id"):
        value = getattr(observation, name)
        if value is not None and len(value) > MAX_IDENTIFIER_CHARACTERS:
            found.append((name, f"longer than {MAX_IDENTIFIER_CHARACTERS} characters"))
    if observation.seed is not None and not 0 <= observation.seed < 2**63:
        found.append(("seed", f"must be in [0, 2**63), got {observation.seed}"))
    steps = observation.denoising_steps
    if steps is not None and not 1 <= steps <= 100:
        found.append(("denoising_steps", f"must be in [1, 100], got {steps}"))
    return found
