"""What trains a policy: the batch, the draws, the losses, and the interface of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reflexarc.data.dataset import DatasetEpisode, Labels
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
        future: ``window`` k control steps later, shaped like it; None where the objective did
            not ask for it. So are the three that follow.
        future_valid: ``bool (B, T)``, as ``valid``.
        future_mask: ``bool (B,)``, False where step t + k is past the end of the episode: what
            ``future`` holds there is the last frame, which no loss may see.
        future_actions: ``float32 (B, k, D)`` normalised, the actions t … t + k - 1 as they were
            executed, whatever ``data.labels`` says of ``actions``.
        window_actions: ``float32 (B, F, H, D)`` normalised: the chunk that follows each frame of
            the window, the last one being ``actions``; None where the objective did not ask.
        window_mask: ``bool (B, F, H)``, False past the end of the episode, and where a frame of
            the window is padding.
    """

    window: Tensors
    task: Tensors
    valid: Tensor
    actions: Tensor
    action_mask: Tensor
    future: Tensors | None = None
    future_valid: Tensor | None = None
    future_mask: Tensor | None = None
    future_actions: Tensor | None = None
    window_actions: Tensor | None = None
    window_mask: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.actions)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device`` (itself when it is there already)."""
        if self.actions.device == device:
            return self
        return Batch(
            window=_moved(self.window, device),
            task=_moved(self.task, device),
            valid=self.valid.to(device),
            actions=self.actions.to(device),
            action_mask=self.action_mask.to(device),
            future=None if self.future is None else _moved(self.future, device),
            future_valid=_optional(self.future_valid, device),
            future_mask=_optional(self.future_mask, device),
            future_actions=_optional(self.future_actions, device),
            window_actions=_optional(self.window_actions, device),
            window_mask=_optional(self.window_mask, device),
        )


def _moved(rows: Tensors, device: torch.device) -> Tensors:
    return {name: values.to(device) for name, values in rows.items()}


def _optional(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)


class Objective(nn.Module, ABC):
    """Owns what trains a policy and is not served: predictors, targets, loss weights.

    A training step calls ``forward`` exactly once, so that a wrapper around it (gradient
    averaging over devices) sees everything that is differentiated.

    Attributes:
        trains_actions: whether the policy's action heads are trained, so that validation can
            sample chunks.
        needs_future: control steps k to the future that ``forward`` needs, or None.
        needs_window_actions: whether ``forward`` needs the chunk after every frame of the window.
    """

    trains_actions: bool = True
    needs_future: int | None = None
    needs_window_actions: bool = False

    def attach(self, policy: Policy) -> None:
        """Called once, after the policy has its first weights and before an optimiser is made.

        An objective copies a target network here.
        """
        return None

    def frame_weights(
        self, episode: DatasetEpisode, labels: Labels
    ) -> npt.NDArray[np.float64] | None:
        """``float64 (F,)``: how often an epoch sees each rendered frame; None where once."""
        return None

    @abstractmethod
    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """All randomness of one step, on the CPU and independent of the weights.

        The same generator state gives the same draws, on every device.
        """

    @abstractmethod
    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """Losses of one batch, each the mean over its rows; ``"total"`` is their weighted sum."""

    def weight(self, batch: Batch) -> float:
        """How many terms the losses of ``batch`` are means over: its weight in validation."""
        return float(batch.action_mask.sum())

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """What a whole validation says, from the means of its losses: ratios are taken here."""
        return dict(means)

    def after_optimizer_step(self, policy: Policy, step: int, total_steps: int) -> None:
        """Called after optimiser step ``step`` (from 0); a target network moves here."""
        return None
