"""Decisions at few shapes, each prepared once: what a CUDA graph needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from reflexarc.policy.decisions import EagerDecisions
from reflexarc.policy.interface import Policy, Tensors

logger = logging.getLogger(__name__)
Function: TypeAlias = Callable[[Tensors], Tensors]
Capture: TypeAlias = Callable[[Function, Tensors], Function]
"""Prepares a function for inputs of the shapes of those given."""

# Shapes come from batch sizes and from what clients ask for: beyond this many, memory is worth
# more than the time that one more would save.
_MOST_CAPTURED = 48
# A graph runs the same kernels; only where they add atomically may the last bits differ.
_TOLERANCE = 1e-3


class FixedShapes:
    """Calls functions of named rows ``(B, ...)`` at batch sizes that are powers of two.

    A batch is filled up with copies of its last row, so that all sizes up to 64 need 7 captures.
    What cannot be captured is called as it is from then on, and the log says so once.
    """

    def __init__(self, capture: Capture):
        self._capture: Capture | None = capture
        self._captured: dict[object, Function] = {}

    def __call__(self, key: object, function: Function, inputs: Tensors) -> Tensors:
        """``function(inputs)``; ``key`` tells functions apart, two of one key must be equal."""
        rows = len(next(iter(inputs.values())))
        filled = {name: _fill(tensor, rows) for name, tensor in inputs.items()}
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in filled.items())
        captured = self._captured.get((key, shapes))
        if captured is None:
            captured = self._prepare(function, filled)
            if captured is None:
                return function(inputs)
            self._captured[key, shapes] = captured
        return {name: tensor[:rows] for name, tensor in captured(filled).items()}

    def _prepare(self, function: Function, inputs: Tensors) -> Function | None:
        if self._capture is None or len(self._captured) >= _MOST_CAPTURED:
            return None
        try:
            captured = self._capture(function, inputs)
            difference = _largest_difference(captured(inputs), function(inputs))
        except Exception as error:  # whatever the policy's own code and the driver raise
            self._give_up(f"{type(error).__name__}: {str(error)[:200]}")
            return None
        if not difference <= _TOLERANCE:
            self._give_up(f"its results differ by {difference:.2g} of their largest value")
            return None
        return captured

    def _give_up(self, reason: str) -> None:
        logger.warning("inference is not captured as graphs, it runs eagerly: %s", reason)
        self._capture = None


class FixedShapeDecisions:
    """:class:`~reflexarc.policy.decisions.Decisions` by :class:`FixedShapes`.

    A guide needs gradients through the velocity and is computed eagerly.
    """

    def __init__(self, policy: Policy, capture: Capture):
        self._eager = EagerDecisions(policy)
        self._calls = FixedShapes(capture)

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        def embed(inputs: Tensors) -> Tensors:
            return self._eager.embed_frames(_part(inputs, "frames"), _part(inputs, "task"))

        return self._calls("embed_frames", embed, _named(frames=frames, task=task))

    def sample(
        self, task: Tensors, window: Tensors, valid: Tensor, steps: int, given: Tensors
    ) -> Tensor:
        if "guide" in given:
            return self._eager.sample(task, window, valid, steps, given)

        def sample(inputs: Tensors) -> Tensors:
            parts = [_part(inputs, name) for name in ("task", "window", "given")]
            actions = self._eager.sample(parts[0], parts[1], inputs["valid/"], steps, parts[2])
            return {"actions": actions}

        inputs = _named(task=task, window=window, valid={"": valid}, given=given)
        return self._calls(("sample", steps), sample, inputs)["actions"]


def _named(**groups: Tensors) -> Tensors:
    return {f"{group}/{name}": t for group, rows in groups.items() for name, t in rows.items()}


def _part(inputs: Tensors, group: str) -> Tensors:
    start = f"{group}/"
    return {n.removeprefix(start): t for n, t in inputs.items() if n.startswith(start)}


def _fill(tensor: Tensor, rows: int) -> Tensor:
    missing = (1 << (rows - 1).bit_length()) - rows
    if not missing:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def _largest_difference(captured: Tensors, expected: Tensors) -> float:
    """Of all values, in units of the largest one of their tensor; infinite where one is NaN."""
    largest = 0.0
    for name, tensor in expected.items():
        found, wanted = captured[name].float(), tensor.float()
        difference = float((found - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
        largest = max(largest, difference if difference == difference else float("inf"))
    return largest
