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
from reflexarc.policy.layers.selective_scan.checks import check_finite, check_lengths, may_look_at

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


class _Direction(nn.Module):
    """Convolution, selection and scan of one direction: what lies between the projections."""

    d_state: int
    d_inner: int
    dt_rank: int

    def __init__(self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2):
        super().__init__()
        self._add_parameters(d_model, d_state, d_conv, expand)
        self._init_dt()

    def _add_parameters(self, d_model: int, d_state: int, d_conv: int, expand: int) -> None:
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_dt(self) -> None:
        """Step sizes log-uniform in [1e-3, 0.1]: the bias is the inverse softplus of them."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_low, log_high = math.log(_DT_MIN), math.log(_DT_MAX)
        dt = torch.exp(torch.rand(self.d_inner) * (log_high - log_low) + log_low)
        dt = dt.clamp(min=_DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def mix(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """Two ``(B, L, d_inner)`` to one."""
        hidden = causal_convolution(hidden, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        dt, B, C = self.x_proj(hidden).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = self.dt_proj(dt.contiguous())
        A = -torch.exp(self.A_log)
        return selective_scan(hidden, delta, A, B, C, self.D, gate, softplus=True)


class Mamba(_Direction):
    """A selective state-space mixer: ``(B, L, d_model)`` to the same, causal in L.

    Every linear layer gets contiguous tokens: torch multiplies strided ones in another order
    when weights require a gradient than when they do not, and a served chunk must equal the
    trained one to the last bit. ``A_log`` and ``D`` stay in fp32 and carry ``_no_weight_decay``,
    as in mamba_ssm. Without its norm, a block has 437,760 parameters at ``d_model`` 256.

    With ``bidirectional`` every token sees all others, as in Vision Mamba (Zhu et al., arXiv
    2401.09417, "v2"): both directions share the projections in and out, the second has a
    convolution, a selection and a scan of its own (``reverse``, 44,544 parameters more at
    ``d_model`` 256), and the mean of the two is projected.
    """

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2,
        bidirectional: bool = False,
    ):  # fmt: skip
        nn.Module.__init__(self)
        # In mamba_ssm's order, on which the random numbers of the initialisation depend.
        self.in_proj = nn.Linear(d_model, 2 * expand * d_model, bias=False)
        self._add_parameters(d_model, d_state, d_conv, expand)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._init_dt()
        self.reverse = (
            _Direction(d_model, d_state=d_state, d_conv=d_conv, expand=expand)
            if bidirectional
            else None
        )

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``lengths (B,)`` counts the real tokens of each row, the others follow them."""
        hidden, gate = self.in_proj(tokens).chunk(2, dim=-1)
        mixed = self.mix(hidden, gate)
        if self.reverse is not None:
            other = self.reverse.mix(_reversed(hidden, lengths), _reversed(gate, lengths))
            mixed = 0.5 * (mixed + _reversed(other, lengths))
        projected: Tensor = self.out_proj(mixed)
        return projected


def _reversed(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """``rows (B, L, D)`` with the real steps of each row in reverse order, padding in its place."""
    if lengths is None:
        return rows.flip(1)
    steps = torch.arange(rows.shape[1], device=rows.device)
    mirrored = lengths[:, None] - 1 - steps
    order = torch.where(mirrored >= 0, mirrored, steps)
    return rows.gather(1, order[:, :, None].expand_as(rows))


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
        mlp_hidden: int = 0, bidirectional: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = Mamba(
            d_model, d_state=d_state, d_conv=d_conv, expand=expand, bidirectional=bidirectional
        )
        self.mlp_norm = nn.RMSNorm(d_model, eps=1e-5) if mlp_hidden else None
        self.mlp = GatedMLP(d_model, mlp_hidden) if mlp_hidden else None

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        tokens = tokens + self.mixer(self.norm(tokens), lengths)
        if self.mlp_norm is not None and self.mlp is not None:
            tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return tokens


class MambaStack(nn.Module):
    """``depth`` blocks and a final RMSNorm; ``(B, L, d_model)`` to the same.

    Causal in L unless ``bidirectional``; see :class:`Mamba`.
    """

    def __init__(
        self, d_model: int, depth: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2,
        mlp_hidden: int = 0, bidirectional: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(
            MambaBlock(
                d_model, d_state=d_state, d_conv=d_conv, expand=expand, mlp_hidden=mlp_hidden,
                bidirectional=bidirectional,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self._scale_residuals(depth * (2 if mlp_hidden else 1))
        self._has_run = False

    @torch.no_grad()
    def _scale_residuals(self, residuals: int) -> None:
        """Keep the residual stream's variance independent of depth, as mamba_ssm does."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.div_(math.sqrt(residuals))

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens to outputs; what stands at padding reaches no real token's output.

        Args:
            tokens: ``(B, L, d_model)``.
            lengths: ``int64 (B,)``, how many tokens of each row are real, at least one; padding
                follows them. None: all are. Outputs at padding mean nothing.

        Raises:
            ScanInputError: lengths of a wrong shape, dtype or range; at the first call also
                tokens that are not finite (``REFLEXARC_SCAN_CHECK=1`` looks at every call).
        """
        if lengths is not None:
            check_lengths(lengths, tokens)
        if not self._has_run and may_look_at(tokens):
            check_finite(tokens=tokens)
            self._has_run = True
        for block in self.blocks:
            tokens = block(tokens, lengths)
        normed: Tensor = self.norm(tokens)
        return normed
