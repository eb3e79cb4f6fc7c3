"""Predicts the next latent state from the present one and the actions in between."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TemporalPredictor(nn.Module):
    """``z' = z + delta(z, actions)``; the identity at initialisation.

    State and actions are projected to ``hidden`` each, and both together pass two layers of
    Linear, SiLU and LayerNorm to the change of the state. 1,056,512 parameters for z of 256, one
    action of 7 and ``hidden`` 512.

    Args:
        z_dimension: of the flattened latent tokens, K·d.
        action_dimension: of the flattened actions, k·D.
        hidden: width.
    """

    def __init__(self, z_dimension: int, action_dimension: int, *, hidden: int = 512):
        super().__init__()
        self.state = nn.Linear(z_dimension, hidden)
        self.action = nn.Linear(action_dimension, hidden)
        self.layers = nn.Sequential(
            nn.Linear(2 * hidden, hidden),
            nn.SiLU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.LayerNorm(hidden),
        )
        # One control step changes little: start from no change at all.
        self.delta = nn.Linear(hidden, z_dimension)
        nn.init.zeros_(self.delta.weight)
        nn.init.zeros_(self.delta.bias)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """``z (B, K·d)`` and ``actions (B, k·D)`` to the predicted state ``(B, K·d)``."""
        both = torch.cat([self.state(z), self.action(actions)], dim=-1)
        predicted: Tensor = z + self.delta(self.layers(both))
        return predicted
