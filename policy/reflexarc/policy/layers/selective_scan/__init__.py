"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752), one file a backend.

``h_t = exp(delta_t · A) ⊙ h_{t-1} + delta_t · u_t · B_t``, from ``h = 0``, and
``y_t = (⟨C_t, h_t⟩ + D ⊙ u_t) ⊙ silu(gate_t)``. :mod:`.choice` says which backend runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.policy.layers.selective_scan import operators
from reflexarc.policy.layers.selective_scan.checks import (
    check_finite,
    check_shapes,
    checks_values,
    may_look_at,
)
from reflexarc.policy.layers.selective_scan.choice import Backend, backend_for
from reflexarc.policy.layers.selective_scan.errors import ScanInputError, ScanUnavailableError

__all__ = [
    "Backend",
    "ScanInputError",
    "ScanUnavailableError",
    "backend_for",
    "causal_convolution",
    "check_finite",
    "selective_scan",
]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    gate: Tensor | None = None, *, softplus: bool = False, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Scan ``u`` along its second dimension; returns ``(batch, length, channels)`` of its dtype.

    Computed in single precision, or in double if ``u`` is; first derivatives only. The result is
    the same to the last bit with and without gradients, and whatever the number of threads.

    Args:
        u: input, ``(batch, length, channels)``, of any floating dtype.
        delta: step sizes, positive, ``(batch, length, channels)``.
        A: decay, negative, ``(channels, state)``.
        B: input projection, ``(batch, length, state)``.
        C: output projection, ``(batch, length, state)``.
        D: weights of ``u`` in the output, ``(channels,)``.
        gate: ``(batch, length, channels)``.
        softplus: take ``softplus(delta)`` as step sizes.
        backend: instead of the one that is chosen.

    Raises:
        ScanInputError: a wrong shape, device or dtype; with ``REFLEXARC_SCAN_CHECK=1`` also a
            value that is not finite. Otherwise a NaN is carried into the output.
        ScanUnavailableError: ``REFLEXARC_SCAN`` names a backend that does not run here.
    """
    check_shapes(u, delta, A, B, C, D, gate)
    if torch.compiler.is_compiling():
        operator: Tensor = operators.scan(u, delta, A, B, C, D, gate, softplus)
        return operator
    if checks_values() and may_look_at(u):
        check_finite(u=u, delta=delta, A=A, B=B, C=C, D=D, gate=gate)
    chosen = backend or backend_for(u.device, u.dtype)
    working = torch.promote_types(u.dtype, torch.float32)
    u_, delta, A, B, C = (tensor.to(working) for tensor in (u, delta, A, B, C))
    D, gate = (None if tensor is None else tensor.to(working) for tensor in (D, gate))
    # Under autocast a product in here would fall to half precision.
    with torch.autocast(u.device.type, enabled=False):
        return chosen.scan(u_, delta, A, B, C, D, gate, softplus).to(u.dtype).contiguous()


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None
) -> Tensor:
    """``silu`` of a depthwise convolution that sees the past only; ``(batch, length, channels)``.

    Args:
        x: of any floating dtype, which the result has too.
        weight: ``(channels, taps)``, of which the last meets the token itself.
        bias: ``(channels,)``.
    """
    if torch.compiler.is_compiling():
        operator: Tensor = operators.convolution(x, weight, bias)
        return operator
    chosen = backend or backend_for(x.device, x.dtype)
    working = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        taps = weight.to(working)
        offset = taps.new_zeros(len(taps)) if bias is None else bias.to(working)
        return chosen.convolve(x.to(working), taps, offset).to(x.dtype).contiguous()
