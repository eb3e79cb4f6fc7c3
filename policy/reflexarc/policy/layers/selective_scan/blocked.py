"""The scan in plain torch, cache-blocked, with a handwritten backward pass.

Materialising the states ``(batch, length, channels, state)`` at once costs more time
in page faults than in arithmetic, so rows and steps are walked in blocks whose scratch buffers
stay in the processor's cache and are used again. The backward pass keeps one state a block and
computes the others anew. Buffers belong to the call: any number of threads may scan at once.

Scratch is laid out ``(steps, rows, state, channels)``: the channels, the longest dimension, are
innermost, which keeps every elementwise loop long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values of one scratch buffer on the CPU: 2 MiB of fp32: the three buffers of the
# backward pass stay in a level-2 cache of a few MiB.
CPU_BUFFER_VALUES = 1 << 19
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

    def scratch(self, steps: slice, rows: slice) -> list[Tensor]:
        shape = (steps.stop - steps.start, rows.stop - rows.start, *self._inner)
        size = shape[0] * shape[1] * shape[2] * shape[3]
        return [buffer[:size].view(shape) for buffer in self._scratch]


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
    decay: Tensor, states: Tensor, delta: Tensor, du: Tensor, At: Tensor, B: Tensor,
    carry: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``decay`` with exp(delta·A) and ``states`` with h of one block, in place.

    ``delta`` and ``du = delta·u`` are ``(steps, rows, channels)``, ``B`` ``(steps, rows, state)``,
    ``At`` ``(state, channels)``, ``carry`` the state before the block or None at the start.
    """
    torch.mul(delta.unsqueeze(2), At, out=decay)
    decay.exp_()
    torch.mul(du.unsqueeze(2), B.unsqueeze(3), out=states)
    # unbind, not indexing: views are made once instead of at every step.
    previous = carry
    for a, h in zip(decay.unbind(0), states.unbind(0), strict=True):
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
            _set(y, rows, steps, _contract_state(C_r[steps], states))
            if checkpoints is None:
                carry = carry_buffer[: rows.stop - rows.start].copy_(states[-1])
            else:
                carry = checkpoints[index, rows].copy_(states[-1])
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
                _set(grad_C, rows, steps, _contract_channels(gy, states))
                torch.mul(gy.unsqueeze(2), C_r[steps].unsqueeze(3), out=grads)
                from_later = _propagate(decay, grads, from_later)
                _set(grad_B, rows, steps, _contract_channels(du[steps], grads))
                grad_du = _contract_state(B_r[steps], grads)
                _set(grad_u, rows, steps, grad_du * delta_r[steps])
                # Gradient at the exponent: dL/dh ⊙ decay ⊙ h of the step before.
                exponent = grads.mul_(decay)
                exponent[1:].mul_(states[:-1])
                if carry is None:
                    exponent[0].zero_()
                else:
                    exponent[0].mul_(carry)
                through_A = torch.mul(exponent, At, out=decay).sum(2)
                _set(grad_delta, rows, steps, through_A.addcmul_(grad_du, u_r[steps]))
                grad_At += exponent.mul_(delta_r[steps].unsqueeze(2)).sum((0, 1))
        return grad_u, grad_delta, grad_At.t(), grad_B, grad_C


def _set(target: Tensor, rows: slice, steps: slice, value: Tensor) -> None:
    """Write a time-major ``(steps, rows, ...)`` into a batch-major ``(batch, length, ...)``."""
    target[rows, steps] = value.transpose(0, 1)


def _propagate(decay: Tensor, grads: Tensor, from_later: Tensor | None) -> Tensor:
    """Turn dL/dy·C into dL/dh, in place, from the last step to the first.

    Returns what the block before receives: decay ⊙ dL/dh of this block's first step.
    """
    decays, gradients = decay.unbind(0), grads.unbind(0)
    if from_later is not None:
        gradients[-1].add_(from_later)
    for t in range(len(gradients) - 2, -1, -1):
        gradients[t].addcmul_(decays[t + 1], gradients[t + 1])
    return decays[0] * gradients[0]
