"""Regression of whole action chunks, weighted by what matters in them."""

from __future__ import annotations

import math
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode, Labels
from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.objectives.action_chunk_config import ActionChunkConfig

_SMOOTH = 0.1


class ActionChunkPolicy(Protocol):
    """What this objective needs of a policy beyond the interface that is served."""

    def streams(self, task: Tensors, window: Tensors) -> Tensors:
        """``"video"``, ``"state"`` and where there is one ``"goal"``, before they are context."""

    def encode_streams(self, streams: Tensors) -> Tensors: ...

    def predict(self, context: Tensors) -> Tensor:
        """``(B, H, D)``; the gripper's column is a logit, or what comes before a tanh."""


class ActionChunkObjective(Objective):
    """Weighted error of the continuous dimensions and of the gripper, masked.

    The total is a mean over dimensions in which the gripper counts ``gripper_loss_weight`` times.
    Noise is added while training only; validation is without.

    Args:
        config: weights, noise, sampling.
        horizon: H, of the contract.
        gripper_index: the gripper's column in the action, None where there is none.
        classifies: the gripper's column is a logit; else a regression through tanh.
    """

    def __init__(
        self,
        config: ActionChunkConfig,
        *,
        horizon: int,
        gripper_index: int | None,
        classifies: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.horizon, self.gripper_index, self.classifies = horizon, gripper_index, classifies

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """``video_noise``, ``goal_noise`` and ``state_noise`` like their streams, of deviation 1,
        and ``static (B,)`` uniform in [0, 1).
        """
        config, drawn = self.config, Draws()
        if config.state_noise:
            drawn["state_noise"] = torch.randn(batch.window["state"].shape, generator=generator)
        if config.noise_std:
            video = batch.window["clip"][:, -1]
            drawn["video_noise"] = torch.randn(video.shape, generator=generator)
            if "goal" in batch.task:
                drawn["goal_noise"] = torch.randn(batch.task["goal"].shape, generator=generator)
        if config.static_aug:
            drawn["static"] = torch.rand(batch.size, generator=generator)
        return drawn

    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """``total``, ``motion``, and ``gripper`` where there is one."""
        model = cast(ActionChunkPolicy, policy)
        window = self._held_still(batch.window, draws) if self.training else batch.window
        streams = model.streams(batch.task, window)
        if self.training:
            streams = self._noisy(streams, draws)
        predicted = model.predict(model.encode_streams(streams)).float()
        weights = self.step_weights(batch)
        index, dimensions = self.gripper_index, batch.actions.shape[-1]
        kept = [i for i in range(dimensions) if i != index]
        error = self._error(predicted[..., kept], batch.actions[..., kept]).mean(-1)
        motion = masked_mean(error, weights)
        if index is None:
            return {"total": motion, "motion": motion}
        gripper = masked_mean(
            self._gripper_error(predicted[..., index], batch.actions[..., index]), weights
        )
        weighted = len(kept) * motion + self.config.gripper_loss_weight * gripper
        return {"total": weighted / dimensions, "motion": motion, "gripper": gripper}

    def step_weights(self, batch: Batch) -> Tensor:
        """``float32 (B, H)``: how much each step counts; 0 for padding."""
        config, mask = self.config, batch.action_mask
        if not config.mask_padding:
            # A row without any step stands in for one that there is not, and never counts.
            mask = mask.any(1, keepdim=True).expand_as(mask)
        weights = mask.float()
        start = torch.ones_like(weights)
        start[:, : config.start_steps] = config.start_weight
        weights = weights * start
        if self.gripper_index is not None:
            changes = gripper_changes(batch.actions[..., self.gripper_index])
            near = _widened(changes, config.transition_margin)
            weights = torch.where(near, weights * config.transition_weight, weights)
        return weights

    def weight(self, batch: Batch) -> float:
        return float(self.step_weights(batch).sum())

    def frame_weights(
        self, episode: DatasetEpisode, labels: Labels
    ) -> npt.NDArray[np.float64] | None:
        config, steps = self.config, np.asarray(episode.image_steps, dtype=np.int64)
        weights = np.ones(len(steps))
        if not config.every_step:
            weights[steps + self.horizon > episode.length] = 0.0
        if self.gripper_index is not None and config.gripper_oversample > 1:
            commands = episode.labelled_actions(labels)[:, self.gripper_index]
            for change in np.flatnonzero(np.diff(np.sign(commands))) + 1:
                near = (np.abs(steps - change) <= config.gripper_jitter) & (weights > 0)
                if not near.any():  # rendered too rarely: the last one before it
                    near = steps == steps[steps <= change].max(initial=int(steps[0]))
                    near &= weights > 0
                if near.any():
                    weights[near] += (config.gripper_oversample - 1) / near.sum()
        return None if (weights == 1).all() else weights

    def _held_still(self, window: Tensors, draws: Draws) -> Tensors:
        if "static" not in draws:
            return window
        if "static" not in window:
            raise ConfigError(
                "objective.static_aug needs clips that stand still; set policy.static_clips: true",
                field="objective.static_aug",
            )
        still = (draws["static"] < self.config.static_aug).view(-1, 1, 1, 1, 1)
        return {**window, "clip": torch.where(still, window["static"], window["clip"])}

    def _noisy(self, streams: Tensors, draws: Draws) -> Tensors:
        noisy = dict(streams)
        for name in ("video", "goal"):
            if f"{name}_noise" in draws:
                scale = self._noise_scale(streams[name])
                noisy[name] = streams[name] + scale * draws[f"{name}_noise"]
        if "state_noise" in draws:
            noisy["state"] = streams["state"] + self.config.state_noise * draws["state_noise"]
        return noisy

    def _noise_scale(self, tokens: Tensor) -> Tensor | float:
        if self.config.noise_scaling == "element":
            return self.config.noise_std
        length: Tensor = tokens.norm(dim=-1, keepdim=True)
        return length * (self.config.noise_std / math.sqrt(tokens.shape[-1]))

    def _error(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        if self.config.regression == "mse":
            return (predicted - wanted).square()
        if self.config.regression == "l1":
            return (predicted - wanted).abs()
        return F.smooth_l1_loss(predicted, wanted, reduction="none", beta=_SMOOTH)

    def _gripper_error(self, predicted: Tensor, command: Tensor) -> Tensor:
        if not self.classifies:
            return (predicted.tanh() - command).square()
        closed = (command > 0).float()
        return F.binary_cross_entropy_with_logits(predicted, closed, reduction="none")


def gripper_changes(commands: Tensor) -> Tensor:
    """``bool (B, H)``: True where the command differs from the step before, from the second on."""
    changes = torch.zeros_like(commands, dtype=torch.bool)
    changes[:, 1:] = (commands[:, 1:] > 0) != (commands[:, :-1] > 0)
    return changes


def _widened(marked: Tensor, margin: int) -> Tensor:
    """True within ``margin`` places of a True."""
    if margin == 0:
        return marked
    wide = F.max_pool1d(marked.float().unsqueeze(1), 2 * margin + 1, stride=1, padding=margin)
    return wide.squeeze(1) > 0
