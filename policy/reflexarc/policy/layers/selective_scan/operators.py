"""Scan and convolution as one operator each, which is what a compiler sees of them.

It can follow neither the kernels nor, in reasonable time, a loop over steps; and it does not see
that a step is written where the next one reads. They have no gradient: training is not compiled.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from reflexarc.policy.layers.selective_scan.errors import ScanUnavailableError


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise ScanUnavailableError(
        "a compiled scan has no gradient; train without torch.compile, or leave the Mamba layers "
        "out of it with torch.compiler.disable"
    )


@torch.library.custom_op(
    "reflexarc::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
    "bool softplus) -> Tensor",
)
def scan(*inputs: Any) -> Tensor:
    """As ``selective_scan``, with ``softplus`` last."""
    from reflexarc.policy.layers.selective_scan import selective_scan

    return selective_scan(*inputs[:-1], softplus=inputs[-1])


@scan.register_fake
def _(u: Tensor, *_: object) -> Tensor:
    return u.new_empty(u.shape)


scan.register_autograd(_refuse)


@torch.library.custom_op(
    "reflexarc::causal_convolution",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def convolution(*inputs: Any) -> Tensor:
    """As ``causal_convolution``."""
    from reflexarc.policy.layers.selective_scan import causal_convolution

    return causal_convolution(*inputs)


@convolution.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


convolution.register_autograd(_refuse)
