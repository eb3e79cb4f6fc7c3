"""From a camera's features to tokens; ``layers.keypoints`` holds the other way."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

_EMBEDDING_STD = 0.02


class VisionTokens(Protocol):
    """``features (B, V, P, C)`` and ``language (B, d)`` to tokens ``(B, V, tokens, d)``.

    Without ``language`` the tokens are those of the images alone.
    """

    tokens: int
    uses_language: bool

    def __call__(self, features: Tensor, language: Tensor | None) -> Tensor: ...


class PatchTokens(nn.Module):
    """One token a patch; language reaches them through the sequence model alone."""

    uses_language = False

    def __init__(self, d_model: int, *, cameras: int, patches: int, channels: int):
        super().__init__()
        self.tokens = patches
        self.norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, d_model)
        self.position = nn.Parameter(torch.randn(cameras, patches, d_model) * _EMBEDDING_STD)

    def forward(self, features: Tensor, language: Tensor | None) -> Tensor:
        projected: Tensor = self.projection(self.norm(features)) + self.position
        return projected
