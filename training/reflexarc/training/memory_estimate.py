"""The memory of a training step on one process, under each engine, from two small steps.

Activations are what a forward and a backward pass hold at once, measured on two and on four
samples in the recipe's precision, with its recomputation: every sample costs the same, so two
points are enough for any batch. The rest is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Policy
from reflexarc.training.activation_checkpointing import checkpoint_activations
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.deepspeed_config import read_deepspeed_config
from reflexarc.training.freezing import set_training_mode
from reflexarc.training.live_tensors import LiveTensors
from reflexarc.training.objective import Batch, Objective
from reflexarc.training.optimization import trained_parameters
from reflexarc.training.precision import Precision

_FEW, _MORE = 2, 4
_TIMED = 8


@dataclass(frozen=True)
class StepCost:
    """What a forward and a backward pass cost.

    Attributes:
        fixed, per_sample: bytes of activations.
        seconds: a sample; None where it was not measured.
    """

    fixed: float
    per_sample: float
    seconds: float | None = None

    def activations(self, rows: int) -> int:
        """Bytes of a pass over ``rows`` samples."""
        return round(self.fixed + self.per_sample * rows)


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on the device of one process.

    Attributes:
        process: Python, libraries and data, on a CPU only.
        weights: trained, frozen and an objective's own, with what sharding gathers of them.
        gradients: with the buckets in which they are sent.
        moments, averages: of the optimiser, and of the weights.
        activations: the most that a forward and a backward pass hold.
        features: of frames, where they are held on the device.
    """

    process: int
    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int
    features: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def measure_step(
    recipe: Recipe,
    policy: Policy,
    objective: Objective,
    batch_of: Callable[[int], Batch],
    *,
    timed: bool = False,
) -> StepCost:
    """Run small steps, which change no weights; ``batch_of`` makes a batch of so many samples."""
    set_training_mode(policy, objective, recipe.freeze)
    step = _SmallStep(recipe, policy, objective, batch_of)
    with _recomputed(policy, recipe.training.activation_checkpointing):
        few, more = step.activations(_FEW), step.activations(_MORE)
        seconds = step.seconds(min(_TIMED, recipe.training.batch_size)) if timed else None
    policy.eval()
    per_sample = max(0.0, (more - few) / (_MORE - _FEW))
    return StepCost(max(0.0, few - _FEW * per_sample), per_sample, seconds)


def rows_of_a_pass(recipe: Recipe, batch_size: int, world: int) -> int:
    """The most samples that one of ``world`` processes computes at once."""
    of_all = -(-batch_size // recipe.training.accumulate)
    return -(-of_all // world)


def divided(
    policy: Policy, objective: Objective, engine: str, world: int, *, averaged: bool
) -> dict[str, int]:
    """Bytes of weights, gradients, moments and averages on one of ``world`` processes."""
    modules = (policy, objective)
    weights = sum(_bytes(t) for m in modules for t in (*m.parameters(), *m.buffers()))
    trained = sum(_bytes(p) for m in modules for p in trained_parameters(m).values())
    averages = sum(map(_bytes, trained_parameters(policy).values())) if averaged else 0
    whole = {"weights": weights, "gradients": trained, "moments": 2 * trained, "averages": averages}
    if world == 1 or engine in ("single", "ddp"):
        return whole
    part = trained // world
    if engine == "deepspeed":
        # Weights and averages are whole; the weights that the optimiser changes are another copy.
        zero = read_deepspeed_config(None)["zero_optimization"]
        buckets = 2 * 4 * int(zero["reduce_bucket_size"])
        return {
            **whole,
            "weights": weights + part,
            "gradients": part + buckets,
            "moments": 2 * part,
        }
    blocks = [list(block.parameters()) for block in policy.blocks()]
    in_blocks = [sum(map(_bytes, block)) for block in blocks]
    trained_blocks = [sum(_bytes(p) for p in block if p.requires_grad) for block in blocks]
    # What lies in no block is gathered for the whole step; of the blocks two at once, or all.
    gathered = weights - sum(in_blocks)
    gathered += sum(in_blocks) if engine == "zero2" else sum(sorted(in_blocks)[-2:])
    sent = trained - sum(trained_blocks) + sum(sorted(trained_blocks)[-2:])
    return {
        "weights": weights // world + gathered,
        "gradients": part + sent,
        "moments": 2 * part,
        "averages": averages // world,
    }


class _SmallStep:
    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        batch_of: Callable[[int], Batch],
    ) -> None:
        self._modules = nn.ModuleList([policy, objective])
        self._policy, self._objective, self._batch_of = policy, objective, batch_of
        self._precision = Precision(recipe.training.precision, policy.device)

    def activations(self, rows: int) -> int:
        """Bytes alive at once, without the gradients that stay."""
        with LiveTensors() as live:
            self._run(rows)
        gradients = [p.grad for p in self._modules.parameters() if p.grad is not None]
        peak: int = live.peak(without=gradients)
        self._forget()
        return peak

    def seconds(self, rows: int) -> float:
        """Of one sample, in a pass over ``rows``; the second of two."""
        for _ in range(2):
            self._wait()
            began = time.perf_counter()
            self._run(rows)
            self._wait()
            elapsed = time.perf_counter() - began
            self._forget()
        return elapsed / rows

    def _run(self, rows: int) -> None:
        device = self._policy.device
        batch = self._batch_of(rows).to(device)
        draws = self._objective.draw(batch, torch.Generator().manual_seed(0))
        with self._precision.autocast():
            losses = self._objective(
                self._policy, batch, {name: t.to(device) for name, t in draws.items()}
            )
        losses["total"].backward()

    def _forget(self) -> None:
        for parameter in self._modules.parameters():
            parameter.grad = None

    def _wait(self) -> None:
        if self._policy.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def _recomputed(policy: Policy, asked: bool) -> Iterator[None]:
    """Within the block, activations are recomputed where it is ``asked`` for."""
    if not asked:
        yield
        return
    checkpoint_activations(policy)
    try:
        yield
    finally:
        for block in policy.blocks():
            del block.forward


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
