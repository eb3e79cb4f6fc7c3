"""The V-JEPA 2 policy head on pooled frames, and a step of its objective."""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.policy.backbones.clip_encoder import ClipEncoderConfig
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.vjepa2_head.config import VJEPA2HeadConfig
from reflexarc.policy.vjepa2_head.model import VJEPA2Head
from reflexarc.training.objective import Batch
from reflexarc.training.objectives.action_chunk import ActionChunkObjective
from reflexarc.training.objectives.action_chunk_config import ActionChunkConfig

HEAD_CONFIG = VJEPA2HeadConfig(
    clips=ClipEncoderConfig(
        name="frame_pooling",
        vision=VisionBackboneConfig(name="tiny_random", pool=1),
        time="newest_and_mean",
    ),
    grid_side=2,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    feed_forward=64,
    dropout=0.0,
    proprioception_hidden=(16, 24),
)


def head_loss(policy: VJEPA2Head, batch: Batch) -> Tensor:
    objective = ActionChunkObjective(
        ActionChunkConfig(), horizon=batch.actions.shape[1], gripper_index=6, classifies=True
    )
    draws = objective.draw(batch, torch.Generator().manual_seed(1))
    return objective(policy, batch, draws)["total"]
