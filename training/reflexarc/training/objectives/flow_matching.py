"""Flow matching on the continuous action dimensions, a classifier on the gripper."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.flow_matching import interpolate, sample_times, target_velocity
from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.training.config_objectives import ActionLossConfig
from reflexarc.training.objective import Batch, Draws, Losses, Objective


class FlowMatchingPolicy(Protocol):
    """What this objective needs of a policy beyond the interface that is served."""

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors: ...

    def velocity(self, context: Tensors, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity ``(B, H, A)`` at ``x_t (B, H, A)`` and ``t (B,)``."""

    def gripper_logits(self, context: Tensors) -> Tensor:
        """Logits ``(B, H)`` of "closed"."""


def noisy_window(batch: Batch, draws: Draws) -> Tensors:
    """The window with the drawn noise added to its state."""
    return {**batch.window, "state": batch.window["state"] + draws["state_noise"]}


class FlowMatchingObjective(Objective):
    """Masked MSE of the velocity plus masked BCE of the gripper.

    ``x_t = t * noise + (1 - t) * action`` and the target is ``noise - action``: t = 1 is noise.
    Steps past the end of an episode carry no loss.

    Args:
        config: weights, density of t, noise on the state.
        gripper_index: the gripper's column in the action, None where there is none.
    """

    def __init__(self, config: ActionLossConfig, gripper_index: int | None) -> None:
        super().__init__()
        self.config = config
        self.gripper_index = gripper_index

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """``noise (B, R, H, A)``, ``time (B, R)`` in (0, 1], ``state_noise (B, T, S)``."""
        rows, horizon, dimension = batch.actions.shape
        repeats = self.config.draws_per_sample
        continuous = dimension - (self.gripper_index is not None)
        noise = torch.randn(rows, repeats, horizon, continuous, generator=generator)
        time = sample_times(rows * repeats, self.config.time_density, generator)
        state_noise = torch.randn(batch.window["state"].shape, generator=generator)
        return {
            "noise": noise,
            "time": time.view(rows, repeats),
            "state_noise": state_noise * self.config.state_noise,
        }

    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """``flow``, ``total`` and ``gripper`` where there is one; 0 without any valid step."""
        model = cast(FlowMatchingPolicy, policy)
        context = model.encode(batch.task, noisy_window(batch, draws), batch.valid)
        return self.of_context(model, context, batch, draws)

    def of_context(
        self, model: FlowMatchingPolicy, context: Tensors, batch: Batch, draws: Draws
    ) -> Losses:
        """The same losses where ``encode`` has been called already."""
        continuous, closed = self._split(batch.actions)
        mask = batch.action_mask.float()

        repeats = self.config.draws_per_sample
        noise, time = draws["noise"].flatten(0, 1), draws["time"].flatten()
        target_action = continuous.repeat_interleave(repeats, 0)
        x_t = interpolate(target_action, noise, time)
        repeated = {name: rows.repeat_interleave(repeats, 0) for name, rows in context.items()}
        velocity = model.velocity(repeated if repeats > 1 else context, x_t, time)
        error = (velocity.float() - target_velocity(target_action, noise)).square().mean(-1)
        flow = masked_mean(error, mask.repeat_interleave(repeats, 0))

        if closed is None:
            return {"total": self.config.flow_weight * flow, "flow": flow}
        logits = model.gripper_logits(context).float()
        entropy = F.binary_cross_entropy_with_logits(logits, closed, reduction="none")
        gripper = masked_mean(entropy, mask)
        total = self.config.flow_weight * flow + self.config.gripper_weight * gripper
        return {"total": total, "flow": flow, "gripper": gripper}

    def _split(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Continuous dimensions ``(B, H, D-1)``, and 1.0 where the gripper closes ``(B, H)``."""
        index = self.gripper_index
        if index is None:
            return actions, None
        continuous = torch.cat([actions[..., :index], actions[..., index + 1 :]], dim=-1)
        return continuous, (actions[..., index] > 0).float()
