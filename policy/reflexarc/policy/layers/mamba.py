"""Mamba blocks with the parameter names and shapes of ``mamba_ssm`` and ``transformers``.

Weights interchange with ``mamba_ssm.Mamba`` and ``transformers``' ``MambaMixer``. Which code scans
is chosen by :mod:`reflexarc.policy.layers.selective_scan.choice`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.policy.layers.selective_scan import causal_convolution, selective_scan

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


class Mamba(nn.Module):
    """A selective state-space mixer: ``(B, L, d_model)`` to the same, causal in L.

    Every linear layer gets contiguous tokens: torch multiplies strided ones in another order
    when weights require a gradient than when they do not, and a served chunk must equal the
    trained one to the last bit. ``A_log`` and ``D`` stay in fp32 and carry ``_no_weight_decay``,
    as in mamba_ssm. Without its norm, a block has 437,760 parameters at ``d_model`` 256.
    """

    def __init__(self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2):
        super().__init__()
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self._init_dt()

    @torch.no_grad()
    def _init_dt(self) -> None:
        """Step sizes log-uniform in [1e-3, 0.1]: the bias is the inverse softplus of them."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_low, log_high = math.log(_DT_MIN), math.log(_DT_MAX)
        dt = torch.exp(torch.rand(self.d_inner) * (log_high - log_low) + log_low)
        dt = dt.clamp(min=_DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, gate = self.in_proj(tokens).chunk(2, dim=-1)
        hidden = causal_convolution(hidden, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        dt, B, C = self.x_proj(hidden).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = self.dt_proj(dt.contiguous())
        A = -torch.exp(self.A_log)
        mixed = selective_scan(hidden, delta, A, B, C, self.D, gate, softplus=True)
        projected: Tensor = self.out_proj(mixed)
        return projected


class GatedMLP(nn.Module):
    """``fc2(x · silu(gate))`` with one input projection for both, as in mamba_ssm."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.fc1(tokens).chunk(2, dim=-1)
        projected: Tensor = self.fc2(value * F.silu(gate))
        return projected


class MambaBlock(nn.Module):
    """Pre-norm residual block: Mamba, then a gated MLP where ``mlp_hidden`` is above 0."""

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2,
        mlp_hidden: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = Mamba(d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        self.mlp_norm = nn.RMSNorm(d_model, eps=1e-5) if mlp_hidden else None
        self.mlp = GatedMLP(d_model, mlp_hidden) if mlp_hidden else None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.mixer(self.norm(tokens))
        if self.mlp_norm is not None and self.mlp is not None:
            tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return tokens


class MambaStack(nn.Module):
    """``depth`` blocks and a final RMSNorm; ``(B, L, d_model)`` to the same, causal in L."""

    def __init__(
        self, d_model: int, depth: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2,
        mlp_hidden: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(
            MambaBlock(
                d_model, d_state=d_state, d_conv=d_conv, expand=expand, mlp_hidden=mlp_hidden
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self._scale_residuals(depth * (2 if mlp_hidden else 1))

    @torch.no_grad()
    def _scale_residuals(self, residuals: int) -> None:
        """Keep the residual stream's variance independent of depth, as mamba_ssm does."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.div_(math.sqrt(residuals))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed
