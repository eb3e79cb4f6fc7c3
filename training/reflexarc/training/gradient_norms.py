"""The norm of the gradient, of all weights and by group of modules, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


def group_of(name: str) -> str:
    """The group of a parameter: the policy's child it is in, or ``objective`` and its child.

    ``policy.flow.stack…`` is of ``flow``, ``objective.predictor…`` of ``objective.predictor``.
    """
    parts = name.split(".")
    return parts[1] if parts[0] == "policy" and len(parts) > 1 else ".".join(parts[:2])


class GradientNorms:
    """Measures and clips the gradients of ``parameters``, named as in the trained module.

    ``whole`` turns a tensor that is spread over processes into all of it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], whole: Callable[[Tensor], Tensor]
    ) -> None:
        self._parameters = [(group_of(name), p) for name, p in parameters.items()]
        self._whole = whole

    def clip(self, limit: float | None) -> dict[str, Tensor]:
        """Scale all gradients so that their norm is ``limit`` at most; None only measures.

        Returns ``gradient_norm`` and ``gradient_norm/<group>``, from before clipping.
        """
        held = [(group, p) for group, p in self._parameters if p.grad is not None]
        norms = torch._foreach_norm([p.grad for _, p in held if p.grad is not None])
        each = self._whole(torch.stack(norms))
        total = torch.linalg.vector_norm(each)
        nn.utils.clip_grads_with_norm_([p for _, p in held], limit or math.inf, total)
        return norms_of_groups([group for group, _ in held], each)


def norms_of_groups(groups: Sequence[str], each: Tensor) -> dict[str, Tensor]:
    """``gradient_norm`` and ``gradient_norm/<group>`` of parameters ``(P,)`` in ``groups``."""
    found = {"gradient_norm": torch.linalg.vector_norm(each)}
    start = 0
    for group, members in groupby(groups):
        stop = start + len(list(members))
        found[f"gradient_norm/{group}"] = torch.linalg.vector_norm(each[start:stop])
        start = stop
    return found
