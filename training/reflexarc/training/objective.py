"""What trains a policy: the batch, the draws, the losses, and the interface of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Policy, Tensors

Draws: TypeAlias = dict[str, Tensor]
"""All randomness of one step, rows first."""

Losses: TypeAlias = dict[str, Tensor]
"""Named scalar losses; ``"total"`` is the one that is differentiated."""


@dataclass(frozen=True)
class Batch:
    """B decisions, each with the T frames and states it sees and the chunk that followed.

    Attributes:
        window: rows of ``embed_frames`` ``(B, T, ...)`` float32 and ``"state" (B, T, S)``
            normalised float32.
        task: rows of ``embed_task``, ``(B, ...)``.
        valid: ``bool (B, T)``, False where a row of the window is padding.
        actions: ``float32 (B, H, D)`` normalised; the gripper's column is -1 (open) or +1.
        action_mask: ``bool (B, H)``, False past the end of the episode.
    """

    window: Tensors
    task: Tensors
    valid: Tensor
    actions: Tensor
    action_mask: Tensor

    @property
    def size(self) -> int:
        return len(self.actions)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device`` (itself when it is there already)."""
        if self.actions.device == device:
            return self
        return Batch(
            window={name: rows.to(device) for name, rows in self.window.items()},
            task={name: rows.to(device) for name, rows in self.task.items()},
            valid=self.valid.to(device),
            actions=self.actions.to(device),
            action_mask=self.action_mask.to(device),
        )


class Objective(nn.Module, ABC):
    """Owns what trains a policy and is not served: predictors, targets, loss weights.

    A training step calls ``forward`` exactly once, so that a wrapper around it (gradient
    averaging over devices) sees everything that is differentiated.
    """

    @abstractmethod
    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """All randomness of one step, on the CPU and independent of the weights.

        The same generator state gives the same draws, on every device.
        """

    @abstractmethod
    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """Losses of one batch, each the mean over its rows; ``"total"`` is their weighted sum."""

    def after_optimizer_step(self, policy: Policy, step: int) -> None:
        """Called after every optimiser step; a target network moves here."""
        return None
