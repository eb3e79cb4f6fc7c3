"""The scan in plain torch, cache-blocked, with a handwritten backward pass.

Materialising the states ``(batch, length, channels, state)`` at once costs more time
in page faults than in arithmetic, so rows and steps are walked in blocks whose scratch buffers
stay in the processor's cache and are used again. The backward pass keeps one state a block and
computes the others anew. Buffers belong to the call: any number of threads may scan at once.

Scratch is laid out ``(steps, rows, state, channels)``: the channels, the longest dimension, are
innermost, which keeps every elementwise loop long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values of one scratch buffer on the CPU: 1 MiB of fp32, so that the three buffers of the
# backward pass stay in a processor's cache; half and twice of it are as fast.
CPU_BUFFER_VALUES = 1 << 18
# Rows are taken together until a step holds this many values, which hides the cost of a call.
CPU_STEP_VALUES = 1 << 15
# An accelerator has no such cache; there only the peak of memory is bounded.
ACCELERATOR_BUFFER_VALUES = 1 << 26


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As :func:`reflexarc.policy.layers.selective_scan.selective_scan`; all of one dtype."""
    if softplus:
        delta = F.softplus(delta)
    y = _scan(u, delta, A, B, C)
    if D is not None:
        y = torch.addcmul(y, u, D)  # keeps u · D from being materialised
    return y if gate is None else y * F.silu(gate)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    inputs = (u, delta, A, B, C)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y: Tensor = _SelectiveScan.apply(*inputs)  # type: ignore[no-untyped-call]
        return y
    return _forward(u, delta, A, B, C, checkpoints=None)


class _Scratch(NamedTuple):
    """``values (steps, rows, state, channels)``, and a view of each step.

    The views are made once and serve all blocks: making one costs as much as a small product.
    """

    values: Tensor
    each: tuple[Tensor, ...]


