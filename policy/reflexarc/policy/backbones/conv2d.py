"""Patches from scratch: a front that keeps the pixels, and the convolution that is trained.

A convolution that is trained cannot be computed once and kept, so what sessions and the feature
store keep of a frame are its pixels, and the convolution is a part of the policy.
"""

from __future__ import annotations

import hashlib

import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.policy.backbones.vision import VisionBackbone
from reflexarc.policy.interface import FrozenBackbone

STRIDE = 16


class RawPixels(VisionBackbone):
    """Gives images back as they are, ``uint8 (N, H, W, 3)``; holds no weights.

    Args:
        channels: of the patches that :meth:`trained_patches` makes.
        pool: of the same.
    """

    stride = STRIDE
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, channels: int, pool: int):
        super().__init__(pool)
        self.channels = channels
        self.identity = FrozenBackbone("raw_pixels", hashlib.sha256(b"").hexdigest())
        self.freeze()

    def trained_patches(self) -> Conv2dPatches:
        """A new, randomly initialised convolution."""
        return Conv2dPatches(self.channels, self.pool)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells that do not fit whole are left out."""
        return height // self.stride // self.pool, width // self.stride // self.pool

    def forward(self, images: Tensor) -> Tensor:
        return images

    def features(self, pixels: Tensor) -> Tensor:
        return pixels


class Conv2dPatches(nn.Module):
    """One trained convolution of 16 x 16 pixels without overlap; 196 patches at 224 pixels."""

    def __init__(self, channels: int, pool: int = 1):
        super().__init__()
        self.pool = pool
        self.convolution = nn.Conv2d(3, channels, STRIDE, stride=STRIDE)

    def forward(self, images: Tensor) -> Tensor:
        """``uint8`` (or float, 0 to 255) ``(..., H, W, 3)`` to ``(..., patches, channels)``."""
        leading = images.shape[:-3]
        weight = self.convolution.weight
        pixels = images.flatten(0, -4).permute(0, 3, 1, 2).to(weight.dtype)
        features = self.convolution(pixels.div(127.5).sub(1.0))
        if self.pool > 1:
            features = F.avg_pool2d(features, self.pool)
        patches: Tensor = features.flatten(2).transpose(1, 2)
        return patches.reshape(*leading, *patches.shape[1:])
