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
from reflexarc.policy.mobile_vla.config import CompactConfig, Kosmos2Config
from reflexarc.policy.mobile_vla.queries import InstructionQueries


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
        self.queries = InstructionQueries(
            config.queries,
            language=config.language_dimension,
            channels=self.vision.channels,
            grid=grid,
        )
        self.feature = nn.Sequential(
            nn.Linear(self.queries.width, config.width), nn.SiLU(),
            nn.Linear(config.width, config.width), nn.LayerNorm(config.width),
        )  # fmt: skip

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    def embed_instructions(self, instructions: Sequence[str | None]) -> Tensors:
        """``{"language": float32 (N, E)}``: what distinguishes each from the other instructions.

        Sentences that differ in one noun have nearly the same embedding: their mean is left out,
        and what remains brought to a deviation of 1.
        """
        assert self.language is not None
        known = self.language.vectors
        centre = known.mean(0) if len(known) > 1 else torch.zeros(self.language.dimension)
        size = (known - centre).square().mean().sqrt().clamp_min(1e-6)
        return {"language": (self.language.lookup(instructions) - centre) / size}

    def image_rows(self, images: Tensor) -> Tensor:
        rows: Tensor = self.vision(images)
        return rows

    def action_features(self, images: Tensor, instructions: Tensors) -> Tensor:
        found = self.queries(images.float(), instructions["language"].float())
        feature: Tensor = self.feature(found)
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
