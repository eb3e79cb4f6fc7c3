"""The check of an observation against a contract: everything that differs, each by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from reflexarc.contract.errors import ContractViolationError
from reflexarc.contract.messages import (
    MAX_HISTORY_ROWS,
    MAX_IDENTIFIER_CHARACTERS,
    MAX_INSTRUCTION_CHARACTERS,
    Observation,
)
from reflexarc.contract.policy_contract import PolicyContract

_CAMERAS_NAMED = 8
_PROBLEMS_NAMED = 16
_MAX_STEP_INDEX = 2**53
_MAX_DEADLINE_MS = 1e9
Problem = tuple[str, str]


def check_observation(contract: PolicyContract, observation: Observation) -> None:
    """Raise ContractViolationError naming every field that differs, what came and what to send.

    Whether a session holds the rows that an observation leaves out is for the server to say.
    """
    found = [
        *_image_problems(contract, observation.images, "images"),
        *_state_problems(contract, observation.state, "state"),
        *_text_problems(contract, observation),
        *_goal_problems(contract, observation),
        *_step_problems(contract, observation),
        *_history_problems(contract, observation),
        *_prefix_problems(contract, observation),
    ]
    if found:
        named = [f"{name}: {what}" for name, what in found[:_PROBLEMS_NAMED]]
        if len(found) > _PROBLEMS_NAMED:
            named.append(f"and {len(found) - _PROBLEMS_NAMED} more")
        raise ContractViolationError(
            "the observation violates the policy's contract: " + "; ".join(named),
            field=found[0][0],
        )


def refuse_unsupported(observation: Observation, *, prefix: bool, guide: bool) -> None:
    """Raise ContractViolationError for actions that the policy's sampling cannot take."""
    for name, supported in (("action_prefix", prefix), ("action_guide", guide)):
        if getattr(observation, name) is not None and not supported:
            raise ContractViolationError(
                f"{name}: this policy's sampling takes none; leave it out", field=name
            )


def _image_problems(contract: PolicyContract, images: Any, where: str) -> Iterator[Problem]:
    wanted = set(contract.camera_names)
    unknown = [str(name)[:64] for name in images if name not in wanted]
    for name in unknown[:_CAMERAS_NAMED]:  # a frame may hold thousands of them
        yield f"{where}.{name}", f"no such camera; expected {sorted(wanted)}"
    for camera in contract.cameras:
        key = f"{where}.{camera.name}"
        if camera.name not in images:
            came = sorted(str(name)[:64] for name in images)[:_CAMERAS_NAMED]
            yield key, f"missing; cameras that came: {came or 'none'}"
            continue
        image = images[camera.name]
        expected = (camera.height, camera.width, 3)
        if not isinstance(image, np.ndarray):
            yield key, f"expected a uint8 array {expected}, got {type(image).__name__}"
        elif image.dtype != np.uint8 or image.shape != expected:
            yield key, f"expected uint8 {expected} RGB, got {image.dtype} {image.shape}; resize it"


def _state_problems(contract: PolicyContract, state: Any, where: str) -> Iterator[Problem]:
    spec = contract.state
    if not isinstance(state, np.ndarray):
        yield where, f"expected an array ({spec.dimension},), got {type(state).__name__}"
    elif state.dtype.kind != "f" or state.shape != (spec.dimension,):
        yield (
            where,
            f"expected floats ({spec.dimension},) in the layout {spec.layout}, "
            f"got {state.dtype} {state.shape}",
        )
    elif not np.isfinite(state).all():
        bad = [spec.names[i] for i in np.flatnonzero(~np.isfinite(state))]
        yield where, f"not finite in {', '.join(bad)}"


