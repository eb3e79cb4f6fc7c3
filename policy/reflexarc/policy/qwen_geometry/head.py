"""The action head: a diffusion transformer, each layer of which attends to a context of its own.

Tokens are the robot's state, learned future tokens, and the noisy actions. A layer is adaptive
norm, cross-attention to its context, optionally self-attention, and an MLP. Keys and values of the
contexts depend on neither time nor noise: they are computed once a chunk, however many Euler steps
and draws of noise follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.policy.interface import Tensors
from reflexarc.policy.layers.flow_matching import (
    TimeEmbedding,
    euler_path,
    euler_time,
    for_autograd,
)
from reflexarc.policy.layers.fourier import FourierFeatures
from reflexarc.policy.qwen_geometry.config import HeadConfig

_TIME_DIMENSION = 256
_EMBEDDING_STD = 0.02


class AdaptiveNorm(nn.Module):
    """A norm without weights of its own; scale and shift come from the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(time))[:, None].chunk(2, dim=-1)
        normed: Tensor = self.norm(x) * (1 + scale) + shift
        return normed


class Attention(nn.Module):
    """Attention of tokens ``(B, T, width)`` to keys and values made of ``(B, L, source)``."""

    def __init__(self, config: HeadConfig, source: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source, config.width)
        self.value = nn.Linear(source, config.width)
        self.out = nn.Linear(config.width, config.width)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Each ``(B, heads, L, head_dimension)``."""
        return self._divided(self.key(source)), self._divided(self.value(source))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attended = F.scaled_dot_product_attention(
            self._divided(self.query(x)),
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _divided(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class Layer(nn.Module):
    """One layer; ``source`` is the width of its context."""

    def __init__(self, config: HeadConfig, source: int) -> None:
        super().__init__()
        width = config.width
        self.adaptive = AdaptiveNorm(width)
        self.cross = Attention(config, source)
        self.own_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.own = Attention(config, width) if config.self_attention else None
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.feed_forward * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(config.feed_forward * width, width),
        )

    def forward(self, x: Tensor, time: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """``x (B, T, width)``, ``time (B, width)``, ``mask bool (B, 1, 1, L)``."""
        x = x + self.cross(self.adaptive(x, time), key, value, mask)
        if self.own is not None:
            normed = self.own_norm(x)
            x = x + self.own(normed, *self.own.keys_values(normed), None)
        mixed: Tensor = x + self.mlp(self.norm(x))
        return mixed


class ActionEncoder(nn.Module):
    """Noisy actions ``(B, H, A)`` and waves of the time ``(B, width)``: ``(B, H, width)``."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(actions, width)
        self.joined = nn.Linear(2 * width, width)
        self.last = nn.Linear(width, width)

    def forward(self, actions: Tensor, time: Tensor) -> Tensor:
        embedded = self.first(actions)
        waves = time[:, None].expand_as(embedded).to(embedded.dtype)
        tokens: Tensor = self.last(F.silu(self.joined(torch.cat([embedded, waves], dim=-1))))
        return tokens


class DiffusionHead(nn.Module):
    """See the module.

    Args:
        config: of the head.
        source: width of the contexts.
        state, horizon, actions: of the contract.
    """

    def __init__(
        self, config: HeadConfig, *, source: int, state: int, horizon: int, actions: int
    ) -> None:
        super().__init__()
        width = config.width
        self.time_waves = TimeEmbedding(_TIME_DIMENSION)
        self.time = nn.Sequential(
            nn.Linear(_TIME_DIMENSION, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.action_waves = TimeEmbedding(width)
        self.actions = ActionEncoder(actions, width)
        self.state_waves = FourierFeatures(config.state_octaves)
        self.state = nn.Sequential(
            nn.Linear(state * (1 + 2 * config.state_octaves), config.state_hidden),
            nn.ReLU(),
            nn.Linear(config.state_hidden, width),
        )
        self.future = nn.Parameter(torch.randn(config.future_tokens, width) * _EMBEDDING_STD)
        self.position = nn.Parameter(torch.randn(config.positions, width) * _EMBEDDING_STD)
        self.layers = nn.ModuleList(Layer(config, source) for _ in range(config.layers))
        self.last_norm = AdaptiveNorm(width)
        self.last = nn.Linear(width, config.output_dimension)
        self.velocity = nn.Sequential(
            nn.Linear(config.output_dimension, config.output_hidden),
            nn.ReLU(),
            nn.Linear(config.output_hidden, actions),
        )
        self.horizon = horizon
        self.mixes = config.self_attention

    def context(self, contexts: list[Tensor], mask: Tensor, state: Tensor) -> Tensors:
        """All that depends on neither time nor noise; rows first, so that rows can be repeated.

        Args:
            contexts: one a layer, ``(B, L, source)``.
            mask: ``bool (B, L)``, False where nothing is to be attended to.
            state: ``(B, S)`` normalised.
        """
        rows: Tensors = {"mask": mask}
        for number, (layer, context) in enumerate(zip(self.layers, contexts, strict=True)):
            assert isinstance(layer, Layer)
            rows[f"key{number}"], rows[f"value{number}"] = layer.cross.keys_values(context)
        future = self.future.expand(len(state), -1, -1)
        rows["tokens"] = torch.cat([self.state(self.state_waves(state))[:, None], future], dim=1)
        return rows

    def forward(self, context: Tensors, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity ``(B, H, A)`` at ``x_t (B, H, A)`` and ``t (B,)``, t = 1 being noise."""
        return self._velocity(context, x_t, *self._times(t))

    def sample(
        self,
        context: Tensors,
        noise: Tensor,
        steps: int,
        prefix: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Actions ``(B, H, A)`` from noise of that shape; arguments as ``euler_sample``'s."""
        times = [euler_time(step, steps) for step in range(steps)]
        embedded, waves = self._times(torch.tensor(times, dtype=noise.dtype, device=noise.device))
        once = {**self.seen_by_actions(context), "embedded": embedded, "waves": waves}
        if guide is not None:
            once = for_autograd(once)

        def velocity(x: Tensor, step: int) -> Tensor:
            rows = (once["embedded"][step].expand(len(x), -1), once["waves"][step])
            return self._velocity(once, x, rows[0], rows[1].expand(len(x), -1)).to(x.dtype)

        return euler_path(velocity, noise, steps, prefix, guide)

    def seen_by_actions(self, context: Tensors) -> Tensors:
        """A context without the tokens that no action sees: all, where tokens do not mix.

        The actions are the same. Training keeps them, so that every weight has a gradient.
        """
        return context if self.mixes else {**context, "tokens": context["tokens"][:, :0]}

    def _times(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``t (N,)`` to what norms take and what actions take, each ``(N, width)``."""
        return self.time(self.time_waves(t)), self.action_waves(t)

    def _velocity(self, context: Tensors, x_t: Tensor, time: Tensor, waves: Tensor) -> Tensor:
        actions = self.actions(x_t, waves) + self.position[: self.horizon]
        x = torch.cat([context["tokens"], actions], dim=1)
        mask = context["mask"][:, None, None]
        for number, layer in enumerate(self.layers):
            x = layer(x, time, context[f"key{number}"], context[f"value{number}"], mask)
        last = self.last(self.last_norm(x[:, -self.horizon :], time))
        velocity: Tensor = self.velocity(last)
        return velocity
