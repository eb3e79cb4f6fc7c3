"""Masked multimodal JEPA, joint with the action policy: predict what is hidden, in z's space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.policy.layers.vicreg import column_deviation, vicreg_terms
from reflexarc.policy.statevla.encoder import Representation
from reflexarc.policy.statevla.token_layout import LANGUAGE, TokenLayout
from reflexarc.training.config_objectives import MaskedJEPAConfig
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.objectives.flow_matching import (
    FlowMatchingObjective,
    FlowMatchingPolicy,
    noisy_window,
)
from reflexarc.training.objectives.masked_predictor import MaskedPredictor
from reflexarc.training.objectives.masks import check_masks, draw_masks
from reflexarc.training.objectives.packing import pack
from reflexarc.training.objectives.target_network import (
    copied_representation,
    ema_momentum,
    move_target,
    normed,
)


class MaskedPolicy(FlowMatchingPolicy, Protocol):
    """What this objective needs of a policy beyond the interface that is served."""

    representation: Representation
    token_layout: TokenLayout


class MaskedJEPAObjective(Objective):
    """MSE of predicted against the target's tokens where they are hidden, VICReg, and actions.

    Three passes of the encoder: over the visible tokens alone, from whose outputs the hidden ones
    are predicted; the target network's over all tokens; and one over all tokens whose z the
    action heads are trained on. Outputs of both branches pass z's own projection and norm.

    Args:
        config: masks, weights, momentum, predictor.
        layout: of the policy's tokens.
        gripper_index: the gripper's column in the action, None where there is none.

    Raises ConfigError for masks that this layout cannot have.
    """

    def __init__(
        self,
        config: MaskedJEPAConfig,
        *,
        layout: TokenLayout,
        gripper_index: int | None,
    ) -> None:
        super().__init__()
        check_masks(config, layout)
        self.config, self.layout = config, layout
        self.actions = FlowMatchingObjective(config, gripper_index)
        self.predictor = MaskedPredictor(
            layout,
            width=config.predictor_width,
            layers=config.predictor_layers,
            d_state=config.predictor_d_state,
        )
        self.target: Representation | None = None

    def attach(self, policy: Policy) -> None:
        """Copy the policy's representation as the target; call it once, before the optimiser."""
        self.target = cast(Representation, copied_representation(policy, "masked_jepa"))

    def train(self, mode: bool = True) -> MaskedJEPAObjective:
        """The target stays in evaluation mode: it is never trained."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """What flow matching draws, and ``hidden bool (B, M)``."""
        drawn = self.actions.draw(batch, generator)
        return {**drawn, "hidden": draw_masks(self.config, self.layout, batch.size, generator)}

    def forward(self, policy: Policy, batch: Batch, draws: Draws) -> Losses:
        """``total``, its terms by their names, and ``z_std``.

        ``z_std`` is the mean deviation of a dimension of the normed z over rows. In evaluation
        mode ``mean_target`` is measured as well: what it would cost to predict at each hidden
        place the mean of the batch's targets there. Rows without any valid step carry no loss.
        """
        model = cast(MaskedPolicy, policy)
        config, representation = self.config, model.representation
        hidden: Tensor = draws["hidden"]
        real = batch.action_mask.any(1)
        window = noisy_window(batch, draws)
        tokens = representation.tokens(batch.task, window)
        z = representation.encoder(tokens)
        losses = self._actions(model, z, batch, draws)

        packing = pack(hidden, self.layout.latent_tokens)
        visible = self._visible(representation, tokens, hidden, batch.task, window)
        context = representation.encoder.of_every_token(packing.visible(visible), packing.lengths)
        predicted = self.predictor(context, packing).float()
        with torch.no_grad():
            seen = self._attached().tokens(batch.task, batch.window)
            target = normed(self._attached().encoder.of_every_token(seen))
        places = ~packing.is_context(predicted.shape[1]) & real[:, None]
        error = (normed(predicted) - packing.ordered(target)).square().mean(-1)
        prediction = masked_mean(error, places)
        variance, covariance = vicreg_terms(predicted.flatten(0, 1), places.flatten())
        jepa = (
            prediction + config.variance_weight * variance + config.covariance_weight * covariance
        )
        losses = {
            **losses,
            "total": config.jepa_weight * jepa + config.action_weight * losses["total"],
            "prediction": prediction,
            "variance": variance,
            "covariance": covariance,
            "z_std": column_deviation(normed(z.detach()).flatten(1), real).mean(),
        }
        if not self.training:
            losses["mean_target"] = _error_of_mean(target[:, : hidden.shape[1]], hidden, real)
        return losses

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """Also ``mse_over_mean``: below 1, what is visible told of what is hidden."""
        mean = means["mean_target"]
        # Nothing to tell apart (one row, or a collapse) is no skill.
        return {**means, "mse_over_mean": means["prediction"] / mean if mean > 1e-12 else 1.0}

    def after_optimizer_step(self, policy: Policy, step: int, total_steps: int) -> None:
        """Move the target towards the policy's representation; ``step`` counts from 0."""
        config = self.config
        momentum = (
            config.ema_start
            if config.ema_schedule == "constant"
            else ema_momentum(config, step, total_steps)
        )
        move_target(self._attached(), cast(MaskedPolicy, policy).representation, momentum)

    def _actions(self, model: MaskedPolicy, z: Tensor, batch: Batch, draws: Draws) -> Losses:
        """Of flow matching and gripper, given z of everything."""
        given = z if self.config.action_gradient_into_encoder else z.detach()
        return self.actions.of_context(model, {"z": given}, batch, draws)

    def _visible(
        self,
        representation: Representation,
        tokens: Tensor,
        hidden: Tensor,
        task: Tensors,
        window: Tensors,
    ) -> Tensor:
        """The tokens without what a hidden instruction says in those that listen to it."""
        if not representation.tokenizer.uses_language:
            return tokens
        rows = hidden[:, self.layout.span(LANGUAGE)].any(1).nonzero()[:, 0]
        if len(rows) == 0:
            return tokens
        unheard = representation.tokens(
            {name: values[rows] for name, values in task.items()},
            {name: values[rows] for name, values in window.items()},
            without_language=True,
        )
        return tokens.index_copy(0, rows, unheard.to(tokens.dtype))

    def _attached(self) -> Representation:
        if self.target is None:
            raise RuntimeError("call attach(policy) before the first step")
        return self.target


def _error_of_mean(target: Tensor, hidden: Tensor, real: Tensor) -> Tensor:
    """MSE at hidden places of the mean of real rows' ``target (B, M, d)`` at each place."""
    weights = real[:, None, None].to(target.dtype)
    mean = (target * weights).sum(0) / weights.sum().clamp(min=1.0)
    return masked_mean((target - mean).square().mean(-1), hidden & real[:, None])
