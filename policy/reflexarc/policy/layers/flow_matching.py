"""Flow matching, with one convention everywhere: ``t = 1`` is noise, ``t = 0`` is data.

``x_t = t · noise + (1 − t) · data``, the target velocity is ``noise − data``, and Euler steps
walk from 1 to 0 with ``x ← x − v / steps``. The same as openpi and transformers' PI0; GR00T and
starVLA use the mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

TimeDensity = Literal["beta", "uniform"]
Velocity = Callable[[Tensor, Tensor], Tensor]
StepVelocity = Callable[[Tensor, int], Tensor]
_MAX_GUIDANCE = 5.0

# Beta(1.5, 1) · 0.999 + 0.001: more weight on the noisy half, and never exactly 0. Mean 0.600.
_BETA_ALPHA, _BETA_SCALE, _BETA_OFFSET = 1.5, 0.999, 0.001


def sample_times(
    rows: int, density: TimeDensity = "beta", generator: torch.Generator | None = None
) -> Tensor:
    """Times ``float32 (rows,)`` in (0, 1], drawn on the CPU from ``generator``."""
    uniform = torch.rand(rows, generator=generator)
    if density == "uniform":
        return uniform
    # The distribution function of Beta(alpha, 1) is t**alpha, so its inverse is exact.
    return uniform.pow(1.0 / _BETA_ALPHA) * _BETA_SCALE + _BETA_OFFSET


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t`` for rows ``(B, ...)`` and times ``t (B,)``."""
    t = t.reshape(-1, *(1,) * (data.ndim - 1))
    return t * noise + (1.0 - t) * data


def target_velocity(data: Tensor, noise: Tensor) -> Tensor:
    return noise - data


def euler_sample(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    prefix: Tensor | None = None,
    guide: Tensor | None = None,
) -> Tensor:
    """Integrate from noise ``(B, H, ...)`` at t = 1 to data at t = 0 in ``steps`` equal steps.

    Args:
        velocity: ``(x_t (B, H, ...), t (B,))`` to the velocity, of ``x_t``'s shape.
        prefix: ``(B, P, ...)``, the first P rows of the data, known already. At every step the
            path's first rows are those that the prefix has at that time, so that the rest
            continues it (inpainting); the result begins with the prefix exactly.
        guide: ``(B, G, ...)``, rows that follow the prefix in a chunk that is being executed.
            The data is drawn towards them, less and less (real-time chunking's soft mask). Needs
            a velocity of tensors that autograd may keep: :func:`for_autograd`.
    """

    def at_step(x: Tensor, step: int) -> Tensor:
        time = euler_time(step, steps)
        return velocity(x, torch.full((len(x),), time, dtype=x.dtype, device=x.device))

    return euler_path(at_step, noise, steps, prefix, guide)


def euler_path(
    velocity: StepVelocity,
    noise: Tensor,
    steps: int,
    prefix: Tensor | None = None,
    guide: Tensor | None = None,
) -> Tensor:
    """``euler_sample`` with a velocity of ``(x_t (B, H, ...), step)``.

    For a network whose embeddings of the ``steps`` times are made at once, before the first step.
    """
    if guide is not None and guide.shape[1]:
        velocity = _guided(velocity, guide, steps, 0 if prefix is None else prefix.shape[1])
    x = noise
    for step in range(steps):
        if prefix is not None:
            time = euler_time(step, steps)
            known = time * noise[:, : prefix.shape[1]] + (1.0 - time) * prefix
            x = torch.cat([known, x[:, prefix.shape[1] :]], dim=1)
        x = x - velocity(x, step) / steps
    return x if prefix is None else torch.cat([prefix, x[:, prefix.shape[1] :]], dim=1)


def euler_time(step: int, steps: int) -> float:
    """The time at which a step begins: 1 for the first."""
    return 1.0 - step / steps


def soft_mask(guide: int) -> Tensor:
    """Real-time chunking's weights ``float32 (guide,)``: from near 1 at the prefix to near 0."""
    left = torch.arange(guide, 0, -1) / (guide + 1)
    return left * torch.expm1(left) / (math.e - 1)


def for_autograd(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that were computed in inference mode, which autograd refuses to keep."""
    with torch.inference_mode(False):
        return {name: tensor.clone() for name, tensor in tensors.items()}


def _guided(velocity: StepVelocity, guide: Tensor, steps: int, first: int) -> StepVelocity:
    """``velocity``, corrected so that rows from ``first`` on come near ``guide``.

    Pseudo-inverse guidance (Song et al. 2023) as in "Real-Time Execution of Action Chunking Flow
    Policies" (Black, Galliker and Levine, 2025): what the velocity predicts as data is compared
    with the guide, and the weighted error goes back through the velocity's Jacobian.
    """
    rows = slice(first, first + guide.shape[1])
    weights = soft_mask(guide.shape[1]).to(guide)
    weights = weights.view(-1, *(1,) * (guide.ndim - 2))

    def corrected(x: Tensor, step: int) -> Tensor:
        time = euler_time(step, steps)
        with torch.inference_mode(False), torch.enable_grad():
            start = x.clone().requires_grad_()
            moving = velocity(start, step)
            data = start - time * moving
            error = torch.zeros_like(data)
            error[:, rows] = (guide - data[:, rows]).detach() * weights
            (correction,) = torch.autograd.grad(data, start, error)
        return moving.detach() - _guidance(time) * correction

    return corrected


def _guidance(time: float) -> float:
    """The weight of the correction, at most 5 as the paper recommends for few steps."""
    data_part = 1.0 - time  # the paper's time, which runs from noise 0 to data 1
    if data_part <= 0.0:
        return _MAX_GUIDANCE
    return min(_MAX_GUIDANCE, (time**2 + data_part**2) / (data_part * time))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of ``t (B,)``: ``(B, dimension)``, sines first, then cosines.

    Periods are spaced geometrically from 4e-3 to 4, so that nearly all dimensions vary over
    [0, 1]; those of a language model's positions hardly would.
    """

    frequencies: Tensor

    def __init__(self, dimension: int, min_period: float = 4e-3, max_period: float = 4.0):
        super().__init__()
        if dimension % 2:
            raise ValueError(f"the dimension of a time embedding must be even, got {dimension}")
        fraction = torch.linspace(0.0, 1.0, dimension // 2)
        period = min_period * (max_period / min_period) ** fraction
        self.register_buffer("frequencies", 1.0 / period * 2 * math.pi, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
