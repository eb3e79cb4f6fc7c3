"""What a frozen encoder of geometry is, and how one is chosen.

Images in [0, 1] become tokens on a grid, one grid a view. An encoder that looks at all views
together (MapAnything) and one that sees each by itself (DINOv2) give the same shape, so that
whatever compresses the tokens need not know which it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import FrozenBackbone, PolicyConfig

GeometryName = Literal["dinov2", "depth_anything", "mapanything", "rays"]
FOLDER_NAMES: tuple[GeometryName, ...] = ("dinov2", "depth_anything", "mapanything")


class GeometryEncoderConfig(PolicyConfig):
    """Which frozen encoder of geometry.

    Attributes:
        name: ``dinov2``, ``depth_anything`` and ``mapanything`` are pretrained and read from
            ``path``; ``rays`` is EfficientNet-Lite0's early features with each patch's viewing
            ray, which a registry package carries and a CPU can run.
        path: a folder that ``save_pretrained`` wrote, or a hub id. Checkpoints name it with its
            weights' sha256 and do not copy it.
        precision: of a pretrained encoder's weights; bf16 halves memory and time on a GPU.
    """

    name: GeometryName = "rays"
    path: str | None = Field(default=None, min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _options_belong_to_the_name(self) -> GeometryEncoderConfig:
        if self.name in FOLDER_NAMES and self.path is None:
            raise ValueError(f"geometry {self.name} needs path: a local folder or a hub id")
        if self.name not in FOLDER_NAMES and (self.path is not None or self.precision != "fp32"):
            raise ValueError(f"geometry.path and geometry.precision do not belong to {self.name}")
        return self


class GeometryEncoder(nn.Module, ABC):
    """Frozen; stays in eval mode whatever its parent does, and takes no gradient.

    Attributes:
        channels: D, of one token.
        licence: of the weights that this class reads, in words. Whoever trains on them or serves
            them is bound by it.
    """

    channels: int
    licence: ClassVar[str]

    def train(self, mode: bool = True) -> GeometryEncoder:
        super().train(False)
        return self

    def freeze(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self.requires_grad_(False)
        self.eval()

    @property
    @abstractmethod
    def identities(self) -> Mapping[str, FrozenBackbone]:
        """Path inside this module, empty for itself, to the identity of the weights there."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a view's tokens. ConfigError where it cannot see such images."""

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """``float (B, V, 3, H, W)`` in [0, 1] to ``float32 (B, V, rows, columns, D)``."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``uint8 (B, V, H, W, 3)`` RGB to ``float32 (B, V, rows, columns, D)``."""
        return self.tokens(images.permute(0, 1, 4, 2, 3).float().div(255.0))


def check_patches(height: int, width: int, patch: int, what: str) -> tuple[int, int]:
    """The grid of patches of an image; ConfigError where they do not cover it exactly."""
    if height % patch or width % patch or not height or not width:
        nearest = max(patch, round(height / patch) * patch)
        raise ConfigError(
            f"{what} cuts images into patches of {patch} pixels, the contract's are "
            f"{height}x{width}; set contract.image_size to a multiple of {patch}, such as "
            f"{nearest}",
            field="contract.image_size",
        )
    return height // patch, width // patch


def build_geometry_encoder(config: GeometryEncoderConfig) -> GeometryEncoder:
    """Build and load it.

    Raises MissingExtraError without its package, CheckpointError where a folder or hub id does not
    hold its weights.
    """
    if config.name == "rays":
        from reflexarc.policy.backbones.geometry_rays import RayFeatures

        return RayFeatures()
    assert config.path is not None  # the config's own validator
    if config.name == "mapanything":
        from reflexarc.policy.backbones.geometry_mapanything import MapAnythingGeometry

        return MapAnythingGeometry(config.path, precision=config.precision)
    from reflexarc.policy.backbones.geometry_dinov2 import DepthAnythingGeometry, Dinov2Geometry

    family = Dinov2Geometry if config.name == "dinov2" else DepthAnythingGeometry
    return family(config.path, precision=config.precision)
