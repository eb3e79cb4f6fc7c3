"""What gives the head's layers their semantic states, and the small one for a CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.policy.backbones.vision import build_vision_backbone
from reflexarc.policy.interface import FrozenBackbone, Task, Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.layers.keypoints import KeypointTokens
from reflexarc.policy.qwen_geometry.config import SemanticConfig

_EMBEDDING_STD = 0.02


class Semantic(nn.Module, ABC):
    """Images and an instruction to one state for each of N layers.

    Attributes:
        width: C, of a state.
    """

    width: int

    @abstractmethod
    def task_rows(self, tasks: Sequence[Task]) -> Tensors:
        """What ``embed_task`` keeps of instructions, on the CPU."""

    @abstractmethod
    def frame_rows(self, images: Tensor) -> Tensor:
        """``uint8 (N, V, H, W, 3)`` to what the feature store keeps ``(N, ...)``."""

    @abstractmethod
    def forward(self, task: Tensors, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """N states ``(B, L, C)``, and ``bool (B, L)``: False at padding.

        Args:
            task: rows of :meth:`task_rows`.
            rows: of :meth:`frame_rows`, ``(B, ...)``.
        """

    def identities(self) -> Mapping[str, FrozenBackbone]:
        """Path inside this module to the identity of frozen weights there."""
        return {}

    def blocks(self) -> Sequence[nn.Module]:
        """See :meth:`Policy.blocks`."""
        return ()

    def extra_files(self) -> Mapping[str, bytes]:
        """Files that a checkpoint must carry so that this can be built again."""
        return {}


class CompactSemantic(Semantic):
    """Keypoints of frozen features and the instruction through a small transformer.

    Its layers' outputs are the states, so that the head's first layer sees what little processing
    has made and the last what all of it has, as with a language model's layers.
    """

    def __init__(
        self,
        config: SemanticConfig,
        contract: PolicyContract,
        language: LanguageEmbeddings,
        *,
        layers: int,
    ) -> None:
        super().__init__()
        assert config.vision is not None  # the config's own validator
        self.language = language
        self.width = config.width
        self.vision = build_vision_backbone(config.vision)
        keypoints, cameras = config.keypoints, len(contract.cameras)
        camera = contract.cameras[0]
        self.instruction = nn.Sequential(
            nn.LayerNorm(language.dimension), nn.Linear(language.dimension, config.width)
        )
        self.keypoints = KeypointTokens(
            config.width,
            cameras=cameras,
            grid=self.vision.grid(camera.height, camera.width),
            channels=self.vision.channels,
            keypoints=keypoints.number,
            hidden=keypoints.hidden,
            tokens=keypoints.tokens,
        )
        self.modality = nn.Parameter(torch.randn(1 + cameras, config.width) * _EMBEDDING_STD)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )

    def task_rows(self, tasks: Sequence[Task]) -> Tensors:
        """``"language" float32 (N, E)``."""
        return {"language": self.language.lookup([task.instruction for task in tasks])}

    def frame_rows(self, images: Tensor) -> Tensor:
        """Frozen features ``float32 (N, V, P, C)``."""
        features: Tensor = self.vision(images.flatten(0, 1))
        return features.reshape(*images.shape[:2], *features.shape[1:])

    def forward(self, task: Tensors, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        instruction = self.instruction(task["language"])
        seen = self.keypoints(rows, instruction) + self.modality[1:, None]
        told = (instruction + self.modality[0])[:, None]
        x = torch.cat([told, seen.flatten(1, 2)], dim=1)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def extra_files(self) -> Mapping[str, bytes]:
        return self.language.to_files()
