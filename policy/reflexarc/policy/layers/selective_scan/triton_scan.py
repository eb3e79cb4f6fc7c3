"""The scan as Triton kernels for CUDA, forward and backward; importing it needs triton.

A program holds one row and ``BLOCK_D`` channels with all their states, and walks over the steps in
tiles of ``BLOCK_L``. Within a tile the recurrence is an associative scan of the pairs (decay,
input), which neither divides nor overflows whatever the decay; from tile to tile one state is
carried in registers. The forward pass keeps the state before each tile, the backward pass computes
the others anew. Sums over channels (for ``B`` and ``C``) and over rows (for ``A`` and ``D``) are
written as parts and added by torch in a fixed order: no atomics, so that results repeat.

All arithmetic is in single precision; tensors come strided in (batch, length, channels).
"""

# Kernels have no types, and triton exports none.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _after(decay_first, input_first, decay_second, input_second):
    """Two steps ``h -> decay · h + input`` as one."""
    return decay_first * decay_second, decay_second * input_first + input_second


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact where exp(x) is small, as log1p is; a NaN stays one."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.log(u) + (e - (u - 1.0)) / u)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, gate_ptr, y_ptr, kept_ptr,
    length, channels, state, tiles,
    u_b, u_l, u_d, delta_b, delta_l, delta_d, B_b, B_l, B_n, C_b, C_l, C_n, gate_b, gate_l, gate_d,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_GATE: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_L)
    d_in, n_in = d < channels, n < state
    # Tensors of a tile are (channels, steps, states), pairs (channels, states).
    pair = d[:, None] * state + n[None, :]
    pair_in = d_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + pair, mask=pair_in, other=0.0)
    D = tl.load(D_ptr + d, mask=d_in, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    carry = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for tile in range(tiles):
        if KEEP:
            kept = kept_ptr + (b * tiles + tile) * channels * state
            tl.store(kept + pair, carry, mask=pair_in)
        t = (tile * BLOCK_L + offsets).to(tl.int64)
        t_in = t < length
        here = d_in[:, None] & t_in[None, :]
        u = tl.load(u_ptr + b * u_b + d[:, None] * u_d + t[None, :] * u_l, mask=here, other=0.0)
        delta = tl.load(
            delta_ptr + b * delta_b + d[:, None] * delta_d + t[None, :] * delta_l,
            mask=here, other=0.0,
        )  # fmt: skip
        if SOFTPLUS:
            delta = tl.where(here, _softplus(delta), 0.0)
        states_in = t_in[:, None] & n_in[None, :]
        B = tl.load(
            B_ptr + b * B_b + t[:, None] * B_l + n[None, :] * B_n, mask=states_in, other=0.0
        )
        C = tl.load(
            C_ptr + b * C_b + t[:, None] * C_l + n[None, :] * C_n, mask=states_in, other=0.0
        )
        # Beyond the end delta is 0: the decay is 1 and the state stays.
        decay = tl.exp(delta[:, :, None] * A[:, None, :])
        inputs = (delta * u)[:, :, None] * B[None, :, :]
        decayed, h = tl.associative_scan((decay, inputs), 1, _after)
        h += decayed * carry[:, None, :]
        y = tl.sum(h * C[None, :, :], axis=2) + D[:, None] * u
        if HAS_GATE:
            gate = tl.load(
                gate_ptr + b * gate_b + d[:, None] * gate_d + t[None, :] * gate_l,
                mask=here, other=0.0,
            )  # fmt: skip
            y *= gate * _sigmoid(gate)
        place = (b * length + t)[None, :] * channels + d[:, None]
        tl.store(y_ptr + place, y, mask=here)
        is_last = offsets == BLOCK_L - 1
        carry = tl.sum(tl.where(is_last[None, :, None], h, 0.0), axis=1)


@triton.jit
def _backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, gate_ptr, kept_ptr, grad_y_ptr,
    grad_u_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_D_ptr, grad_gate_ptr,
    batch, length, channels, state, tiles,
    u_b, u_l, u_d, delta_b, delta_l, delta_d, B_b, B_l, B_n, C_b, C_l, C_n, gate_b, gate_l, gate_d,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_L)
    d_in, n_in = d < channels, n < state
    pair = d[:, None] * state + n[None, :]
    pair_in = d_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + pair, mask=pair_in, other=0.0)
    D = tl.load(D_ptr + d, mask=d_in, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    grad_A = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    grad_D = tl.zeros([BLOCK_D], tl.float32)
    # The gradient at the state of the first step of the tile after this one.
    later = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        t = (tile * BLOCK_L + offsets).to(tl.int64)
        t_in = t < length
        here = d_in[:, None] & t_in[None, :]
        place = (b * length + t)[None, :] * channels + d[:, None]
        u = tl.load(u_ptr + b * u_b + d[:, None] * u_d + t[None, :] * u_l, mask=here, other=0.0)
        raw_at = delta_ptr + b * delta_b + d[:, None] * delta_d + t[None, :] * delta_l
        raw = tl.load(raw_at, mask=here, other=0.0)
        next_in = d_in[:, None] & (t + 1 < length)[None, :]
        delta_next = tl.load(raw_at + delta_l, mask=next_in, other=0.0)
        delta = raw
        if SOFTPLUS:
            delta = tl.where(here, _softplus(raw), 0.0)
            delta_next = tl.where(next_in, _softplus(delta_next), 0.0)
        states_in = t_in[:, None] & n_in[None, :]
        B = tl.load(
            B_ptr + b * B_b + t[:, None] * B_l + n[None, :] * B_n, mask=states_in, other=0.0
        )
        C = tl.load(
            C_ptr + b * C_b + t[:, None] * C_l + n[None, :] * C_n, mask=states_in, other=0.0
        )
        kept = kept_ptr + (b * tiles + tile) * channels * state
        carry = tl.load(kept + pair, mask=pair_in, other=0.0)

        # The states of this tile, anew.
        decay = tl.exp(delta[:, :, None] * A[:, None, :])
        inputs = (delta * u)[:, :, None] * B[None, :, :]
        decayed, h = tl.associative_scan((decay, inputs), 1, _after)
        h += decayed * carry[:, None, :]

        grad = tl.load(grad_y_ptr + place, mask=here, other=0.0)
        if HAS_GATE:
            gate = tl.load(
                gate_ptr + b * gate_b + d[:, None] * gate_d + t[None, :] * gate_l,
                mask=here, other=0.0,
            )  # fmt: skip
            opened = _sigmoid(gate)
            y = tl.sum(h * C[None, :, :], axis=2) + D[:, None] * u
            slope = opened * (1.0 + gate * (1.0 - opened))
            tl.store(grad_gate_ptr + place, grad * y * slope, mask=here)
            grad *= gate * opened
        grad_D += tl.sum(grad * u, axis=1)
        # Parts over channels: (blocks, batch, length, state).
        part = ((tl.program_id(0) * batch + b) * length + t)[:, None] * state + n[None, :]
        to_C = tl.sum(grad[:, :, None] * h, axis=0)
        tl.store(grad_C_ptr + part, to_C, mask=states_in)

        # The gradient at the states, from the last step to the first.
        decay_next = tl.exp(delta_next[:, :, None] * A[:, None, :])
        decayed_back, g = tl.associative_scan(
            (decay_next, grad[:, :, None] * C[None, :, :]), 1, _after, reverse=True
        )
        g += decayed_back * later[:, None, :]
        is_first = offsets == 0
        later = tl.sum(tl.where(is_first[None, :, None], g, 0.0), axis=1)

        to_B = tl.sum(g * (delta * u)[:, :, None], axis=0)
        tl.store(grad_B_ptr + part, to_B, mask=states_in)
        grad_du = tl.sum(g * B[None, :, :], axis=2)
        # decay · h of the step before is what h has beyond its input.
        exponent = g * (h - inputs)
        grad_delta = tl.sum(exponent * A[:, None, :], axis=2) + grad_du * u
        grad_A += tl.sum(exponent * delta[:, :, None], axis=1)
        if SOFTPLUS:
            grad_delta = tl.where(raw > 20.0, grad_delta, grad_delta * _sigmoid(raw))
        tl.store(grad_delta_ptr + place, grad_delta, mask=here)
        tl.store(grad_u_ptr + place, grad_du * delta + grad * D[:, None], mask=here)
    # Parts over rows: (batch, channels, state) and (batch, channels).
    tl.store(grad_A_ptr + b * channels * state + pair, grad_A, mask=pair_in)
    if HAS_D:
        tl.store(grad_D_ptr + b * channels + d, grad_D, mask=d_in)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As :func:`reflexarc.policy.layers.selective_scan.selective_scan`, in single precision."""
    inputs = (u, delta, A, B, C, D, gate)
    wanted = (tensor is not None and tensor.requires_grad for tensor in inputs)
    if torch.is_grad_enabled() and any(wanted):
        y: Tensor = _TritonScan.apply(*inputs, softplus)
        return y
    return _forward(inputs, softplus, None)


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class _Tiles:
    """How channels, steps and states are cut; powers of two, as Triton asks.

    The sizes are those at which the backward kernel, compiled for sm_80 and sm_90, keeps its
    tiles in registers. Both kernels use the same: the states kept are those before each tile.
    """

    def __init__(self, u: Tensor, state: int) -> None:
        self.batch, self.length, self.channels = u.shape
        self.state = state
        self.block_n = max(2, triton.next_power_of_2(state))
        self.block_d = 4 if self.block_n <= 64 else max(1, 256 // self.block_n)
        steps = 32 if self.block_n <= 16 else 16
        self.block_l = max(4, min(steps, triton.next_power_of_2(self.length)))
        self.warps = 4 if self.block_d * self.block_l * self.block_n <= 2048 else 8
        self.count = triton.cdiv(self.length, self.block_l)
        self.blocks = triton.cdiv(self.channels, self.block_d)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.length, self.channels, self.state, self.count

    @property
    def grid(self) -> tuple[int, int]:
        # Rows lie in the second dimension, which CUDA limits to 65,535: more than fit a device.
        return self.blocks, self.batch

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK_D": self.block_d, "BLOCK_L": self.block_l, "BLOCK_N": self.block_n,
            "num_warps": self.warps,
        }  # fmt: skip


def _strides(inputs: _Inputs) -> list[int]:
    u, delta, _, B, C, _, gate = inputs
    tensors = (u, delta, B, C, u if gate is None else gate)
    return [stride for tensor in tensors for stride in tensor.stride()]


def _pointers(inputs: _Inputs) -> list[Tensor]:
    u, delta, A, B, C, D, gate = inputs
    # A pointer that is not read must be one all the same.
    weights = A if D is None else D.contiguous()
    return [u, delta, A.contiguous(), B, C, weights, u if gate is None else gate]


def _flags(inputs: _Inputs, softplus: bool) -> dict[str, Any]:
    D, gate = inputs[5:]
    return {"SOFTPLUS": softplus, "HAS_D": D is not None, "HAS_GATE": gate is not None}


def _forward(inputs: _Inputs, softplus: bool, kept: Tensor | None) -> Tensor:
    tiles = _Tiles(inputs[0], inputs[2].shape[1])
    y = inputs[0].new_empty(inputs[0].shape)
    if y.numel():
        with torch.cuda.device_of(y):  # Triton launches on the current device
            _forward_kernel[tiles.grid](
                *_pointers(inputs), y, y if kept is None else kept, *tiles.sizes,
                *_strides(inputs), **_flags(inputs, softplus), KEEP=kept is not None,
                **tiles.constants,
            )  # fmt: skip
    return y


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        gate: Tensor | None, softplus: bool,
    ) -> Tensor:  # fmt: skip
        tiles = _Tiles(u, A.shape[1])
        kept = u.new_empty(tiles.batch, tiles.count, tiles.channels, tiles.state)
        inputs = (u, delta, A, B, C, D, gate)
        ctx.save_for_backward(*inputs, kept)
        ctx.softplus = softplus
        return _forward(inputs, softplus, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *saved, kept = ctx.saved_tensors
        inputs: _Inputs = tuple(saved)
        u, _, A, _, _, D, gate = inputs
        tiles = _Tiles(u, A.shape[1])
        grad_u, grad_delta, grad_gate = u.new_empty(3, *u.shape)
        parts = u.new_empty(2, tiles.blocks, tiles.batch, tiles.length, tiles.state)
        to_A = u.new_empty(tiles.batch, tiles.channels, tiles.state)
        to_D = u.new_empty(tiles.batch, tiles.channels)
        if u.numel():
            with torch.cuda.device_of(u):
                _backward_kernel[tiles.grid](
                    *_pointers(inputs), kept, grad_y.contiguous(), grad_u, grad_delta, to_A,
                    *parts, to_D, grad_gate, tiles.batch, *tiles.sizes, *_strides(inputs),
                    **_flags(inputs, ctx.softplus), **tiles.constants,
                )  # fmt: skip
        grad_B, grad_C = parts.sum(1)
        return (
            grad_u, grad_delta, to_A.sum(0), grad_B, grad_C,
            None if D is None else to_D.sum(0), None if gate is None else grad_gate, None,
        )  # fmt: skip
