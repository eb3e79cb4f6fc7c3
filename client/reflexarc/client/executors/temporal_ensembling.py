"""Average what overlapping chunks say about the same step (ACT, Zhao et al. 2023)."""

from __future__ import annotations

import math

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.base import ChunkExecutor, FloatArray, check_replan_steps
from reflexarc.client.executors.chunks import GripperRule, HeldChunk, ensemble
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.contract.errors import ConfigError


class TemporalEnsemblingExecutor(ChunkExecutor):
    """Asks again and again while moving, and executes a weighted mean of all predictions.

    The prediction of the i-th oldest chunk that covers a step has the weight ``exp(-decay · i)``,
    so that the oldest counts most.

    Args:
        policy: who is asked.
        replan_steps: actions between two requests; ACT asks at every one. A request waits for
            the answer to the one before.
        guard: see :class:`ChunkExecutor`.
        decay: ACT's m; 0 is the plain mean.
        gripper: ``vote`` gives the command, open or closed, that has more weight; ``average``
            treats the gripper as any dimension; ``newest`` follows the latest chunk.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        replan_steps: int = 1,
        guard: RobotGuard | None = None,
        *,
        decay: float = 0.01,
        gripper: GripperRule = "vote",
    ) -> None:
        check_replan_steps(replan_steps, policy.contract.action.horizon)
        if not (math.isfinite(decay) and decay >= 0):
            raise ConfigError(f"decay must be 0 or more, got {decay}", field="decay")
        self._replan_steps, self._decay, self._gripper_rule = replan_steps, decay, gripper
        super().__init__(policy, guard)

    def reset(self) -> None:
        super().reset()
        self._newest: HeldChunk | None = None

    def _is_due(self) -> bool:
        if not self._chunks or self._newest is None:
            return True
        return self._newest.row(self._executed) >= self._replan_steps

    def _take(self, chunk: HeldChunk) -> None:
        self._newest = chunk
        self._chunks.append(chunk)

    def _planned(self) -> FloatArray | None:
        if not self._chunks:
            return None
        predictions = [chunk.rest(self._executed)[0] for chunk in self._chunks]
        gripper = self._policy.contract.action.gripper
        return ensemble(predictions, self._decay, gripper, self._gripper_rule)