class _Blocks:
    """How rows and steps are cut, and the scratch that the blocks share."""

    def __init__(self, u: Tensor, state: int, buffers: int) -> None:
        self.batch, self.length, channels = u.shape
        row = state * channels
        if u.device.type == "cpu":
            self.rows = max(1, min(self.batch, CPU_STEP_VALUES // row))
            budget = CPU_BUFFER_VALUES
        else:
            self.rows, budget = self.batch, ACCELERATOR_BUFFER_VALUES
        self.steps = max(4, min(self.length, budget // (self.rows * row)))
        self._scratch = [u.new_empty(self.steps * self.rows * row) for _ in range(buffers)]
        self._inner = (state, channels)
        self._shaped: dict[int, list[_Scratch]] = {}

    @property
    def count(self) -> int:
        return -(-self.length // self.steps)

    def row_blocks(self) -> Iterator[slice]:
        for start in range(0, self.batch, self.rows):
            yield slice(start, min(self.batch, start + self.rows))

    def step_blocks(self) -> list[slice]:
        return [
            slice(start, min(self.length, start + self.steps))
            for start in range(0, self.length, self.steps)
        ]

    def scratch(self, steps: slice, rows: slice) -> list[_Scratch]:
        count, number = steps.stop - steps.start, rows.stop - rows.start
        if number not in self._shaped:
            shape = (self.steps, number, *self._inner)
            buffers = [buffer[: math.prod(shape)].view(shape) for buffer in self._scratch]
            self._shaped[number] = [_Scratch(buffer, buffer.unbind(0)) for buffer in buffers]
        return [_Scratch(s.values[:count], s.each[:count]) for s in self._shaped[number]]


def _time_major(tensor: Tensor, rows: slice) -> Tensor:
    """``(steps, rows, ...)``, contiguous: matmul would otherwise copy it block by block."""
    return tensor[rows].transpose(0, 1).contiguous()


def _contract_channels(vectors: Tensor, states: Tensor) -> Tensor:
    """``(T, R, channels)`` with ``(T, R, state, channels)`` to ``(T, R, state)``."""
    return torch.matmul(vectors.unsqueeze(2), states.transpose(2, 3)).squeeze(2)


def _contract_state(vectors: Tensor, states: Tensor) -> Tensor:
    """``(T, R, state)`` with ``(T, R, state, channels)`` to ``(T, R, channels)``."""
    return torch.matmul(vectors.unsqueeze(2), states).squeeze(2)


def _states(
    decay: _Scratch, states: _Scratch, delta: Tensor, du: Tensor, At: Tensor, B: Tensor,
    carry: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``decay`` with exp(delta·A) and ``states`` with h of one block, in place.

    ``delta`` and ``du = delta·u`` are ``(steps, rows, channels)``, ``B`` ``(steps, rows, state)``,
    ``At`` ``(state, channels)``, ``carry`` the state before the block or None at the start.
    """
    torch.mul(delta.unsqueeze(2), At, out=decay.values)
    decay.values.exp_()
    torch.mul(du.unsqueeze(2), B.unsqueeze(3), out=states.values)
    previous = carry
    for a, h in zip(decay.each, states.each, strict=True):
        if previous is not None:
            h.addcmul_(a, previous)
        previous = h


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, checkpoints: Tensor | None
) -> Tensor:
    """``checkpoints (blocks, batch, state, channels)`` receives the state after each block."""
    blocks = _Blocks(u, A.shape[1], buffers=2)
    At = A.t().contiguous()
    y = u.new_empty(u.shape)
    carry_buffer = u.new_empty(blocks.rows, A.shape[1], u.shape[2])
    for rows in blocks.row_blocks():
        delta_r, B_r, C_r = (_time_major(tensor, rows) for tensor in (delta, B, C))
        du = delta_r * _time_major(u, rows)
        carry: Tensor | None = None
        for index, steps in enumerate(blocks.step_blocks()):
            decay, states = blocks.scratch(steps, rows)
            _states(decay, states, delta_r[steps], du[steps], At, B_r[steps], carry)
            _set(y, rows, steps, _contract_state(C_r[steps], states.values))
            if checkpoints is None:
                carry = carry_buffer[: rows.stop - rows.start].copy_(states.each[-1])
            else:
                carry = checkpoints[index, rows].copy_(states.each[-1])
    return y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        blocks = _Blocks(u, A.shape[1], buffers=0)
        checkpoints = u.new_empty(blocks.count, u.shape[0], A.shape[1], u.shape[2])
        y = _forward(u, delta, A, B, C, checkpoints)
        ctx.save_for_backward(u, delta, A, B, C, checkpoints)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, delta, A, B, C, checkpoints = ctx.saved_tensors
        blocks = _Blocks(u, A.shape[1], buffers=3)
        At = A.t().contiguous()
        grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
        grad_B, grad_C = u.new_empty(B.shape), u.new_empty(C.shape)
        grad_At = torch.zeros_like(At)
        for rows in blocks.row_blocks():
            u_r, delta_r, B_r, C_r, gy_r = (
                _time_major(tensor, rows) for tensor in (u, delta, B, C, grad_y)
            )
            du = delta_r * u_r
            from_later: Tensor | None = None
            for index, steps in reversed(list(enumerate(blocks.step_blocks()))):
                decay, states, grads = blocks.scratch(steps, rows)
                carry = checkpoints[index - 1, rows] if index else None
                _states(decay, states, delta_r[steps], du[steps], At, B_r[steps], carry)
                gy = gy_r[steps]
                _set(grad_C, rows, steps, _contract_channels(gy, states.values))
                torch.mul(gy.unsqueeze(2), C_r[steps].unsqueeze(3), out=grads.values)
                from_later = _propagate(decay, grads, from_later)
                _set(grad_B, rows, steps, _contract_channels(du[steps], grads.values))
                grad_du = _contract_state(B_r[steps], grads.values)
                _set(grad_u, rows, steps, grad_du * delta_r[steps])
                # Gradient at the exponent: dL/dh ⊙ decay ⊙ h of the step before.
                exponent = grads.values.mul_(decay.values)
                exponent[1:].mul_(states.values[:-1])
                if carry is None:
                    exponent[0].zero_()
                else:
                    exponent[0].mul_(carry)
                through_A = torch.mul(exponent, At, out=decay.values).sum(2)
                _set(grad_delta, rows, steps, through_A.addcmul_(grad_du, u_r[steps]))
                grad_At += exponent.mul_(delta_r[steps].unsqueeze(2)).sum((0, 1))
        return grad_u, grad_delta, grad_At.t(), grad_B, grad_C


def _set(target: Tensor, rows: slice, steps: slice, value: Tensor) -> None:
    """Write a time-major ``(steps, rows, ...)`` into a batch-major ``(batch, length, ...)``."""
    target[rows, steps] = value.transpose(0, 1)


def _propagate(decay: _Scratch, grads: _Scratch, from_later: Tensor | None) -> Tensor:
    """Turn dL/dy·C into dL/dh, in place, from the last step to the first.

    Returns what the block before receives: decay ⊙ dL/dh of this block's first step.
    """
    if from_later is not None:
        grads.each[-1].add_(from_later)
    for t in range(len(grads.each) - 2, -1, -1):
        grads.each[t].addcmul_(decay.each[t + 1], grads.each[t + 1])
    return decay.each[0] * grads.each[0]
