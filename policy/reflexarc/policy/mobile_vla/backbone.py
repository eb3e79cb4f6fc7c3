"""What makes a feature of a frame and the instruction: Kosmos-2, or the compact one for a CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.backbones.vision import build_vision_backbone
from reflexarc.policy.interface import FrozenBackbone, Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.layers.keypoints import KeypointTokens
from reflexarc.policy.mobile_vla.config import CompactConfig, Kosmos2Config


class MobileBackbone(nn.Module, ABC):
    """A frozen encoder of images, and a trained part that reads one frame with the instruction.

    Attributes:
        width: D, of a frame's feature.
        language: a table of embeddings that a checkpoint carries; None where instructions are
            read as tokens.
    """

    width: int
    language: LanguageEmbeddings | None = None

    @property
    @abstractmethod
    def identities(self) -> Mapping[str, FrozenBackbone]:
        """Frozen parts by their path inside this module; the images' encoder is ``vision``."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Repeated blocks, for activation checkpointing and sharding."""
        return ()

    @abstractmethod
    def embed_instructions(self, instructions: Sequence[str | None]) -> Tensors:
        """Rows ``(N, ...)`` of one shape."""

    @abstractmethod
    def image_rows(self, images: Tensor) -> Tensor:
        """``uint8 (N, H, W, 3)`` to ``(N, tokens, C)``, from frozen weights alone."""

    @abstractmethod
    def action_features(self, images: Tensor, instructions: Tensors) -> Tensor:
        """``float32 (N, D)`` of rows of both ``(N, ...)``."""


class CompactBackbone(MobileBackbone):
    """Patches of a frozen encoder, in which the instruction says what to look for."""

    def __init__(
        self, config: CompactConfig, contract: PolicyContract, language: LanguageEmbeddings
    ) -> None:
        super().__init__()
        if language.dimension != config.language_dimension:
            raise ConfigError(
                f"language_dimension is {config.language_dimension}, but the embeddings of "
                f"{language.encoder} have {language.dimension}",
                field="backbone.language_dimension",
            )
        (camera,) = contract.cameras
        self.language, self.width = language, config.width
        self.vision = build_vision_backbone(config.vision)
        grid = self.vision.grid(camera.height, camera.width)
        if grid[0] * grid[1] == 0:
            raise ConfigError(
                f"images of {camera.height}x{camera.width} are too small for "
                f"{self.vision.identity.name}",
                field="contract.image_size",
            )
        self.instruction = nn.Sequential(
            nn.Linear(config.language_dimension, config.width), nn.SiLU(),
            nn.Linear(config.width, config.width),
        )  # fmt: skip
        self.keypoints = KeypointTokens(
            config.width,
            cameras=1,
            grid=grid,
            channels=self.vision.channels,
            keypoints=config.keypoints.number,
            hidden=config.keypoints.hidden,
            tokens=config.keypoints.tokens,
        )
        tokens = config.keypoints.tokens
        self.feature = nn.Sequential(
            nn.LayerNorm((tokens + 1) * config.width),
            nn.Linear((tokens + 1) * config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
        )

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    def embed_instructions(self, instructions: Sequence[str | None]) -> Tensors:
        """``{"language": float32 (N, E)}``."""
        assert self.language is not None
        return {"language": self.language.lookup(instructions)}

    def image_rows(self, images: Tensor) -> Tensor:
        rows: Tensor = self.vision(images)
        return rows

    def action_features(self, images: Tensor, instructions: Tensors) -> Tensor:
        told = self.instruction(instructions["language"].float())
        tokens = self.keypoints(images.float().unsqueeze(1), told)
        seen = torch.cat([tokens.flatten(1), told], dim=1)
        feature: Tensor = self.feature(seen)
        return feature


def build_backbone(
    config: Kosmos2Config | CompactConfig,
    contract: PolicyContract,
    language: LanguageEmbeddings | None,
) -> MobileBackbone:
    """Raises MissingExtraError without a package that it needs, CheckpointError where a folder or
    hub id does not hold its weights.
    """
    if isinstance(config, CompactConfig):
        if language is None:
            raise ConfigError(
                "the compact backbone is told by embeddings of instructions: set "
                "contract.needs_language: true",
                field="contract.needs_language",
            )
        return CompactBackbone(config, contract, language)
    from reflexarc.policy.backbones.kosmos2 import Kosmos2Backbone

    return Kosmos2Backbone(config, contract)
