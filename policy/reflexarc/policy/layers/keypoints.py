"""Learned keypoints: a few tokens that say where something is, in the place of a token a patch."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from reflexarc.policy.interface import PolicyConfig

_EMBEDDING_STD = 0.02


class KeypointsConfig(PolicyConfig):
    """Learned keypoints in the place of patch tokens; see ``KeypointTokens``.

    Attributes:
        number: keypoints of a camera.
        hidden: channels that they look at.
        tokens: of a camera, among which its keypoints are dealt out.
    """

    number: int = Field(default=32, ge=1)
    hidden: int = Field(default=64, ge=1)
    tokens: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _keypoints_are_dealt_out_evenly(self) -> KeypointsConfig:
        if self.number % self.tokens:
            raise ValueError(
                f"keypoints.number {self.number} is no multiple of keypoints.tokens {self.tokens}"
            )
        return self


class KeypointTokens(nn.Module):
    """Where learned features are in the image, instead of what is at every place.

    Each of M keypoints is a softmax over the patches: its mean position is the keypoint's place
    (spatial softmax: Levine et al., arXiv 1504.00702), its mean feature says what is there. A
    condition (the instruction, a goal) scales the channels that the softmax looks at (FiLM: Perez
    et al., arXiv 1709.07871), so that it decides what is looked for. The M keypoints of a camera
    are dealt out to a few tokens, which makes the sequence, and with it training, an order shorter
    than patches.

    Args:
        grid: rows and columns of the patches.
        keypoints: M, a camera; a multiple of ``tokens``.
        hidden: channels of the features that keypoints look at.
        tokens: of a camera.
        conditioned: whether there is ever a condition.
        affine: whether the norm of the features has weights. They add nothing that the projections
            behind it could not do, and without them frozen features need no gradient, a third of
            the work.
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
        conditioned: bool = True,
        affine: bool = True,
    ):
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)
        # Each camera has weights of its own: they see the scene from different places.
        self.features = nn.Parameter(torch.randn(cameras, channels, hidden) * channels**-0.5)
        self.position = nn.Parameter(
            torch.randn(cameras, grid[0] * grid[1], hidden) * _EMBEDDING_STD
        )
        self.film = nn.Linear(d_model, cameras * 2 * hidden) if conditioned else None
        if self.film is not None:
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

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """``(B, V, P, C)`` and ``(B, d_model)`` to tokens ``(B, V, tokens, d_model)``.

        Without a condition the tokens are those of the images alone.
        """
        batch, cameras = features.shape[:2]
        normed = self.norm(features)
        looked_at = torch.nn.functional.silu(normed @ self.features + self.position)
        if condition is not None and self.film is not None:
            scale, shift = self.film(condition).view(batch, cameras, 1, 2, -1).unbind(3)
            # The shift is the same for all patches, so the softmax cancels it: this half of
            # ``film`` learns nothing. It stays, because checkpoints hold its weights.
            looked_at = looked_at * (1 + scale) + shift
        attention = (looked_at @ self.scores).softmax(dim=2).transpose(2, 3)  # (B, V, M, P)
        # Places and features have different sizes: both near one, so that neither is drowned.
        keypoints = torch.cat([attention @ self.places, (attention @ normed) @ self.values], dim=-1)
        dealt = keypoints.reshape(batch, cameras, self.tokens, -1)
        tokens: Tensor = torch.einsum("bvtk,vtkd->bvtd", dealt, self.projection) + self.bias
        return tokens
