"""One recorded demonstration's actions executed again, and how far the hand then strays.

Two mistakes that a pipeline can make are made here on purpose: actions one step off, and rotations
read in another layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.baselines import Demonstration, ReplayActions
from reflexarc.eval.videos import Film

if TYPE_CHECKING:
    from reflexarc.data.libero_episode import Episode
    from reflexarc.eval.libero.simulator import LiberoSimulator, RawState

FloatRows = npt.NDArray[np.float64]
ActionRotation = Literal["as_recorded", "euler", "reversed"]
StateRotation = Literal["axis_angle", "euler"]
LAYOUT = "eef3+axisangle3+fingers2"
RADIANS_A_STEP = 0.5
"""What a rotation delta of 1 asks of LIBERO's controller."""
NEAR_METRES, NEAR_RADIANS = 0.005, 0.05
"""A hand that strays further has not done what was recorded, even where the task succeeded."""
_ROTATION = slice(3, 6)


class Mistakes(FrozenModel):
    """What is done wrong on purpose.

    Attributes:
        action_shift: 1 executes at step t the action of t + 1, as who takes observations that
            stand after their action for ones before it; -1 the one of t - 1.
        action_rotation: how rotation deltas are read: axis-angle as recorded, as Euler angles
            (xyz), or with their axes in the order zyx.
        state_rotation: how the live hand's orientation is written where axis-angle is expected.
    """

    action_shift: int = Field(default=0, ge=-20, le=20)
    action_rotation: ActionRotation = "as_recorded"
    state_rotation: StateRotation = "axis_angle"

    @property
    def in_words(self) -> str:
        found = [
            *([f"actions shifted by {self.action_shift}"] if self.action_shift else []),
            *(
                [f"rotation deltas read as {self.action_rotation}"]
                if self.action_rotation != "as_recorded"
                else []
            ),
            *(
                ["the hand's orientation written as Euler angles"]
                if self.state_rotation == "euler"
                else []
            ),
        ]
        return ", ".join(found) or "as recorded"


class ReplayIdentity(FrozenModel):
    """What must be equal for two replayed demonstrations to stand in one table.

    Attributes:
        settle_steps: steps that the arm holds still after the last action.
    """

    suite: str
    settle_steps: int = Field(default=10, ge=0)
    mistakes: Mistakes = Mistakes()


class Replayed(FrozenModel):
    """One demonstration.

    Attributes:
        demonstration: ``file/demo``, the file as it is found in the folder of the data.
        actions_sha256: of its recorded actions, float64, before any mistake.
        success: whether the task's goal held at some step.
        steps: executed until then, or until the end.
        length: actions of the demonstration.
        position_error: largest distance of the live hand from the recorded one before an action,
            in metres.
        rotation_error: the same of its orientation, in radians.
    """

    run: ReplayIdentity
    task: str
    demonstration: str
    actions_sha256: str
    success: bool
    steps: int
    length: int
    position_error: float
    rotation_error: float

    @property
    def followed(self) -> bool:
        """Whether the hand went where it had gone."""
        return self.position_error <= NEAR_METRES and self.rotation_error <= NEAR_RADIANS


def actions_sha256(actions: FloatRows) -> str:
    """Of ``float64 (T, D)`` recorded actions."""
    return hashlib.sha256(np.ascontiguousarray(actions).tobytes()).hexdigest()


def altered_actions(actions: FloatRows, mistakes: Mistakes) -> FloatRows:
    """``float64 (T', 7)``: the actions as the mistakes make them, within LIBERO's limits."""
    from scipy.spatial.transform import Rotation

    changed = actions.copy()
    if mistakes.action_rotation == "reversed":
        changed[:, _ROTATION] = actions[:, _ROTATION][:, ::-1]
    elif mistakes.action_rotation == "euler":
        angles = actions[:, _ROTATION] * RADIANS_A_STEP
        changed[:, _ROTATION] = Rotation.from_euler("xyz", angles).as_rotvec() / RADIANS_A_STEP
    shift = mistakes.action_shift
    if shift > 0:
        changed = changed[shift:]
    elif shift < 0:
        changed = np.concatenate([np.repeat(changed[:1], -shift, axis=0), changed])
    if not len(changed):
        raise ConfigError(
            f"--shift {shift} leaves nothing of a demonstration of {len(actions)} actions",
            field="shift",
        )
    clipped: FloatRows = np.clip(changed, -1.0, 1.0)
    return clipped


def hand_errors(
    recorded: FloatRows, live: Sequence[RawState], written: StateRotation
) -> tuple[float, float]:
    """Largest distance (metres) and angle (radians) between ``recorded (T, 8)`` and ``live``."""
    from scipy.spatial.transform import Rotation

    rows = min(len(recorded), len(live))
    positions = np.stack([state.eef_position for state in live[:rows]])
    quaternions = np.stack([state.eef_quaternion for state in live[:rows]])
    turned = Rotation.from_quat(quaternions)
    if written == "euler":  # the three numbers are then taken for an axis-angle
        turned = Rotation.from_rotvec(turned.as_euler("xyz"))
    expected = Rotation.from_rotvec(recorded[:rows, _ROTATION])
    distance = np.linalg.norm(positions - recorded[:rows, :3], axis=1)
    return float(distance.max()), float((expected.inv() * turned).magnitude().max())


def replay_episode(
    simulator: LiberoSimulator, episode: Episode, name: str, run: ReplayIdentity
) -> Replayed:
    """Reset as the demonstration began, execute its actions, and compare.

    ConfigError for a shift that leaves no action.
    """
    recorded = episode.actions()
    actions = altered_actions(recorded, run.mistakes)
    source = ReplayActions(
        Demonstration(actions, name, episode),
        simulator,
        replan_steps=1,
        film=Film(wanted=False),
    )
    _begin(simulator, episode)
    live, success, steps = [], False, 0
    for step in range(len(actions) + run.settle_steps):
        if step < episode.length:
            live.append(simulator.observe_state())
        success = simulator.step(source.next_action(step))
        steps = step + 1
        if success:
            break
    distance, angle = hand_errors(episode.states(LAYOUT), live, run.mistakes.state_rotation)
    return Replayed(
        run=run,
        task=episode.task_name,
        demonstration=name,
        actions_sha256=actions_sha256(recorded),
        success=success,
        steps=steps,
        length=episode.length,
        position_error=distance,
        rotation_error=angle,
    )


def _begin(simulator: LiberoSimulator, episode: Episode) -> None:
    """From its seed, which gives fixtures and controller too; files without one from a state."""
    if episode.seed is not None:
        simulator.reset_seeded(episode.seed)
        return
    from reflexarc.data.libero_layout import open_hdf5, require_dataset

    with open_hdf5(episode.path) as file:
        states = require_dataset(file, episode.path, episode.demo, "states")
        first = np.asarray(states[0], dtype=np.float64)
        raw = np.asarray(file[f"data/{episode.demo}/actions"][0], dtype=np.float64)
    simulator.reset_to_state(first, wait_steps=0)
    if episode.alignment == "after_action":  # its first row was seen after this action
        simulator.step(raw)
