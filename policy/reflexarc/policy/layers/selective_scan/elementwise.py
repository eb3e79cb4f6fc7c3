"""softplus and SiLU whose bits depend neither on threads nor on how a tensor is cut.

Torch takes vectors four at a time and what remains at a piece's end by another function, whose last
bit differs; where pieces end depends on its threads. Here every piece fills whole loops, or, where
the channels do not, is one row of the batch on one thread: so that what is served equals what was
trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflexarc.policy.layers.selective_scan import tasks

# Four vectors of the longest kind: what an operation of torch does at a time.
VALUES_IN_A_LOOP = 64
# Fewer are not worth a thread.
_TASK_VALUES = 1 << 16

_OfTwo = Callable[[Tensor, Tensor], Tensor]


def softplus_into(out: Tensor, x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` as torch computes it, in ``out``."""
    torch.ops.aten.softplus.out(x, out=out)
    return out


def silu_into(out: Tensor, x: Tensor) -> Tensor:
    """``x · sigmoid(x)`` as torch computes it, in ``out``."""
    torch.ops.aten.silu.out(x, out=out)
    return out


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` of ``x (batch, length, channels)``, with a gradient."""
    y: Tensor = _InPieces.apply(x, softplus_into, _softplus_backward)  # type: ignore[no-untyped-call]
    return y


def silu(x: Tensor) -> Tensor:
    """``x · sigmoid(x)`` of ``x (batch, length, channels)``, with a gradient."""
    y: Tensor = _InPieces.apply(x, silu_into, _silu_backward)  # type: ignore[no-untyped-call]
    return y


def _in_pieces(into: _OfTwo, x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.device.type != "cpu":
        return into(out, x)
    batch, length, channels = x.shape
    if channels % VALUES_IN_A_LOOP:
        x = x.contiguous()
        pieces = [partial(into, out[row], x[row]) for row in range(batch)]
        tasks.run([lambda: [piece() for piece in pieces]])
        return out
    wanted = min(torch.get_num_threads(), x.numel() // _TASK_VALUES)
    rows = -(-batch // max(1, wanted))
    steps = -(-length * batch // max(1, wanted)) if batch < wanted else length
    tasks.run(
        [
            partial(into, out[r : r + rows, t : t + steps], x[r : r + rows, t : t + steps])
            for r in range(0, batch, rows)
            for t in range(0, length, steps)
        ]
    )
    return out


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, into: _OfTwo, differentiate: _OfTwo) -> Tensor:
        ctx.save_for_backward(x)
        ctx.differentiate = differentiate
        return _in_pieces(into, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.differentiate(grad, *ctx.saved_tensors), None, None


def _softplus_backward(grad: Tensor, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.softplus_backward(grad, x, 1, 20)
    return found


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.silu_backward(grad, x)
    return found
