"""Sequences of visible tokens: packed to the front, latent tokens after them, padding last.

Rows of a batch hide different numbers of tokens. What stands behind a row's latent tokens reaches
none of them in a causal encoder; one that reads in both directions is told the rows' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0.0
"""What padding tokens hold. No output may depend on it; tests put NaN here."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a sequence of M inputs and K latent tokens go.

    Attributes:
        order: ``int64 (B, M + K)``, places in the sequence: each row's visible inputs in their
            order, the latent tokens, then its hidden inputs in their order.
        lengths: ``int64 (B,)``, visible and latent tokens of a row: what the context holds.
    """

    order: Tensor
    lengths: Tensor

    def visible(self, tokens: Tensor) -> Tensor:
        """``(B, M + K, d)`` to the context's sequence ``(B, longest, d)``, padding included."""
        longest = int(self.lengths.max())
        packed = _gathered(tokens, self.order[:, :longest])
        return packed.masked_fill(~self.is_context(longest)[..., None], PADDING)

    def is_context(self, length: int) -> Tensor:
        """``bool (B, length)``: visible and latent tokens; the others are hidden or padding."""
        places = torch.arange(length, device=self.lengths.device)
        return places < self.lengths[:, None]

    def ordered(self, tokens: Tensor) -> Tensor:
        """``(B, M + K, d)`` in this order."""
        return _gathered(tokens, self.order)


def pack(hidden: Tensor, latent_tokens: int) -> Packing:
    """Of ``bool (B, M)``, True where a token is hidden."""
    latents = hidden.new_zeros(len(hidden), latent_tokens, dtype=torch.int8)
    # 0 visible, 1 latent, 2 hidden; sorting keeps the order within each.
    rank = torch.cat([2 * hidden.to(torch.int8), latents + 1], dim=1)
    order = rank.argsort(dim=1, stable=True)
    return Packing(order, (~hidden).sum(1) + latent_tokens)


def _gathered(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
