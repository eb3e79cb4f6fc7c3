"""A clip as the frames it consists of, each seen by itself, and pooled over time.

Stands in for a video encoder where its weights are not to be had: EfficientNet-Lite0 comes in a
registry package and runs on a CPU. A frame is encoded once and kept by the session, so that a
decision costs its new frames alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reflexarc.policy.backbones.clip_encoder import (
    ClipEncoder,
    TimePooling,
    check_grid,
    pool_grid,
)
from reflexarc.policy.backbones.vision import VisionBackboneConfig, build_vision_backbone
from reflexarc.policy.interface import FrozenBackbone


class FramePooling(ClipEncoder):
    """``vision`` over each frame, its grid pooled to ``side * side``, then pooled over time."""

    def __init__(self, vision: VisionBackboneConfig, side: int, *, time: TimePooling) -> None:
        super().__init__(side)
        self.vision = build_vision_backbone(vision)
        self._time = time
        self.channels = self.vision.channels * (2 if time == "newest_and_mean" else 1)

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    def check_clip(self, height: int, width: int, frames: int) -> None:
        rows, columns = self.vision.grid(height, width)
        what = f"{self.vision.identity.name} at {height}x{width}"
        check_grid(rows, columns, self.side, what)

    @torch.no_grad()
    def frame_rows(self, images: Tensor) -> Tensor:
        """``float32 (N, side², channels of the front)``."""
        rows, columns = self.vision.grid(images.shape[1], images.shape[2])
        patches = self.vision(images).transpose(1, 2)
        return pool_grid(patches.unflatten(2, (rows, columns)), self.side)

    @torch.no_grad()
    def clip_tokens(self, rows: Tensor) -> Tensor:
        newest = rows[:, -1]
        if self._time == "newest":
            return newest.clone()
        mean = rows.mean(1)
        return mean if self._time == "mean" else torch.cat([newest, mean], dim=-1)