def _text_problems(contract: PolicyContract, observation: Observation) -> Iterator[Problem]:
    if contract.needs_language and not observation.instruction:
        yield "instruction", "this policy needs an instruction, none came"
    if observation.instruction and len(observation.instruction) > MAX_INSTRUCTION_CHARACTERS:
        yield "instruction", f"longer than {MAX_INSTRUCTION_CHARACTERS} characters"
    for name in ("session_id", "request_id"):
        value = getattr(observation, name)
        if value is not None and len(value) > MAX_IDENTIFIER_CHARACTERS:
            yield name, f"longer than {MAX_IDENTIFIER_CHARACTERS} characters"
    if observation.seed is not None and not 0 <= observation.seed < 2**63:
        yield "seed", f"must be in [0, 2**63), got {observation.seed}"
    steps = observation.denoising_steps
    if steps is not None and not 1 <= steps <= 100:
        yield "denoising_steps", f"must be in [1, 100], got {steps}"
    deadline = observation.deadline_ms
    if deadline is not None and not 0 < deadline < _MAX_DEADLINE_MS:
        yield "deadline_ms", f"must be above 0 and below {_MAX_DEADLINE_MS:g}, got {deadline}"


def _goal_problems(contract: PolicyContract, observation: Observation) -> Iterator[Problem]:
    goal = observation.goal_image
    if goal is not None and not contract.needs_goal_image:
        yield "goal_image", "this policy takes none"
    elif goal is not None:
        yield from _image_problems(contract, goal, "goal_image")
    elif contract.needs_goal_image and observation.step_index == 0:
        yield "goal_image", "this policy needs one with the first request of an episode"


def _step_problems(contract: PolicyContract, observation: Observation) -> Iterator[Problem]:
    step = observation.step_index
    if step is None and contract.needs_session:
        yield "step_index", "this policy keeps an episode's history: say which step this is"
    if step is not None and contract.needs_session and not 0 <= step < _MAX_STEP_INDEX:
        yield "step_index", f"must be in [0, 2**53), got {step}"


def _history_problems(contract: PolicyContract, observation: Observation) -> Iterator[Problem]:
    rows, history = observation.history, contract.history
    if not rows:
        return
    most = min(history.span, MAX_HISTORY_ROWS)
    if most == 0:
        yield "history", "this policy sees one frame and one state; send no history"
        return
    if len(rows) > most:
        yield "history", f"{len(rows)} rows; a window spans {most} steps before its newest row"
        return
    earlier = -1
    for index, row in enumerate(rows):
        where = f"history[{index}]"
        if row.step_index <= earlier:
            yield f"{where}.step_index", f"{row.step_index} follows {earlier}; send oldest first"
        elif observation.step_index is not None and row.step_index >= observation.step_index:
            at = observation.step_index
            yield f"{where}.step_index", f"{row.step_index} is not before the observation's {at}"
        earlier = max(earlier, row.step_index)
        yield from _state_problems(contract, row.state, f"{where}.state")
        if row.images is not None:
            yield from _image_problems(contract, row.images, f"{where}.images")


def _prefix_problems(contract: PolicyContract, observation: Observation) -> Iterator[Problem]:
    horizon = contract.action.horizon
    prefix, guide = observation.action_prefix, observation.action_guide
    yield from _actions_problems(contract, prefix, "action_prefix", horizon - 1)
    committed = prefix.shape[0] if isinstance(prefix, np.ndarray) and prefix.ndim else 0
    yield from _actions_problems(contract, guide, "action_guide", max(horizon - committed, 0))


def _actions_problems(
    contract: PolicyContract, rows: Any, where: str, most: int
) -> Iterator[Problem]:
    if rows is None:
        return
    action = contract.action
    wanted = f"floats (N, {action.dimension}) with N from 1 to {most}"
    if not isinstance(rows, np.ndarray):
        yield where, f"expected {wanted}, got {type(rows).__name__}"
    elif (
        rows.dtype.kind != "f"
        or rows.ndim != 2
        or rows.shape[1] != action.dimension
        or not 1 <= len(rows) <= most
    ):
        yield where, f"expected {wanted}, got {rows.dtype} {rows.shape}"
    elif not np.isfinite(rows).all():
        yield where, "not finite"
    else:
        low, high = np.array(action.low, np.float32), np.array(action.high, np.float32)
        outside = np.flatnonzero(((rows < low) | (rows > high)).any(axis=0))
        if len(outside):
            names = [action.names[i] for i in outside]
            yield where, f"outside the contract's limits in {', '.join(names)}"
