"""A selective scan as its formula reads, and inputs for it; for tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    gate: Tensor | None = None, softplus: bool = False,
) -> Tensor:  # fmt: skip
    """One step after the other; arguments as of ``selective_scan``."""
    if softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for u_t, d_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        state = torch.exp(d_t[..., None] * A) * state + (d_t * u_t)[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D * u
    return y if gate is None else y * F.silu(gate)


def scan_inputs(
    batch: int, length: int, channels: int, state: int, dtype: torch.dtype = torch.float32,
    seed: int = 0, shift: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """``u, delta, A, B, C, D, gate`` that want gradients; ``softplus`` of delta is meant.

    ``A`` is -1 … -state, as initialised; ``shift`` moves delta: at 2 a step decays strongly.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = [
        draw(batch, length, channels),
        draw(batch, length, channels) + shift,
        -torch.arange(1, state + 1, dtype=dtype) * torch.exp(0.1 * draw(channels, state)),
        draw(batch, length, state),
        draw(batch, length, state),
        draw(channels),
        draw(batch, length, channels),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, against the largest value."""
    scale = wanted.abs().max().clamp(min=1e-6)
    return float(((found.to(wanted.dtype) - wanted).abs().max() / scale).item())
