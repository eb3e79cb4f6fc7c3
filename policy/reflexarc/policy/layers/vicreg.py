"""VICReg's variance and covariance terms, which keep a representation from collapsing.

Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization", 2022. The
statistics are those of the real rows of all ranks: means and products are summed over ranks
instead of gathering rows, which is exact, costs ``D * D`` numbers whatever the batch, and lets
ranks hold unequal numbers of real rows. The mean carries no gradient, because a covariance does
not change to first order with the mean that is subtracted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reflexarc.policy.layers.reductions import sum_over_ranks

EPSILON = 1e-4
"""Added to the variance under the square root, as in the paper.

Where rows are equal the root's slope stays finite: it is 1/(2·sqrt(1e-4)) = 50, not infinite.
The deviation of a dimension without any variance reads 0.01.
"""


def vicreg_terms(
    rows: Tensor, mask: Tensor | None = None, *, target_std: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The variance hinge and the covariance penalty of ``rows (N, D)``, each a scalar.

    The hinge is ``mean(relu(target_std - std))`` over dimensions, the penalty the sum of the
    squared off-diagonal covariances over D. Both are unbiased estimates over N - 1, and 0 for
    less than two real rows.

    Args:
        mask: ``bool (N,)``, False where a row is padding; None takes every row.
    """
    # Products of a bfloat16 matrix product would lose what the hinge measures.
    with torch.autocast(rows.device.type, enabled=False):
        covariance, count = _covariance(rows, mask)
        variance = covariance.diagonal()
        deviation = torch.sqrt(variance + EPSILON)
        enough = (count > 1).to(covariance.dtype)
        hinge = F.relu(target_std - deviation).mean() * enough
        off_diagonal = covariance - torch.diag(variance)
        penalty = off_diagonal.square().sum() / rows.shape[1]
    return hinge, penalty


def column_deviation(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Standard deviation ``(D,)`` of each dimension of ``rows (N, D)``, without a gradient.

    It measures collapse: 0 where all rows are equal, without EPSILON.
    """
    centred, weights, count = _centred(rows.detach(), mask)
    squares = sum_over_ranks((centred.square() * weights).sum(0))
    return (squares / (count - 1).clamp(min=1.0)).sqrt()


def _covariance(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Covariance ``(D, D)`` and number of real rows, over all ranks."""
    centred, weights, count = _centred(rows, mask)
    products = sum_over_ranks((centred * weights).T @ centred)
    return products / (count - 1).clamp(min=1.0), count


def _centred(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows minus their mean, weights ``(N, 1)`` of 0 or 1, and the number of real rows."""
    # A float64 input (a gradient check) stays what it is.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weights = torch.ones_like(rows[:, :1]) if mask is None else mask[:, None].to(rows.dtype)
    sums = torch.cat([(rows.detach() * weights).sum(0), weights.sum().reshape(1)])
    sums = sum_over_ranks(sums)
    mean, count = sums[:-1] / sums[-1].clamp(min=1.0), sums[-1]
    return rows - mean, weights, count
