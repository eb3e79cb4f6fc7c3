"""mamba_ssm's CUDA kernels; importing this module fails where the package is absent."""

from __future__ import annotations

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As :func:`reflexarc.policy.layers.selective_scan.selective_scan`, in single precision."""
    u, delta, B, C = (tensor.transpose(1, 2).contiguous() for tensor in (u, delta, B, C))
    gate = None if gate is None else gate.transpose(1, 2).contiguous()
    y: Tensor = selective_scan_fn(u, delta, A, B, C, D=D, z=gate, delta_softplus=softplus)
    return y.transpose(1, 2)
