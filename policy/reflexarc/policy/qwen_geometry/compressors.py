"""From an encoder's many geometry tokens to K that a head's layers attend to.

A linear layer and a mean commute: ``pool`` and ``per_layer`` project the means of cells of the
image, which gives what the mean of projected tokens would, and lets the feature store hold K
rows a frame in the place of all tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError

Form = Literal["pool", "per_layer", "qformer"]
_QUERY_STD = 0.02


def cells_of(grid: tuple[int, int], views: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of cells of one view, ``tokens`` of all views together.

    Raises ConfigError where ``tokens`` cannot be shared out, or a view has not as many tokens.
    """
    if tokens % views:
        raise ConfigError(
            f"policy.geometry_tokens is {tokens}, which {views} cameras cannot share evenly; "
            f"choose a multiple of {views}",
            field="policy.geometry_tokens",
        )
    share = tokens // views
    rows = next(r for r in range(math.isqrt(share), 0, -1) if share % r == 0)
    columns = share // rows
    if rows > grid[0] or columns > grid[1]:
        raise ConfigError(
            f"policy.geometry_tokens {tokens} asks for {rows}x{columns} cells of a view, whose "
            f"tokens are {grid[0]}x{grid[1]}; choose fewer",
            field="policy.geometry_tokens",
        )
    return rows, columns


def pool_cells(tokens: Tensor, cells: tuple[int, int]) -> Tensor:
    """``(B, V, h, w, D)`` to means over cells ``(B, V · rows · columns, D)``, view by view."""
    flat = tokens.flatten(0, 1).permute(0, 3, 1, 2)
    means = F.adaptive_avg_pool2d(flat, cells).flatten(2).transpose(1, 2)
    return means.reshape(len(tokens), -1, tokens.shape[-1])


class Pool(nn.Module):
    """Means of cells ``(B, K, D)``, projected: the same K tokens for every layer."""

    def __init__(self, channels: int, width: int, *, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.projection = nn.Linear(channels, width)

    def forward(self, cells: Tensor) -> list[Tensor]:
        return [self.projection(cells)] * self.layers


class PerLayer(nn.Module):
    """Means of cells ``(B, K, D)``, projected anew for every layer."""

    def __init__(self, channels: int, width: int, *, layers: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(channels, width) for _ in range(layers))

    def forward(self, cells: Tensor) -> list[Tensor]:
        return [projection(cells) for projection in self.projections]


class QFormer(nn.Module):
    """K learned queries attend to all tokens ``(B, G, D)``: the same K tokens for every layer."""

    def __init__(self, channels: int, width: int, *, layers: int, tokens: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"policy.qformer_heads {heads} does not divide the width {width}",
                field="policy.qformer_heads",
            )
        self.layers = layers
        self.queries = nn.Parameter(torch.randn(tokens, width) * _QUERY_STD)
        self.projection = nn.Linear(channels, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        projected = self.projection(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        attended, _ = self.attention(queries, projected, projected, need_weights=False)
        return [attended] * self.layers


class Control(nn.Module):
    """A compressor that sees the same random tokens whatever the images show.

    It has the parameters, the arithmetic and the tokens in the head of the compressor inside it,
    and none of what the encoder knows: what is gained over it is gained by geometry.
    """

    def __init__(self, compressor: nn.Module, rows: int, channels: int) -> None:
        super().__init__()
        self.compressor = compressor
        fixed = torch.randn(1, rows, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("fixed", fixed, persistent=False)
        self.fixed: Tensor

    def forward(self, tokens: Tensor) -> list[Tensor]:
        compressed: list[Tensor] = self.compressor(self.fixed.expand(len(tokens), -1, -1))
        return compressed


def build_compressor(
    form: Form, channels: int, width: int, *, layers: int, tokens: int, heads: int
) -> nn.Module:
    """Tokens of ``channels`` to ``tokens`` of ``width`` for each of ``layers``."""
    if form == "pool":
        return Pool(channels, width, layers=layers)
    if form == "per_layer":
        return PerLayer(channels, width, layers=layers)
    return QFormer(channels, width, layers=layers, tokens=tokens, heads=heads)
