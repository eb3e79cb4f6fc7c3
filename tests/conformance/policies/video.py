"""V-JEPA 2's shape: a clip of frames that attend to each other, a goal image, a state history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from policies.common import WIDTH, ActionDecoder, TinyConfig, TinyPolicy, frozen, identity, seeded
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import FrozenBackbone, SamplingSpec, Task, Tensors
from reflexarc.training.objective import Batch


def tiny_vjepa2(size: int, frames: int) -> VJEPA2Model:
    return VJEPA2Model(
        VJEPA2Config(
            patch_size=16, crop_size=size, frames_per_clip=frames, tubelet_size=2,
            hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=2, mlp_ratio=2.0,
            pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1,
            num_pooler_layers=1, pred_num_mask_tokens=1,
        )
    )  # fmt: skip


class VideoPolicy(TinyPolicy):
    """Regression without noise. Frames are kept as pixels: the encoder mixes them over time."""

    family = "test_video"

    def __init__(self, config: TinyConfig, contract: PolicyContract) -> None:
        super().__init__(config, contract)
        self.sampling = SamplingSpec(noise_shape=None)
        (camera,) = contract.cameras
        self.video = frozen(
            seeded(config.seed, lambda: tiny_vjepa2(camera.height, contract.history.frames))
        )
        states = contract.history.states * contract.state.dimension
        self.proprioception = nn.Sequential(nn.Linear(states, 64), nn.GELU(), nn.Linear(64, 128))
        self.projection = nn.Linear(WIDTH, WIDTH)
        action = contract.action
        self.decoder = ActionDecoder(action.horizon, action.dimension, action.dimension)

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        return {"video": identity("tiny random V-JEPA 2", self.video)}

    def tokens_of(self, clip: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the mean over time of tokens, ``(B, rows · columns, WIDTH)``."""
        features = self.video(pixel_values_videos=clip, skip_predictor=True).last_hidden_state
        side = clip.shape[-1] // 16
        return features.unflatten(1, (-1, side * side)).mean(1)

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        goals = [self.pixels({n: i[None] for n, i in (t.goal_image or {}).items()}) for t in tasks]
        return {"goal": self.tokens_of(torch.cat(goals).expand(-1, 2, -1, -1, -1))}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        (name,) = self.contract.camera_names
        return {"pixels": frames[name]}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        (name,) = self.contract.camera_names
        batch, length = window["pixels"].shape[:2]
        clip = self.pixels({name: window["pixels"].flatten(0, 1)}).view(batch, length, 3, 32, 32)
        state = window["state"] * valid[:, -window["state"].shape[1] :, None]
        proprioception = self.proprioception(state.flatten(1)).view(batch, 4, WIDTH)
        seen = torch.cat([self.tokens_of(clip), task["goal"]], dim=1)
        return {"tokens": torch.cat([self.projection(seen), proprioception], dim=1)}

    def sample_actions(
        self, context: Tensors, noise: Tensor | None, *, steps: int, prefix: Tensor | None = None
    ) -> Tensor:
        tokens, action = context["tokens"], self.contract.action
        zeros = tokens.new_zeros(len(tokens), action.horizon, action.dimension)
        return self.decoder(tokens, zeros, tokens.new_zeros(len(tokens)))

    def loss(self, batch: Batch, seed: int) -> Tensor:
        context = self.encode(batch.task, batch.window, batch.valid)
        error = self.sample_actions(context, None, steps=1) - batch.actions
        return (error.square().mean(-1) * batch.action_mask).sum() / batch.action_mask.sum()
