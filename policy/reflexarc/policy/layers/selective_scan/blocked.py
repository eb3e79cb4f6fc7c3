"""The scan in plain torch, cache-blocked, with a handwritten backward pass.

Materialising the states ``(batch, length, channels, state)`` at once costs more time
in page faults than in arithmetic, so rows and steps are walked in blocks whose scratch buffers
stay in the processor's cache and are used again. The backward pass keeps one state a block and
computes the others anew. Buffers belong to a thread: any number of threads may scan at once. On
several threads each takes its own channels or rows through a forward pass (:mod:`.tasks`); every
value comes from the same operations in the same order however the work is cut.

Decays are powers of two, exp(x) = 2^(x / ln 2): torch computes them in less than half the time.

Scratch is laid out ``(steps, rows, state, channels)``: the channels, the longest dimension, are
innermost, which keeps every elementwise loop long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflexarc.policy.layers.selective_scan import elementwise, tasks

LOG2_E = 1 / math.log(2)
# Values of one scratch buffer on the CPU: 1 MiB of fp32, so that the three buffers of the
# backward pass stay in a processor's cache; half and twice of it are as fast.
CPU_BUFFER_VALUES = 1 << 18
# Rows are taken together until a step holds this many values, which hides the cost of a call.
CPU_STEP_VALUES = 1 << 15
# Fewer states than these together are not worth a thread (a third of a millisecond).
CPU_TASK_VALUES = 1 << 19
# An accelerator has no such cache; there only the peak of memory is bounded.
ACCELERATOR_BUFFER_VALUES = 1 << 26


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As :func:`reflexarc.policy.layers.selective_scan.selective_scan`; all of one dtype."""
    inputs = (u, delta, A, B, C, D, gate)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        if softplus:
            delta = elementwise.softplus(delta)
        y: Tensor = _SelectiveScan.apply(u, delta, A, B, C)  # type: ignore[no-untyped-call]
        if D is not None:
            y = torch.addcmul(y, u, D)  # keeps u · D from being materialised
        return y if gate is None else y * elementwise.silu(gate)
    if u.shape[2] % elementwise.VALUES_IN_A_LOOP == 0:
        return _forward(u, delta, A, B, C, around=_Around(softplus, D, gate))
    y = _forward(u, elementwise.softplus(delta) if softplus else delta, A, B, C)
    if D is not None:
        y.addcmul_(u, D)
    return y if gate is None else y.mul_(elementwise.silu(gate))


class _Around(NamedTuple):
    """What a pass without gradients does before and after the scan, in the task that scans.

    Only where channels fill whole loops, so that bits do not depend on how they are cut; see
    :mod:`.elementwise`.
    """

    softplus: bool = False
    D: Tensor | None = None
    gate: Tensor | None = None

    def step_sizes(self, delta: Tensor, rows: slice, channels: slice) -> Tensor:
        cut = delta[rows, :, channels]
        if not self.softplus:
            return cut
        return elementwise.softplus_into(tasks.workspace("delta", cut), cut)

    def finish(self, y: Tensor, u: Tensor, rows: slice, channels: slice) -> None:
        """``y`` of these rows and channels, in place."""
        if self.D is not None:
            y.addcmul_(u, self.D[channels])
        if self.gate is not None:
            cut = self.gate[rows, :, channels]
            y.mul_(elementwise.silu_into(tasks.workspace("gate", cut), cut))


class _Scratch(NamedTuple):
    """``values (steps, rows, state, channels)``, and a view of each step.

    The views are made once and serve all blocks: making one costs as much as a small product.
    ``padded`` are the same values and as many more as fill whole loops: torch takes a power of the
    values that do not fill one by another function, whose last bit differs.
    """

    values: Tensor
    each: tuple[Tensor, ...]
    padded: Tensor

    @classmethod
    def of(cls, name: str, steps: int, rows: int, At: Tensor) -> _Scratch:
        shape = (steps, rows, *At.shape)
        padded = tasks.workspace(name, At, (_whole_loops(math.prod(shape)),))
        values = padded[: math.prod(shape)].view(shape)
        return cls(values, values.unbind(0), padded)

    def first(self, steps: int) -> _Scratch:
        if steps == len(self.each):
            return self
        values = self.values[:steps]
        return _Scratch(values, self.each[:steps], self.padded[: _whole_loops(values.numel())])


