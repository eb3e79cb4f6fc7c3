"""From a camera's features to tokens: every patch a token, or a few learned keypoints."""

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


class KeypointTokens(nn.Module):
    """Where learned features are in the image, instead of what is at every place.

    Each of M keypoints is a softmax over the patches: its mean position is the keypoint's place
    (spatial softmax: Levine et al., arXiv 1504.00702), its mean feature says what is there. The
    instruction scales the channels that the softmax looks at (FiLM: Perez et al., arXiv
    1709.07871), so that it decides what is looked for. The M keypoints of a camera are dealt out
    to a few tokens, which makes the sequence, and with it training, an order shorter than patches.

    Args:
        grid: rows and columns of the patches.
        keypoints: M, a camera; a multiple of ``tokens``.
        hidden: channels of the features that keypoints look at.
        tokens: of a camera.
    """

    uses_language = True

    def __init__(
        self,
        d_model: int,
        *,
        cameras: int,
        grid: tuple[int, int],
        channels: int,
        keypoints: int,
        hidden: int,
        tokens: int,
    ):
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(channels)
        # Each camera has weights of its own: they see the scene from different places.
        self.features = nn.Parameter(torch.randn(cameras, channels, hidden) * channels**-0.5)
        self.position = nn.Parameter(
            torch.randn(cameras, grid[0] * grid[1], hidden) * _EMBEDDING_STD
        )
        self.film = nn.Linear(d_model, cameras * 2 * hidden)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.scores = nn.Parameter(torch.randn(cameras, hidden, keypoints) * hidden**-0.5)
        self.values = nn.Parameter(torch.randn(cameras, channels, hidden) * channels**-0.5)
        per_token = keypoints // tokens * (2 + hidden)
        self.projection = nn.Parameter(torch.randn(cameras, tokens, per_token, d_model))
        with torch.no_grad():
            self.projection.mul_(per_token**-0.5)
        self.bias = nn.Parameter(torch.randn(cameras, tokens, d_model) * _EMBEDDING_STD)
        rows, columns = (torch.linspace(-1, 1, size) for size in grid)
        places = torch.cartesian_prod(rows, columns)
        self.register_buffer("places", places, persistent=False)
        self.places: Tensor

    def forward(self, features: Tensor, language: Tensor | None) -> Tensor:
        batch, cameras = features.shape[:2]
        normed = self.norm(features)
        looked_at = torch.nn.functional.silu(normed @ self.features + self.position)
        if language is not None:
            scale, shift = self.film(language).view(batch, cameras, 1, 2, -1).unbind(3)
            looked_at = looked_at * (1 + scale) + shift
        attention = (looked_at @ self.scores).softmax(dim=2).transpose(2, 3)  # (B, V, M, P)
        # Places and features have different sizes: both near one, so that neither is drowned.
        keypoints = torch.cat([attention @ self.places, (attention @ normed) @ self.values], dim=-1)
        dealt = keypoints.reshape(batch, cameras, self.tokens, -1)
        tokens: Tensor = torch.einsum("bvtk,vtkd->bvtd", dealt, self.projection) + self.bias
        return tokens
