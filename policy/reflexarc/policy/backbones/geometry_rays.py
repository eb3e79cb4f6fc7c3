"""Tokens shaped like a geometry encoder's, without one: early features and viewing rays.

No pretrained geometry encoder comes in a registry package. EfficientNet-Lite0's fifth block (edges
and textures at an eighth of the image) with the ray along which each patch is seen has the same
form, runs on a CPU, and lets the compressors be trained and compared; it knows no depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.backbones.efficientnet_lite0 import EfficientNetLite0
from reflexarc.policy.backbones.geometry_encoder import GeometryEncoder
from reflexarc.policy.interface import FrozenBackbone

_SIDE = 112
_STRIDE = 8
_BLOCKS = 5
_BLOCK_CHANNELS = 40
_OCTAVES = 4
# LIBERO's cameras; another field of view scales all rays alike.
_FIELD_OF_VIEW = math.radians(45.0)


class RayFeatures(GeometryEncoder):
    """40 channels of features and 19 of the ray, on a grid of 14x14 whatever the image's size."""

    licence = "Apache-2.0 (EfficientNet-Lite0)"
    channels = _BLOCK_CHANNELS + 3 + 4 * _OCTAVES

    def __init__(self) -> None:
        super().__init__()
        self.vision = EfficientNetLite0(pool=1)
        cells = _SIDE // _STRIDE
        self.register_buffer("rays", viewing_rays(cells, cells), persistent=False)
        self.rays: Tensor
        self.freeze()

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < _STRIDE:
            raise ConfigError(
                f"images of {height}x{width} are too small for geometry.name rays; set "
                f"contract.image_size to {_SIDE} or more",
                field="contract.image_size",
            )
        return _SIDE // _STRIDE, _SIDE // _STRIDE

    def tokens(self, images: Tensor) -> Tensor:
        pixels = F.interpolate(
            images.flatten(0, 1), (_SIDE, _SIDE), mode="bilinear", antialias=True
        )
        vision = self.vision
        x = (pixels - vision._shift) / vision._scale
        x = F.relu6(vision.stem(x.contiguous(memory_format=torch.channels_last)))
        for block in list(vision.blocks)[:_BLOCKS]:
            x = block(x)
        features = x.permute(0, 2, 3, 1)
        rays = self.rays.to(features).expand(len(features), -1, -1, -1)
        joined = torch.cat([features, rays], dim=-1)
        return joined.reshape(*images.shape[:2], *joined.shape[1:])


def viewing_rays(rows: int, columns: int) -> Tensor:
    """``float32 (rows, columns, 19)``: the unit ray through each patch's middle, and waves of it.

    Of a pinhole camera that looks along z, x to the right and y down.
    """
    reach = math.tan(_FIELD_OF_VIEW / 2)
    y, x = torch.meshgrid(_middles(rows), _middles(columns), indexing="ij")
    ray = torch.stack([x * reach, y * reach, torch.ones_like(x)], dim=-1)
    waves = [
        wave
        for octave in range(_OCTAVES)
        for place in (x, y)
        for wave in ((math.pi * 2**octave * place).sin(), (math.pi * 2**octave * place).cos())
    ]
    return torch.cat([F.normalize(ray, dim=-1), torch.stack(waves, dim=-1)], dim=-1)


def _middles(cells: int) -> Tensor:
    """The middles of ``cells`` equal parts of [-1, 1]."""
    return (torch.arange(cells) + 0.5) / cells * 2 - 1
