"""Chunks in hand: which of their actions belongs to this step, and how several are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from reflexarc.contract.policy_contract import Gripper

FloatArray = npt.NDArray[np.float32]
GripperRule = Literal["vote", "average", "newest"]


@dataclass(frozen=True)
class HeldChunk:
    """A chunk and what its observation was.

    Executed actions are counted apart from control steps: while the arm holds for want of a
    chunk nothing of a chunk's motion happens, and none of its actions is skipped.

    Attributes:
        actions: ``float32 (R, D)``, those of the chunk that may be executed.
        step: control step of its observation.
        executed: actions executed before its observation; its first action is the one that
            follows them.
        seen_ms: when its observation was begun, on the asker's clock.
    """

    actions: FloatArray
    step: int
    executed: int
    seen_ms: float

    def row(self, executed: int) -> int:
        """Index of the action to execute after ``executed`` actions; may be past the end."""
        return executed - self.executed

    def left(self, executed: int) -> int:
        """Actions that are still to be executed."""
        return max(0, len(self.actions) - self.row(executed))

    def rest(self, executed: int) -> FloatArray:
        """Those actions, ``(left, D)``."""
        return self.actions[self.row(executed) :]


def ensemble_weights(number: int, decay: float) -> npt.NDArray[np.float64]:
    """ACT's weights of ``number`` predictions, oldest first, summing to 1: ``exp(-decay · i)``.

    The oldest has the largest weight; ``decay`` 0 is the mean.
    """
    weights = np.exp(-decay * np.arange(number))
    normalised: npt.NDArray[np.float64] = weights / weights.sum()
    return normalised


def ensemble(
    predictions: Sequence[FloatArray],
    decay: float,
    gripper: Gripper | None,
    gripper_rule: GripperRule,
) -> FloatArray:
    """One action ``(D,)`` from several predictions of it, oldest first.

    The gripper's column is averaged as the others, or the command that has the larger weight
    (``vote``), or that of the newest prediction.
    """
    rows = np.stack(predictions).astype(np.float64)
    weights = ensemble_weights(len(rows), decay)
    action = weights @ rows
    if gripper is not None and gripper_rule != "average":
        column = rows[:, gripper.index]
        action[gripper.index] = (
            column[-1] if gripper_rule == "newest" else _vote(column, weights, gripper)
        )
    averaged: FloatArray = action.astype(np.float32)
    return averaged


def _vote(
    commands: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], gripper: Gripper
) -> float:
    """The command, open or closed, that is nearer to more of the weight; a tie stays open."""
    nearer_closed = np.abs(commands - gripper.closed) < np.abs(commands - gripper.open)
    return gripper.closed if weights[nearer_closed].sum() > 0.5 else gripper.open
