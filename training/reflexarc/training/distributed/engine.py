"""What the trainer asks of the processes it runs on; the answers of one process alone.

The trainer is written once, for a batch of the recipe's size. An engine says which process this
is, wraps what is trained so that gradients are those of the whole batch, and brings together
what is spread: weights for a checkpoint, results of validation, the wish to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Policy
from reflexarc.training.config import Recipe
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.optimization import AveragedWeights, trained_parameters
from reflexarc.training.precision import Precision
from reflexarc.training.weight_update import WeightUpdate

T = TypeVar("T")


class TrainedModules(nn.Module):
    """Policy and objective as one module whose forward is the objective's.

    Everything that is differentiated passes through this one forward, which engines wrap.
    """

    def __init__(self, policy: Policy, objective: Objective) -> None:
        super().__init__()
        self.policy, self.objective = policy, objective

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        losses: Losses = self.objective(self.policy, batch, draws)
        return losses

    def is_trained(self, name: str) -> bool:
        """``Policy.is_trained`` for a name of this module; all of the objective's are."""
        own = name.removeprefix("policy.")
        return own == name or self.policy.is_trained(own)


class Engine:
    """One process; engines of several overrule what is different there.

    Attributes:
        device: of this process.
        rank, world: which process this is, from 0, and of how many.
        name: what a person calls it.
    """

    name = "single"
    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError when this engine cannot train by ``recipe``."""

    def wrap(self, modules: TrainedModules, blocks: Sequence[nn.Module]) -> nn.Module:
        """What a step calls in the place of ``modules``; before an optimiser is made.

        ``blocks`` are modules inside it by which its weights may be divided.
        """
        return modules

    def weight_update(
        self,
        modules: TrainedModules,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float | None,
    ) -> WeightUpdate:
        """How a step changes the weights; ``forward`` is what :meth:`wrap` returned."""
        parameters = trained_parameters(modules)
        return WeightUpdate(forward, parameters, optimizer, precision, clip, self.whole)

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one pass of a step; only the ``last`` one needs to exchange gradients."""
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be spread over processes."""
        return tensor

    def put(self, target: Tensor, value: Tensor) -> None:
        """Copy ``value``, whole, into ``target``, which may be spread over processes."""
        target.copy_(value)

    def moments(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The optimiser's state as ``<moment>/<parameter>``; all processes call this."""
        return {
            f"{moment}/{name}": value
            for name, parameter in parameters.items()
            for moment, value in optimizer.state.get(parameter, {}).items()
        }

    def put_moments(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        values: Mapping[str, Tensor],
    ) -> None:
        """Bring into place what :meth:`put` could not, after it has put all weights.

        ``values`` are named as in :meth:`moments`, among others.
        """

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of all tensors, whole, on the CPU of the first process; others get nothing."""
        if not self.is_first:
            return {}
        return {name: _on_cpu(tensor) for name, tensor in tensors.items()}

    @contextmanager
    def served(
        self, modules: TrainedModules, averaged: AveragedWeights | None
    ) -> Iterator[TrainedModules]:
        """Within the block: policy and objective, whole, with the weights that are served."""
        with nullcontext() if averaged is None else averaged.applied():
            yield modules

    def collected(self, item: T) -> list[T]:
        """What every process gave, in the order of their ranks, on every process."""
        return [item]

    def highest(self, number: int) -> int:
        """The highest number that any process gave."""
        return number

    def wait(self) -> None:
        """Until every process has come here."""

    def close(self) -> None:
        """Leave the other processes."""


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
