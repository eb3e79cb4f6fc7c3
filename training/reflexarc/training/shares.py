"""Which rows of an optimiser step's batch one process computes, and in how many passes.

The batch is that of the recipe, whatever the number of processes and passes: what is drawn is
drawn for all of its rows, and each pass takes its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reflexarc.policy.interface import Tensors
from reflexarc.training.objective import Batch, Draws


@dataclass(frozen=True)
class Share:
    """One pass of one process.

    Attributes:
        rows: ``int64 (B,)``, places in the batch of the step, at least one.
        stands_in: there were not enough rows for every process: this one is another's, computed
            so that all processes exchange the same tensors, and carries no loss.
    """

    rows: Tensor
    stands_in: bool = False


def shares_of(size: int, *, passes: int = 1, rank: int = 0, world: int = 1) -> list[Share]:
    """What process ``rank`` of ``world`` computes of a batch of ``size`` rows, pass by pass.

    Each pass is a run of rows, and within it each process takes a run, equal but for one row. All
    processes have the same number of passes; a pass without any row is left out.
    """
    shares = []
    for rows in torch.arange(size).tensor_split(passes):
        if len(rows) == 0:
            continue
        mine = rows.tensor_split(world)[rank]
        shares.append(Share(mine) if len(mine) else Share(rows[:1], stands_in=True))
    return shares


def without_loss(batch: Batch) -> Batch:
    """The same batch, all of it masked."""

    def nothing(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else torch.zeros_like(mask)

    return replace(
        batch,
        action_mask=torch.zeros_like(batch.action_mask),
        future_mask=nothing(batch.future_mask),
        window_mask=nothing(batch.window_mask),
    )


def in_size_of(batch: Batch, size: int) -> Batch:
    """A batch of ``size`` rows in the shapes and types of ``batch``, for drawing: one row repeated.

    It takes no memory, and an objective draws by shapes alone.
    """

    def rows(values: Tensor) -> Tensor:
        return values[:1].expand(size, *values.shape[1:])

    def named(values: Tensors | None) -> Tensors | None:
        return None if values is None else {name: rows(tensor) for name, tensor in values.items()}

    def optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else rows(values)

    return Batch(
        window=named(batch.window) or {},
        task=named(batch.task) or {},
        valid=rows(batch.valid),
        actions=rows(batch.actions),
        action_mask=rows(batch.action_mask),
        future=named(batch.future),
        future_valid=optional(batch.future_valid),
        future_mask=optional(batch.future_mask),
        future_actions=optional(batch.future_actions),
        window_actions=optional(batch.window_actions),
        window_mask=optional(batch.window_mask),
    )


def drawn_rows(draws: Draws, share: Share) -> Draws:
    """The rows of ``draws`` that belong to ``share``."""
    return {name: values[share.rows] for name, values in draws.items()}
