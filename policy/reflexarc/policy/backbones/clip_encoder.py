"""What a frozen encoder of clips is, and how one is chosen.

A clip is the window of frames that a decision sees. Some encoders let its frames attend to each
other (V-JEPA 2), others see each by itself and are pooled over time; both give the same thing, a
square of tokens a clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.interface import FrozenBackbone, PolicyConfig

TimePooling = Literal["mean", "newest", "newest_and_mean"]


class ClipEncoderConfig(PolicyConfig):
    """Which frozen encoder turns a clip into tokens.

    Attributes:
        name: ``vjepa2`` is pretrained on video; ``frame_pooling`` passes each frame through
            ``vision`` and pools over time.
        path: of ``vjepa2``: a folder that ``save_pretrained`` wrote, or a hub id. Checkpoints name
            it with its weights' sha256 and do not copy it.
        precision: of ``vjepa2``'s weights; bf16 halves memory and time on a GPU.
        vision: of ``frame_pooling``; its own pooling must be 1.
        time: of ``frame_pooling``: the mean over the clip, its newest frame alone, or both beside
            each other, which tells what moves from what stands.
    """

    name: Literal["vjepa2", "frame_pooling"] = "vjepa2"
    path: str | None = Field(default=None, min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    vision: VisionBackboneConfig | None = None
    time: TimePooling = "mean"

    @model_validator(mode="after")
    def _options_belong_to_the_name(self) -> ClipEncoderConfig:
        if self.name == "vjepa2":
            if self.path is None:
                raise ValueError("clips vjepa2 needs path: a local folder or a hub id")
            if self.vision is not None or self.time != "mean":
                raise ValueError("clips.vision and clips.time belong to frame_pooling, not vjepa2")
            return self
        if self.path is not None or self.precision != "fp32":
            raise ValueError("clips.path and clips.precision belong to vjepa2, not frame_pooling")
        if self.vision is None:
            raise ValueError("clips frame_pooling needs vision, such as {name: efficientnet_lite0}")
        if self.vision.name == "conv2d" or self.vision.pool != 1:
            raise ValueError("clips.vision must be frozen (not conv2d) and its pool 1")
        return self


class ClipEncoder(nn.Module, ABC):
    """Frozen; stays in eval mode whatever its parent does, and takes no gradient.

    Attributes:
        side: a clip's tokens are a square of ``side * side``.
        channels: of one token.
    """

    side: int
    channels: int

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def train(self, mode: bool = True) -> ClipEncoder:
        super().train(False)
        return self

    @property
    @abstractmethod
    def identities(self) -> Mapping[str, FrozenBackbone]:
        """Path inside this module, empty for itself, to the identity of the weights there."""

    @abstractmethod
    def check_clip(self, height: int, width: int, frames: int) -> None:
        """Raise ConfigError naming the key of the recipe where it cannot see such clips."""

    @abstractmethod
    def frame_rows(self, images: Tensor) -> Tensor:
        """``uint8 (N, H, W, 3)`` to what is kept of each frame until a clip is whole."""

    @abstractmethod
    def clip_tokens(self, rows: Tensor) -> Tensor:
        """``(N, F, ...)`` of :meth:`frame_rows`, oldest first, to ``float32 (N, side², C)``.

        A single frame is a clip too: a goal is one.
        """


def pool_grid(features: Tensor, side: int) -> Tensor:
    """``(N, C, rows, columns)`` to ``float32 (N, side², C)``, row by row: means over cells."""
    pooled = F.adaptive_avg_pool2d(features.float(), side)
    return pooled.flatten(2).transpose(1, 2).contiguous()


def check_grid(rows: int, columns: int, side: int, what: str) -> None:
    """Raise ConfigError where a grid does not divide into ``side * side`` equal cells."""
    if not rows or not columns or rows % side or columns % side:
        raise ConfigError(
            f"{what} gives {rows}x{columns} tokens, which do not divide into {side}x{side} equal "
            "cells; change contract.image_size or policy.grid_side",
            field="policy.grid_side",
        )


def build_clip_encoder(config: ClipEncoderConfig, side: int) -> ClipEncoder:
    """Build and load it.

    Raises MissingExtraError without its package, CheckpointError where a folder or hub id does not
    hold its weights.
    """
    with torch.no_grad():
        if config.name == "vjepa2":
            from reflexarc.policy.backbones.vjepa2 import VJEPA2Clips

            assert config.path is not None  # the config's own validator
            return VJEPA2Clips(config.path, side, precision=config.precision)
        from reflexarc.policy.backbones.frame_pooling import FramePooling

        assert config.vision is not None
        return FramePooling(config.vision, side, time=config.time)
