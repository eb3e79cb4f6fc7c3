"""Regression of the chunk of velocities after every frame of the window, masked."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.objectives.velocity_chunk_config import VelocityChunkConfig


class VelocityChunkPolicy(Protocol):
    """What this objective needs of a policy beyond the interface that is served."""

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors: ...

    def predict(self, context: Tensors) -> Tensor:
        """``(B, F, H, D)``: a chunk after each frame of the window."""


class VelocityChunkObjective(Objective):
    """Huber loss of normalised velocities; steps past an episode's end and padded frames of a
    window never count.
    """

    needs_window_actions = True

    def __init__(self, config: VelocityChunkConfig) -> None:
        super().__init__()
        self.config = config

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """Nothing is random but the policy's dropout."""
        return {}

    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """``total`` and ``loss_velocity``, which are the same."""
        model = cast(VelocityChunkPolicy, policy)
        predicted = model.predict(model.encode(batch.task, batch.window, batch.valid)).float()
        wanted, mask = _window_chunks(batch)
        error = F.huber_loss(predicted, wanted, reduction="none", delta=self.config.huber_delta)
        loss = masked_mean(error.mean(-1), mask.float())
        return {"total": loss, "loss_velocity": loss}

    def weight(self, batch: Batch) -> float:
        return float(_window_chunks(batch)[1].sum())


def _window_chunks(batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.window_actions is None or batch.window_mask is None:
        raise ValueError("the batch holds no window_actions; its source was not asked for them")
    return batch.window_actions, batch.window_mask
