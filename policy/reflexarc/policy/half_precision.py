"""Serving in bfloat16: half the memory, and on a GPU a good part of the time."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.decisions import Decisions
from reflexarc.policy.interface import Policy, Tensors

Precision = Literal["fp32", "bf16"]
_HALVED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def check_precision(precision: str, family: type[Policy] | None = None) -> Precision:
    """The precision, if it is one and the family computes in it. Raises ConfigError."""
    for known in get_args(Precision):
        if precision == known:
            if known == "bf16" and family is not None and not family.bf16_safe:
                raise ConfigError(
                    f"--precision bf16: the family {family.family} computes in fp32 alone; leave "
                    "it out",
                    field="precision",
                )
            checked: Precision = known
            return checked
    raise ConfigError(
        f"--precision must be one of {', '.join(get_args(Precision))}, got {precision!r}",
        field="precision",
    )


def serve_in_bf16(policy: Policy) -> None:
    """Round the weights of layers that multiply, and let decisions compute in autocast.

    Norms, and what is added in the residual stream, stay fp32. Raises ConfigError for a family
    that cannot.
    """
    check_precision("bf16", type(policy))
    for module in policy.modules():
        if isinstance(module, _HALVED):
            module.to(torch.bfloat16)
    policy.serving_dtype = torch.bfloat16


class AutocastDecisions:
    """Decisions in autocast; what leaves them is float32."""

    def __init__(self, decisions: Decisions, policy: Policy, dtype: torch.dtype) -> None:
        self._decisions, self._dtype = decisions, dtype
        self._device = policy.device.type

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        with torch.autocast(self._device, dtype=self._dtype):
            rows = self._decisions.embed_frames(frames, task)
        return {n: t.float() if t.dtype == self._dtype else t for n, t in rows.items()}

    def sample(
        self, task: Tensors, window: Tensors, valid: Tensor, steps: int, given: Tensors
    ) -> Tensor:
        with torch.autocast(self._device, dtype=self._dtype):
            return self._decisions.sample(task, window, valid, steps, given).float()
