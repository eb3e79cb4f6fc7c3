"""Sums and masked means over the rows of all ranks, so that losses do not depend on their number.

Everything here returns the same value on every rank. With one process nothing is exchanged, and
without gradients (validation) neither, so that ranks may validate unequal numbers of batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks, of its shape, differentiable.

    What is computed from it must be the same on every rank, as a loss made of such sums alone is:
    the gradient is then known without another exchange. It is that of the sum of all ranks'
    losses, of which DistributedDataParallel takes the mean: exactly the gradient of one process
    that sees all rows.
    """
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return value
    if dist.get_world_size() == 1:
        return value
    total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
    return total


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is not 0, over the elements of all ranks.

    Both have one shape; the mean over nothing is 0. Ranks with more real elements weigh more, as
    they would in one process.
    """
    mask = mask.to(values.dtype)
    sums = sum_over_ranks(torch.stack([(values * mask).sum(), mask.sum()]))
    return sums[0] / sums[1].detach().clamp(min=1.0)


class _SumOverRanks(torch.autograd.Function):
    """The backward pass of an all-reduce whose gradient is equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()
