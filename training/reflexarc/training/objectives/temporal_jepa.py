"""Temporal JEPA: predict the representation k control steps ahead, in representation space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.policy.layers.vicreg import column_deviation, vicreg_terms
from reflexarc.training.config_objectives import TemporalJEPAConfig
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.objectives.target_network import (
    copied_representation,
    ema_momentum,
    move_target,
    normed,
)
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor


class RepresentationPolicy(Protocol):
    """What this objective needs of a policy beyond the interface that is served."""

    representation: nn.Module
    """``(task, window, valid)`` as in ``encode`` to ``z (B, K, d)``; all that makes z."""


class TemporalJEPAObjective(Objective):
    """MSE of the predicted against the target's representation at t + k, and VICReg.

    The online branch sees the window at t, the predictor adds the actions t to t + k - 1, and the
    target network, a slow average of the whole representation, sees the window at t + k. Rows
    whose future lies past the end of the episode carry no loss: repeating the last frame would
    teach that actions change nothing.

    Args:
        config: horizon k, weights, momentum, width of the predictor.
        z_dimension: K·d of the policy's representation.
        action_dimension: D.
    """

    trains_actions = False

    def __init__(
        self, config: TemporalJEPAConfig, *, z_dimension: int, action_dimension: int
    ) -> None:
        super().__init__()
        self.config = config
        self.needs_future = config.horizon
        self.predictor = TemporalPredictor(
            z_dimension, config.horizon * action_dimension, hidden=config.predictor_hidden
        )
        self.target: nn.Module | None = None

    def attach(self, policy: Policy) -> None:
        """Copy the policy's representation as the target; call it once, before the optimiser."""
        self.target = copied_representation(policy, "temporal_jepa")

    def train(self, mode: bool = True) -> TemporalJEPAObjective:
        """The target stays in evaluation mode: it is never trained."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """``state_noise (B, T, S)`` for the online branch."""
        noise = torch.randn(batch.window["state"].shape, generator=generator)
        return {"state_noise": noise * self.config.state_noise}

    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """``prediction``, ``variance``, ``covariance`` and ``total``; also ``z_std``.

        ``z_std`` is the mean deviation of a dimension of the normed z over rows: near 1 in a
        healthy representation, 0 in a collapsed one. In evaluation mode the identity predictor is
        measured as well: ``identity`` is the MSE between the target's own z at t and t + k. A
        batch without any real future gives zeros.
        """
        model = cast(RepresentationPolicy, policy)
        window = {**batch.window, "state": batch.window["state"] + draws["state_noise"]}
        z: Tensor = model.representation(batch.task, window, batch.valid)
        future, future_valid, actions, mask = self._future(batch)
        predicted = self.predictor(z.flatten(1), actions.flatten(1)).float()
        target = self._target(batch.task, future, future_valid)

        error = (normed(predicted.view_as(z)) - target).square().mean((1, 2))
        prediction = masked_mean(error, mask)
        variance, covariance = vicreg_terms(predicted, mask)
        weights = self.config
        total = (
            weights.prediction_weight * prediction
            + weights.variance_weight * variance
            + weights.covariance_weight * covariance
        )
        losses = {
            "total": total,
            "prediction": prediction,
            "variance": variance,
            "covariance": covariance,
            "z_std": column_deviation(normed(z.detach()).flatten(1)).mean(),
        }
        if not self.training:
            now = self._target(batch.task, batch.window, batch.valid)
            losses["identity"] = masked_mean((now - target).square().mean((1, 2)), mask)
        return losses

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """Also ``mse_over_identity``: below 1, something about change was learnt.

        A ratio of means and no mean of ratios: a batch in which little moves says little.
        """
        identity = means["identity"]
        # Nothing to predict (no real row, or no change) is no skill.
        ratio = means["prediction"] / identity if identity > 0 else 1.0
        return {**means, "mse_over_identity": ratio}

    def weight(self, batch: Batch) -> float:
        """Number of rows with a real future."""
        return float(self._future(batch)[3].sum())

    def after_optimizer_step(self, policy: Policy, step: int, total_steps: int) -> None:
        """Move the target towards the policy's representation; ``step`` counts from 0."""
        source = cast(RepresentationPolicy, policy).representation
        move_target(self._attached(), source, ema_momentum(self.config, step, total_steps))

    def _target(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensor:
        """The target's normed z ``(B, K, d)``, cut off from every gradient."""
        with torch.no_grad():
            return normed(self._attached()(task, window, valid))

    def _attached(self) -> nn.Module:
        if self.target is None:
            raise RuntimeError("call attach(policy) before the first step")
        return self.target

    def _future(self, batch: Batch) -> tuple[Tensors, Tensor, Tensor, Tensor]:
        """Window at t + k, its valid rows, the actions up to it ``(B, k, D)``, real rows."""
        future, valid = batch.future, batch.future_valid
        actions, mask = batch.future_actions, batch.future_mask
        if future is None or valid is None or actions is None or mask is None:
            raise ConfigError(
                f"temporal_jepa needs batches that hold the window {self.config.horizon} steps "
                "ahead; these hold none",
                field="objective.horizon",
            )
        return future, valid, actions, mask
