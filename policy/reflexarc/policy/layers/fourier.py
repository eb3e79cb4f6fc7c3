"""Coordinates as waves, for networks that must tell millimetres apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FourierFeatures(nn.Module):
    """``x (..., S)`` beside its sines and cosines at doubling frequencies.

    A network of plain coordinates learns what is smooth in them first, and a hand has to decide
    within millimetres (Tancik et al., arXiv 2006.10739). The longest wave spans four standard
    deviations of the normalised state, the shortest of six octaves an eighth of one.
    """

    def __init__(self, octaves: int):
        super().__init__()
        self.octaves = octaves

    def forward(self, x: Tensor) -> Tensor:
        angles = [x * (math.pi / 2 * 2**octave) for octave in range(self.octaves)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        return torch.cat([x, *waves], dim=-1)
