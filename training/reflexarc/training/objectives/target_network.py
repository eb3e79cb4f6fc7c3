"""Target networks: slow averages of a representation, which predictions are compared with."""

from __future__ import annotations

import copy
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy


class Momentum(Protocol):
    """The settings of :func:`ema_momentum`."""

    @property
    def ema_start(self) -> float: ...

    @property
    def ema_end(self) -> float: ...


def copied_representation(policy: Policy, objective: str) -> nn.Module:
    """A copy of all that makes z, without gradients, in evaluation mode.

    Raises ConfigError, naming the ``objective``, for a policy that has no representation.
    """
    representation = getattr(policy, "representation", None)
    if not isinstance(representation, nn.Module):
        raise ConfigError(
            f"{objective} trains a policy's module `representation`, which "
            f"{type(policy).__name__} has not; use another objective",
            field="objective.name",
        )
    return copy.deepcopy(representation).requires_grad_(False).eval()


@torch.no_grad()
def move_target(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move the target's weights towards the source's by ``1 - momentum``."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1.0 - momentum)
    for slow, fast in zip(target.buffers(), source.buffers(), strict=True):
        slow.copy_(fast)  # running statistics are averages already


def ema_momentum(config: Momentum, step: int, total_steps: int) -> float:
    """Momentum of the target after optimiser step ``step`` (from 0) of ``total_steps``.

    A cosine from ``ema_start`` at the first step to ``ema_end`` at the last.
    """
    progress = min(1.0, step / max(1, total_steps - 1))
    span = config.ema_end - config.ema_start
    return config.ema_end - span * 0.5 * (1 + math.cos(math.pi * progress))


def normed(tokens: Tensor) -> Tensor:
    """``(..., d)`` with each token brought to mean 0 and variance 1, in fp32.

    Both branches end in this norm. It has no weights: with the representation's own, the
    prediction would be scaled by weights that are trained, the target by their slow average, and
    applying them to z a second time would keep "no change" from being predicted as z itself.
    Without it, the error could be lowered by shrinking z.
    """
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
