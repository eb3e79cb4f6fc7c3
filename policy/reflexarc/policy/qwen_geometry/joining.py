"""What semantic and geometric tokens pass before they stand beside each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EMBEDDING_STD = 0.02


class Joining(nn.Module):
    """A norm and a type embedding for either kind, shared by all layers.

    Args:
        width: of both.
        geometry: whether there are geometric tokens at all.
    """

    def __init__(self, width: int, *, geometry: bool) -> None:
        super().__init__()
        self.semantic_norm = nn.LayerNorm(width)
        self.geometry_norm = nn.LayerNorm(width) if geometry else None
        self.type_embedding = nn.Parameter(torch.randn(1 + geometry, width) * _EMBEDDING_STD)

    def forward(
        self, states: list[Tensor], geometry: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """N tensors ``(B, L, C)`` and N of ``(B, K, C)``, or None, to the same."""
        normed = [self.semantic_norm(state) + self.type_embedding[0] for state in states]
        if geometry is None or self.geometry_norm is None:
            return normed, None
        return normed, [self.geometry_norm(t) + self.type_embedding[1] for t in geometry]
