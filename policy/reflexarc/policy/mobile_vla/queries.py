"""Where in an image is what the instruction speaks of: queries made of the instruction alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reflexarc.policy.mobile_vla.config import QueriesConfig

_EMBEDDING_STD = 0.02
_SHARPNESS = 2.0  # of the attention at first: queries that look everywhere learn slowly


class InstructionQueries(nn.Module):
    """Cross-attention from an instruction to patches.

    Each of M queries is a linear map of the instruction's embedding. Its attention over the patches
    gives a place, the mean of theirs (spatial softmax: Levine et al., arXiv 1504.00702), and a
    value. A query depends on the instruction from the first step on; one that it merely scales
    (FiLM) took thousands of steps to tell the targets apart.

    Args:
        language: width of the embedding.
        channels: of a patch.
        grid: rows and columns of the patches.

    Attributes:
        width: of what comes out.
    """

    def __init__(
        self, config: QueriesConfig, *, language: int, channels: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.number, self.key_width = config.number, config.key_width
        self.norm = nn.LayerNorm(channels)
        self.keys = nn.Sequential(
            nn.Linear(channels, config.hidden), nn.SiLU(), nn.Linear(config.hidden, self.key_width)
        )
        self.position = nn.Parameter(
            torch.randn(grid[0] * grid[1], self.key_width) * _EMBEDDING_STD
        )
        self.queries = nn.Linear(language, self.number * self.key_width)
        self.values = nn.Linear(channels, config.values)
        self.width = self.number * (2 + config.values)
        rows, columns = (torch.linspace(-1, 1, size) for size in grid)
        self.register_buffer("places", torch.cartesian_prod(rows, columns), persistent=False)
        self.places: Tensor

    def forward(self, patches: Tensor, language: Tensor) -> Tensor:
        """``(N, P, C)`` and ``(N, E)`` to ``(N, width)``."""
        normed = self.norm(patches)
        keys = self.keys(normed) + self.position
        queries = self.queries(language).view(-1, self.number, self.key_width)
        scores = queries @ keys.transpose(1, 2) * (_SHARPNESS / self.key_width**0.5)
        attention = scores.softmax(-1)
        found = torch.cat([attention @ self.places, attention @ self.values(normed)], dim=-1)
        return found.flatten(1)