def _whole_loops(values: int) -> int:
    return -(-values // elementwise.VALUES_IN_A_LOOP) * elementwise.VALUES_IN_A_LOOP


class _Blocks:
    """How rows and steps are cut where one thread has all channels."""

    def __init__(self, u: Tensor, state: int) -> None:
        self.batch, self.length, channels = u.shape
        row = state * channels
        if u.device.type == "cpu":
            self.rows = max(1, min(self.batch, CPU_STEP_VALUES // row))
            budget = CPU_BUFFER_VALUES
        else:
            self.rows, budget = self.batch, ACCELERATOR_BUFFER_VALUES
        self.steps = max(4, min(self.length, budget // (self.rows * row)))

    def row_blocks(self) -> list[slice]:
        return _pieces(0, self.batch, self.rows)

    def step_blocks(self) -> list[slice]:
        return _pieces(0, self.length, self.steps)


def _pieces(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(stop, first + size)) for first in range(start, stop, size)]


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

    ``delta`` and ``du = delta·u`` are ``(steps, rows, 1, channels)``, ``B`` ``(steps, rows, state,
    1)``, ``At`` ``(state, channels)`` in units of ln 2, ``carry`` the state before the block or
    None at the start.
    """
    torch.mul(delta, At, out=decay.values)
    decay.padded.exp2_()
    torch.mul(du, B, out=states.values)
    if carry is None:
        _accumulate(states.each[1:], decay.each[1:], states.each[:-1])
    else:
        _accumulate(states.each, decay.each, (carry, *states.each[:-1]))


def _accumulate(
    targets: Sequence[Tensor], factors: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """``targets[i] += factors[i] · values[i]`` one after the other: a value may be a target."""
    if targets and targets[0].device.type == "cpu" and _keeps_order():
        torch._foreach_addcmul_(list(targets), list(factors), list(values))
        return
    for target, factor, value in zip(targets, factors, values, strict=True):
        target.addcmul_(factor, value)


@cache
def _keeps_order() -> bool:
    """Whether torch's call for a list of tensors works through it in order on a CPU.

    It does, in every version so far, and takes two thirds of the time of a loop in Python; an
    accelerator's does not.
    """
    with torch.no_grad():
        ones = torch.ones(65, 256).unbind(0)
        try:
            torch._foreach_addcmul_(ones[1:], ones[1:], ones[:-1])
        except (AttributeError, RuntimeError):
            return False
        return torch.equal(torch.stack(ones)[:, 0], torch.arange(1.0, 66.0))


class _Part(NamedTuple):
    """What one task of a forward pass scans: some rows and channels, so many steps at a time."""

    rows: slice
    channels: slice
    steps: int


def _parts(blocks: _Blocks, state: int, channels: int, device: torch.device) -> list[_Part]:
    """All rows and channels, cut for torch's threads where there is enough to do for several."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        return [_Part(rows, slice(0, channels), blocks.steps) for rows in blocks.row_blocks()]
    threads = min(threads, blocks.batch * blocks.length * channels * state // CPU_TASK_VALUES)
    budget = tasks.values_on_one_thread(CPU_BUFFER_VALUES)
    rows_each = max(1, min(-(-blocks.batch // max(1, threads)), blocks.rows))
    threads_a_row = max(1, -(-threads * rows_each // blocks.batch))
    # In whole loops: what remains at the end, a sum adds in another order.
    channels_each = elementwise.VALUES_IN_A_LOOP * -(
        -channels // (elementwise.VALUES_IN_A_LOOP * threads_a_row)
    )
    steps = max(1, min(blocks.length, budget // (rows_each * state * min(channels, channels_each))))
    return [
        _Part(rows, columns, steps)
        for rows in _pieces(0, blocks.batch, rows_each)
        for columns in _pieces(0, channels, channels_each)
    ]


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    checkpoints: Tensor | None = None, around: _Around | None = None,
) -> Tensor:  # fmt: skip
    """``checkpoints (blocks, batch, state, channels)`` receives the state after each block."""
    blocks, around = _Blocks(u, A.shape[1]), around or _Around()
    y = u.new_empty(u.shape)
    At = (A.t() * LOG2_E).contiguous()
    # Without checkpoints there is nothing to do at the end of a block.
    stops = blocks.step_blocks() if checkpoints is not None else [slice(0, blocks.length)]

    def scan_part(part: _Part) -> None:
        rows, channels, size = part
        cut = [_pieces(block.start, block.stop, size) for block in stops]
        counts = [piece.stop - piece.start for pieces in cut for piece in pieces]
        ends = {sum(map(len, cut[: i + 1])) - 1: i for i in range(len(cut))}
        u_part, y_part = u[rows, :, channels], y[rows, :, channels]
        delta_part = around.step_sizes(delta, rows, channels)
        du_part = torch.mul(delta_part, u_part, out=tasks.workspace("du", u_part))
        # All views at once: making one costs as much as an operation on a small block, and
        # every call is one more at which threads wait for the interpreter.
        delta_p, du_p = (
            x.transpose(0, 1).unsqueeze(2).split_with_sizes(counts) for x in (delta_part, du_part)
        )
        y_p = y_part.transpose(0, 1).split_with_sizes(counts)
        B_p, C_p = (_time_major(x, rows)[..., None].split_with_sizes(counts) for x in (B, C))
        At_p = At[:, channels].contiguous()
        row_count = rows.stop - rows.start
        buffers = [_Scratch.of(name, size, row_count, At_p) for name in ("decay", "states")]
        carry_buffer = torch.empty_like(buffers[0].each[0])
        carry: Tensor | None = None
        for index, count in enumerate(counts):
            decay, states = (s.first(count) for s in buffers)
            _states(decay, states, delta_p[index], du_p[index], At_p, B_p[index], carry)
            carry = carry_buffer.copy_(states.each[-1])
            # Torch's product of matrices would take threads of its own.
            torch.sum(states.values.mul_(C_p[index]), 2, out=y_p[index])
            if checkpoints is not None and index in ends:
                checkpoints[ends[index], rows, :, channels] = carry_buffer
        around.finish(y_part, u_part, rows, channels)

    parts = _parts(blocks, A.shape[1], A.shape[0], u.device)
    tasks.run([partial(scan_part, part) for part in parts])
    return y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        count = len(_Blocks(u, A.shape[1]).step_blocks())
        checkpoints = u.new_empty(count, u.shape[0], A.shape[1], u.shape[2])
        y = _forward(u, delta, A, B, C, checkpoints)
        ctx.save_for_backward(u, delta, A, B, C, checkpoints)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, delta, A, B, C, checkpoints = ctx.saved_tensors
        blocks = _Blocks(u, A.shape[1])
        At = A.t().contiguous()
        At_of_2 = At * LOG2_E
        grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
        grad_B, grad_C = u.new_empty(B.shape), u.new_empty(C.shape)
        grad_At = torch.zeros_like(At)
        for rows in blocks.row_blocks():
            u_r, delta_r, B_r, C_r, gy_r = (
                _time_major(tensor, rows) for tensor in (u, delta, B, C, grad_y)
            )
            du = delta_r * u_r
            names = ("decay", "states", "grads")
            buffers = [_Scratch.of(name, blocks.steps, u_r.shape[1], At) for name in names]
            from_later: Tensor | None = None
            for index, steps in reversed(list(enumerate(blocks.step_blocks()))):
                decay, states, grads = (s.first(steps.stop - steps.start) for s in buffers)
                carry = checkpoints[index - 1, rows] if index else None
                _states(
                    decay, states, delta_r[steps].unsqueeze(2), du[steps].unsqueeze(2), At_of_2,
                    B_r[steps].unsqueeze(3), carry,
                )  # fmt: skip
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
    backwards = grads.each[::-1]
    _accumulate(backwards[1:], decay.each[:0:-1], backwards[:-1])
    return decay.each[0] * grads.each[0]
