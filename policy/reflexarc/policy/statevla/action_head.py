"""StateVLA's action head: flow matching for motion, a classifier for the gripper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reflexarc.policy.layers.flow_matching import (
    TimeEmbedding,
    euler_path,
    euler_time,
    for_autograd,
)
from reflexarc.policy.layers.mamba import MambaStack
from reflexarc.policy.statevla.config import StateVLAConfig


class FlowMatchingHead(nn.Module):
    """Velocity of noisy actions: a Mamba over ``[time, z, actions]``."""

    def __init__(self, config: StateVLAConfig, *, horizon: int, action: int):
        super().__init__()
        d = config.d_model
        self.time_embedding = TimeEmbedding(d)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.context = nn.Linear(d, d)
        self.action_in = nn.Linear(action, d)
        self.position = nn.Parameter(torch.randn(1 + config.latent_tokens + horizon, d) * 0.02)
        self.stack = MambaStack(
            d,
            config.policy_layers,
            d_state=config.policy_d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            mlp_hidden=config.policy_mlp_hidden,
        )
        self.action_out = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, action))

    def forward(self, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``z (B, K, d)``, ``x_t (B, H, A)``, ``t (B,)`` to the velocity ``(B, H, A)``."""
        return self._velocity(self.context(z), x_t, self._embed(t))

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        steps: int,
        prefix: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Motion ``(B, H, A)`` from noise of that shape; arguments as ``euler_sample`` has them.

        What does not depend on ``x_t`` is computed once for all steps.
        """
        times = [euler_time(step, steps) for step in range(steps)]
        once = {
            "context": self.context(z),
            "times": self._embed(torch.tensor(times, dtype=noise.dtype, device=noise.device)),
        }
        if guide is not None:
            once = for_autograd(once)

        def velocity(x: Tensor, step: int) -> Tensor:
            return self._velocity(once["context"], x, once["times"][step].expand(len(x), -1))

        return euler_path(velocity, noise, steps, prefix, guide)

    def _embed(self, t: Tensor) -> Tensor:
        """``t (N,)`` to ``(N, d)``."""
        embedded: Tensor = self.time(self.time_embedding(t))
        return embedded

    def _velocity(self, context: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        tokens = torch.cat([time[:, None], context, self.action_in(x_t)], dim=1)
        outputs = self.stack(tokens + self.position)
        velocity: Tensor = self.action_out(outputs[:, -x_t.shape[1] :].contiguous())
        return velocity


class GripperHead(nn.Module):
    """``z (B, K, d)`` to ``(B, H)`` logits that the gripper is commanded to close."""

    def __init__(self, config: StateVLAConfig, *, horizon: int):
        super().__init__()
        hidden = config.gripper_hidden
        self.layers = nn.Sequential(
            nn.Linear(config.latent_tokens * config.d_model, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, horizon),
        )

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.layers(z.flatten(1))
        return logits
