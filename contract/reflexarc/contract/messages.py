"""Observations and action chunks, and their form on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import CodecError

MAX_INSTRUCTION_CHARACTERS = 4096
MAX_IDENTIFIER_CHARACTERS = 128
MAX_HISTORY_ROWS = 1024

Images = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class HistoryRow:
    """What was seen at an earlier step of the episode.

    Attributes:
        step_index: environment steps executed before it was seen.
        state: ``(S,)`` floating point, as in an observation.
        images: as in an observation, or None where only the state of this step is needed.
    """

    step_index: int
    state: npt.NDArray[Any]
    images: Images | None = None

    def to_wire(self) -> dict[str, Any]:
        message: dict[str, Any] = {"step_index": self.step_index, "state": self.state}
        if self.images is not None:
            message["images"] = dict(self.images)
        return message

    @classmethod
    def from_wire(cls, message: object, name: str) -> HistoryRow:
        """Build from a decoded map; raises CodecError naming the field below ``name``."""
        if not isinstance(message, Mapping):
            raise CodecError(f"{name} must be a map, got {type(message).__name__}", field=name)
        _refuse_unknown(cls, message, name)
        step = message.get("step_index")
        if not isinstance(step, int) or isinstance(step, bool):
            what = "is missing" if step is None else f"must be int, got {type(step).__name__}"
            raise CodecError(f"{name}.step_index {what}", field=f"{name}.step_index")
        if "state" not in message:
            raise CodecError(f"{name} needs the field 'state'", field=f"{name}.state")
        images = message.get("images")
        if images is not None:
            _check_image_map(images, f"{name}.images")
        return cls(step_index=step, state=message["state"], images=images)


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
        step_index: environment steps executed so far in the episode; needed by a policy that
            sees history. 0, or less than in the session's last request, begins an episode anew.
        denoising_steps: Euler steps of the flow-matching sampler; None takes the policy's own.
        history: rows seen since the session's last request, oldest first. A request that
            carries its whole window needs no session.
        goal_image: camera name to ``uint8 (H, W, 3)``: what the scene shall look like. Sent with
            the first request of an episode; the session keeps its embedding.
        action_prefix: ``float32 (P, D)`` in robot units, P below the horizon: the chunk's first
            actions, which are committed already. For policies whose sampling supports it.
        action_guide: ``float32 (G, D)`` in robot units: the actions that follow the prefix in
            the chunk being executed; the new one stays near them, less and less. Together with
            the prefix no more than the horizon. For policies whose sampling supports it.
        deadline_ms: how long after its arrival at the server an answer is of use; an answer that
            would come later is refused. None waits for as long as it takes.
    """

    images: Images
    state: npt.NDArray[Any]
    instruction: str | None = None
    session_id: str | None = None
    request_id: str | None = None
    seed: int | None = None
    step_index: int | None = None
    denoising_steps: int | None = None
    history: tuple[HistoryRow, ...] = ()
    goal_image: Images | None = None
    action_prefix: npt.NDArray[Any] | None = None
    action_guide: npt.NDArray[Any] | None = None
    deadline_ms: float | None = None

    def to_wire(self) -> dict[str, Any]:
        """A map for the codec; fields that are None or empty are left out."""
        message: dict[str, Any] = {"images": dict(self.images), "state": self.state}
        for name in _OPTIONAL_TYPES:
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        if self.history:
            message["history"] = [row.to_wire() for row in self.history]
        if self.goal_image is not None:
            message["goal_image"] = dict(self.goal_image)
        if self.action_prefix is not None:
            message["action_prefix"] = self.action_prefix
        if self.action_guide is not None:
            message["action_guide"] = self.action_guide
        return message

    @classmethod
    def from_wire(cls, message: object) -> Observation:
        """Build from a decoded map; raises CodecError naming an unknown, missing or wrong field.

        Shapes and values are for :func:`check_observation`; this checks only the form.
        """
        if not isinstance(message, Mapping):
            raise CodecError(f"an observation must be a map, got {type(message).__name__}")
        _refuse_unknown(cls, message, "an observation")
        for key in ("images", "state"):
            if key not in message:
                raise CodecError(f"an observation needs the field {key!r}", field=key)
        _check_image_map(message["images"], "images")
        if message.get("goal_image") is not None:
            _check_image_map(message["goal_image"], "goal_image")
        for key, expected in _OPTIONAL_TYPES.items():
            value = message.get(key)
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                wanted = "a number" if expected is _NUMBER else expected.__name__
                raise CodecError(f"{key} must be {wanted}, got {type(value).__name__}", field=key)
        values = {str(key): value for key, value in message.items()}
        return cls(**{**values, "history": _history_from_wire(message.get("history"))})


def _history_from_wire(rows: object) -> tuple[HistoryRow, ...]:
    if rows is None:
        return ()
    if not isinstance(rows, list | tuple):
        raise CodecError(f"history must be a list, got {type(rows).__name__}", field="history")
    if len(rows) > MAX_HISTORY_ROWS:
        raise CodecError(
            f"history holds {len(rows)} rows, more than {MAX_HISTORY_ROWS}", field="history"
        )
    return tuple(HistoryRow.from_wire(row, f"history[{i}]") for i, row in enumerate(rows))


def _refuse_unknown(cls: type, message: Mapping[Any, Any], what: str) -> None:
    known = {f.name for f in fields(cls)}
    for key in message:
        if key not in known:
            raise CodecError(
                f"unknown field {short(key)} in {what}; known: {', '.join(sorted(known))}",
                field=str(key)[:MAX_IDENTIFIER_CHARACTERS],
            )


def _check_image_map(images: object, name: str) -> None:
    if not isinstance(images, Mapping):
        raise CodecError(f"{name} must be a map from camera name to image", field=name)


_NUMBER = (int, float)
_OPTIONAL_TYPES: dict[str, Any] = {
    "instruction": str,
    "session_id": str,
    "request_id": str,
    "seed": int,
    "step_index": int,
    "denoising_steps": int,
    "deadline_ms": _NUMBER,
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
