"""Mamba's causal depthwise convolution and its SiLU, in plain torch.

On the CPU the few taps are sums of shifted tokens, which needs no transposition to torch's layout
of convolutions and a third of its time; elsewhere torch's convolution is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu(convolution)`` that sees the past only: ``(B, L, D)`` to the same, contiguous.

    Args:
        x: ``(B, L, D)``.
        weight: ``(D, K)``; the last tap meets the token itself.
        bias: ``(D,)``.
    """
    if x.device.type == "cpu":
        y: Tensor = _ShiftedTaps.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return F.silu(y, inplace=not y.requires_grad)
    taps, length = weight.shape[1], x.shape[1]
    channels_first = F.conv1d(
        x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=len(weight)
    )
    return F.silu(channels_first[..., :length]).transpose(1, 2).contiguous()


class _ShiftedTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        last, length = weight.shape[1] - 1, x.shape[1]
        y = torch.addcmul(bias, x, weight[:, last].contiguous())
        for lag in range(1, min(last, length - 1) + 1):
            y[:, lag:].addcmul_(x[:, : length - lag], weight[:, last - lag].contiguous())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        last, length = weight.shape[1] - 1, x.shape[1]
        grad_x = grad * weight[:, last]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, last] = (grad * x).sum((0, 1))
        for lag in range(1, min(last, length - 1) + 1):
            later, earlier = grad[:, lag:], x[:, : length - lag]
            grad_x[:, : length - lag].addcmul_(later, weight[:, last - lag].contiguous())
            grad_weight[:, last - lag] = (later * earlier).sum((0, 1))
        return grad_x, grad_weight, grad.sum((0, 1))
