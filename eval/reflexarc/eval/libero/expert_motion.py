"""The expert's arm: move the grip site to poses, open and close, with noise on the way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from reflexarc.eval.libero.geometry import POINTING_DOWN, rotation_about_z
from reflexarc.eval.libero.simulator import LiberoSimulator

FloatArray = npt.NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
# An action of 1 moves the goal of the controller by 5 cm or 0.5 rad.
_METRES_PER_ACTION, _RADIANS_PER_ACTION = 0.05, 0.5
_FASTEST_TURN = 0.6
_NOISE_SCALE: FloatArray = np.array([1.0, 1.0, 1.0, 0.3, 0.3, 0.3])


class ExpertFailure(Exception):  # noqa: N818 - an outcome of an episode, not an error
    """The episode cannot succeed any more; the text says why."""


class Arm:
    """Drives one episode of the simulator.

    Args:
        noise: standard deviation of Gaussian noise on every moving action's translation
            (a third of it on its rotation), in units of the action.
        before_step: called with the action ``(7,)`` that is about to be executed, and with its
            mean ``(7,)`` over the noise, see :func:`mean_of_clipped`.
    """

    def __init__(
        self,
        simulator: LiberoSimulator,
        *,
        rng: np.random.Generator,
        noise: float,
        max_steps: int,
        before_step: Callable[[FloatArray, FloatArray], None] | None = None,
    ) -> None:
        self._simulator, self._rng, self._noise = simulator, rng, noise
        self._max_steps, self._before_step = max_steps, before_step
        self._robot = simulator.environment.robots[0]
        self.gripper = OPEN
        self.steps = 0
        self.success = False

    @property
    def position(self) -> FloatArray:
        """The grip site ``(3,)``, world frame, metres."""
        return np.array(self._simulator.data.site_xpos[self._robot.eef_site_id])

    @property
    def rotation(self) -> FloatArray:
        """Hand frame ``(3, 3)``: columns across the fingers, their closing direction, approach.

        The grip site's own frame is turned by 90 degrees: the fingers close along its x axis.
        """
        site = self._simulator.data.site_xmat[self._robot.eef_site_id].reshape(3, 3)
        return np.stack([site[:, 1], -site[:, 0], site[:, 2]], axis=1)

    @property
    def opening(self) -> float:
        """Distance between the fingers in metres."""
        fingers = self._simulator.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return float(np.abs(fingers).sum())

    def go_to(
        self,
        target: FloatArray,
        yaw: float | None = None,
        *,
        tolerance: float = 0.006,
        turn_tolerance: float = 0.05,
        gain: float = 1.6,
        fastest: float = 1.0,
        steps: int = 80,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Move towards ``target`` until it is reached, the arm stalls, or ``steps`` are over.

        Without ``yaw`` the orientation is held. A stall (pressing on something, at the edge of
        the workspace) is no failure here: the skills check what they achieved.
        """
        wanted = None if yaw is None else rotation_about_z(yaw) @ POINTING_DOWN
        distances: list[float] = []
        for _ in range(steps):
            error = target - self.position
            turn = np.zeros(3) if wanted is None else rotation_vector(wanted @ self.rotation.T)
            turn_left = float(np.linalg.norm(turn))
            if np.linalg.norm(error) < tolerance and turn_left < turn_tolerance:
                return
            self._step(self._towards(error, turn, gain, fastest), noisy=True)
            if stop is not None and stop():
                return
            distances.append(float(np.linalg.norm(target - self.position)))
            stalled = len(distances) > 12 and distances[-12] - distances[-1] < 0.002
            if stalled and turn_left < 0.15:
                return

    def hold(self, steps: int, gripper: float, until: Callable[[], bool] | None = None) -> None:
        """Stay, opening or closing, for ``steps`` or until a condition holds."""
        self.gripper = gripper
        for _ in range(steps):
            self._step(np.append(np.zeros(6), gripper))
            if until is not None and until():
                return

    def _towards(
        self, error: FloatArray, turn: FloatArray, gain: float, fastest: float
    ) -> FloatArray:
        move = gain * error / _METRES_PER_ACTION
        largest = np.abs(move).max()
        if largest > fastest:
            move = move * (fastest / largest)
        turn = np.clip(1.5 * turn / _RADIANS_PER_ACTION, -_FASTEST_TURN, _FASTEST_TURN)
        action: FloatArray = np.concatenate([move, turn, [self.gripper]])
        return action

    def _noisy(self, action: FloatArray) -> FloatArray:
        if not self._noise:
            return action
        noisy: FloatArray = action.copy()
        noisy[:6] += self._rng.normal(0.0, self._noise, 6) * _NOISE_SCALE
        return noisy

    def _mean(self, intended: FloatArray) -> FloatArray:
        if not self._noise:
            return intended.clip(-1.0, 1.0)
        mean: FloatArray = intended.copy()
        mean[:6] = mean_of_clipped(intended[:6], self._noise * _NOISE_SCALE)
        return mean

    def _step(self, intended: FloatArray, *, noisy: bool = False) -> None:
        action = np.clip(self._noisy(intended) if noisy else intended, -1.0, 1.0)
        if self._before_step is not None:
            self._before_step(action, self._mean(intended) if noisy else action)
        self.success = self._simulator.step(action)
        self.steps += 1
        if self.steps >= self._max_steps:
            raise ExpertFailure("out of steps")


def mean_of_clipped(intended: FloatArray, deviation: FloatArray) -> FloatArray:
    """Mean of ``clip(intended + noise, -1, 1)`` under Gaussian noise of these deviations.

    What the arm does on average. At full speed it is slower than what was intended, because the
    limit cuts the noise on one side; a policy that learnt the intention would run ahead of the
    demonstrations and see positions at which none of them decided.
    """
    low, high = (-1 - intended) / deviation, (1 - intended) / deviation
    inside = intended * (norm.cdf(high) - norm.cdf(low))
    inside += deviation * (norm.pdf(low) - norm.pdf(high))
    mean: FloatArray = inside - norm.cdf(low) + norm.sf(high)
    return mean


def rotation_vector(rotation: FloatArray) -> FloatArray:
    """Axis times angle ``(3,)`` in radians of a rotation matrix."""
    from robosuite.utils.transform_utils import mat2quat, quat2axisangle

    vector: FloatArray = quat2axisangle(mat2quat(rotation))
    return vector
