"""From a batch to gradients, and from gradients to the next weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from reflexarc.training.gradient_norms import GradientNorms
from reflexarc.training.objective import Batch, Draws, Losses
from reflexarc.training.precision import Precision


class WeightUpdate:
    """Losses, gradients, clipping and the optimiser's step, on weights that torch itself holds.

    Args:
        forward: called in the place of the trained modules.
        parameters: those that are trained, named as in the trained modules.
        optimizer: over these.
        precision: of products; scales the loss where that is needed.
        clip: the largest norm of all gradients; None only measures it.
        whole: turns a tensor that is spread over processes into all of it.
    """

    def __init__(
        self,
        forward: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float | None,
        whole: Callable[[Tensor], Tensor],
    ) -> None:
        self._forward, self._optimizer = forward, optimizer
        self._precision, self._clip = precision, clip
        self._norms = GradientNorms(parameters, whole)

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        """The losses of one pass."""
        with self._precision.autocast():
            losses: Losses = self._forward(batch, draws)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass."""
        self._precision.backward(loss)

    def step(self) -> dict[str, Tensor]:
        """Change the weights; returns the gradients' norms from before they were clipped."""
        self._precision.unscale(self._optimizer)
        norms = self._norms.clip(self._clip)
        self._precision.step(self._optimizer)
        return self._precision.reported(norms)
