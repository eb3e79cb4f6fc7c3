"""Predicts the target network's outputs at hidden places from those at visible ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.policy.layers.mamba import MambaStack
from reflexarc.policy.statevla.token_layout import TokenLayout
from reflexarc.training.objectives.packing import Packing

_EMBEDDING_STD = 0.02


class MaskedPredictor(nn.Module):
    """A narrow Mamba over the context, then a mask token for every hidden place.

    The context stands first, so that every hidden place sees all of it. A mask token knows where
    it is: fixed sines and cosines of its place in the image, and a learned embedding of its
    modality. 1,610,368 parameters for tokens of 256, two cameras, 6 layers of 192.

    Args:
        layout: of the tokens.
        width: of the predictor, a multiple of 4.
        layers: Mamba blocks.
        d_state: of the Mamba blocks.
    """

    def __init__(
        self, layout: TokenLayout, *, width: int = 192, layers: int = 6, d_state: int = 16
    ):
        super().__init__()
        d_model = layout.d_model
        self.token_in = nn.Linear(d_model, width)
        self.mask_token = nn.Parameter(torch.randn(width) * _EMBEDDING_STD)
        modalities = len(layout.modalities) + 1  # latent tokens are one too
        self.modality = nn.Parameter(torch.randn(modalities, width) * _EMBEDDING_STD)
        self.stack = MambaStack(width, layers, d_state=d_state)
        self.token_out = nn.Linear(width, d_model)
        sizes = torch.tensor([*layout.sizes, layout.latent_tokens])
        self.register_buffer(
            "modality_of", torch.arange(modalities).repeat_interleave(sizes), persistent=False
        )
        self.register_buffer("positions", _positions(layout, width), persistent=False)
        self.modality_of: Tensor
        self.positions: Tensor

    def forward(self, context: Tensor, packing: Packing) -> Tensor:
        """``(B, longest, d_model)``, outputs of a packed context, to ``(B, M + K, d_model)``.

        In the order of ``packing``; what stands at visible and latent tokens means nothing.
        """
        length = packing.order.shape[1]
        inside = packing.is_context(length)[..., None]
        known = F.pad(self.token_in(context), (0, 0, 0, length - context.shape[1]))
        tokens = torch.where(inside, known, self.mask_token.to(known.dtype))
        places = self.positions + self.modality[self.modality_of]
        predicted: Tensor = self.token_out(self.stack(tokens + places[packing.order]))
        return predicted


def _positions(layout: TokenLayout, width: int) -> Tensor:
    """``float32 (M + K, width)``: places in the grid, else in the modality's own row of tokens."""
    rows, columns = layout.grid or (1, layout.camera_tokens)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    of_camera = torch.cat([_waves(axis, width // 2) for axis in grid.unbind(1)], dim=1)
    of_latents = torch.zeros(layout.latent_tokens, 2)
    of_latents[:, 1] = torch.arange(layout.latent_tokens)
    latents = torch.cat([_waves(axis, width // 2) for axis in of_latents.unbind(1)], dim=1)
    single = torch.cat([_waves(torch.zeros(1), width // 2)] * 2, dim=1)
    return torch.cat([single, single, *([of_camera] * len(layout.cameras)), latents])


def _waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines ``(N, width)`` of places ``(N,)``, periods from 2π to 2π·10,000."""
    frequencies = 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = places[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
