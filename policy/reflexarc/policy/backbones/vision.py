"""What a frozen vision front is, a tiny random one for tests, and how one is chosen."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from reflexarc.policy.interface import FrozenBackbone, PolicyConfig

VisionBackboneName = Literal["efficientnet_lite0", "siglip", "conv2d", "tiny_random"]
Rgb: TypeAlias = tuple[float, float, float]


class VisionBackboneConfig(PolicyConfig):
    """Which vision encoder, and the average pooling over its grid (1 is none).

    Attributes:
        name: ``efficientnet_lite0`` and ``siglip`` are pretrained and frozen; ``conv2d`` is one
            patch convolution trained with the policy; ``tiny_random`` is for tests.
        pool: side of the square of cells that are averaged to one patch.
        path: of ``siglip``: a folder that ``save_pretrained`` wrote, or a hub id. Checkpoints
            name it with its weights' sha256 and do not copy it.
        channels: of ``conv2d``: of one patch; 256 when left out.
    """

    name: VisionBackboneName = "efficientnet_lite0"
    pool: int = Field(default=2, ge=1)
    path: str | None = Field(default=None, min_length=1)
    channels: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _options_belong_to_the_name(self) -> VisionBackboneConfig:
        if self.name == "siglip" and self.path is None:
            raise ValueError("vision siglip needs path: a local folder or a hub id")
        for option, owner in (("path", "siglip"), ("channels", "conv2d")):
            if getattr(self, option) is not None and self.name != owner:
                raise ValueError(f"vision.{option} belongs to {owner}, not to {self.name}")
        return self


class VisionBackbone(nn.Module, ABC):
    """A frozen encoder: ``uint8 (N, H, W, 3)`` RGB to ``float32 (N, patches, channels)``.

    It takes no gradient and stays in eval mode whatever its parent does. Its weights are not
    copied into checkpoints; ``identity`` names them.

    Attributes:
        identity: name and sha256 of the weights.
        channels: of one patch.
        stride: pixels of the image for one cell of the unpooled grid.
        mean, std: per channel, of images scaled to [0, 1].
    """

    identity: FrozenBackbone
    channels: int
    stride: int
    mean: Rgb
    std: Rgb
    _shift: Tensor
    _scale: Tensor

    def __init__(self, pool: int):
        super().__init__()
        self.pool = pool
        self._normalise_by(self.mean, self.std)

    def _normalise_by(self, mean: Rgb, std: Rgb) -> None:
        self.mean, self.std = mean, std
        self.register_buffer("_shift", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    def freeze(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VisionBackbone:
        """Frozen: stays in eval mode, so that batch norms never move."""
        super().train(False)
        return self

    def trained_patches(self) -> nn.Module | None:
        """For a front whose rows are not patches yet: the trained module that makes them.

        ``(N, *row)`` to ``(N, patches, channels)``; it belongs to the policy, which trains and
        saves it. None where ``forward`` gives patches already.
        """
        return None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of pooled patches for an image of this size."""
        rows, columns = (-(-side // self.stride) // self.pool for side in (height, width))
        return rows, columns

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(self._shift.dtype).div(255.0)
        features = self.features((pixels - self._shift) / self._scale)
        if self.pool > 1:
            features = F.avg_pool2d(features, self.pool)
        return features.flatten(2).transpose(1, 2).contiguous()

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Normalised ``float32 (N, 3, H, W)`` to ``(N, channels, H / stride, W / stride)``."""


class TinyRandomVision(VisionBackbone):
    """One patch convolution with fixed random weights: for tests and dry runs, not for robots."""

    channels = 8
    stride = 16
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, pool: int):
        super().__init__(pool)
        self.patches = nn.Conv2d(3, self.channels, self.stride, stride=self.stride)
        generator = torch.Generator().manual_seed(0)
        digest = hashlib.sha256()
        with torch.no_grad():
            for parameter in self.patches.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                digest.update(parameter.numpy().tobytes())
        self.identity = FrozenBackbone("tiny_random", digest.hexdigest())
        self.freeze()

    def features(self, pixels: Tensor) -> Tensor:
        return torch.tanh(self.patches(pixels))


def build_vision_backbone(config: VisionBackboneConfig) -> VisionBackbone:
    """Build and load the front.

    Raises MissingExtraError without its weights' package, CheckpointError where a folder or hub
    id does not hold them.
    """
    builders: dict[str, Callable[[VisionBackboneConfig], VisionBackbone]] = {
        "efficientnet_lite0": _efficientnet_lite0,
        "siglip": _siglip,
        "conv2d": _raw_pixels,
        "tiny_random": lambda config: TinyRandomVision(config.pool),
    }
    return builders[config.name](config)


def _efficientnet_lite0(config: VisionBackboneConfig) -> VisionBackbone:
    from reflexarc.policy.backbones.efficientnet_lite0 import EfficientNetLite0

    return EfficientNetLite0(config.pool)


def _siglip(config: VisionBackboneConfig) -> VisionBackbone:
    from reflexarc.policy.backbones.siglip import SiglipVision

    assert config.path is not None  # the config's own validator
    return SiglipVision(config.path, config.pool)


def _raw_pixels(config: VisionBackboneConfig) -> VisionBackbone:
    from reflexarc.policy.backbones.conv2d import RawPixels

    return RawPixels(config.channels or 256, config.pool)
