"""Kosmos-2 and an LSTM: each frame by itself, the window read again at every decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from policies.common import (
    VOCABULARY,
    WIDTH,
    TinyConfig,
    TinyPolicy,
    frozen,
    identity,
    seeded,
    tokens,
)
from torch import Tensor, nn
from transformers import Kosmos2Config, Kosmos2Model

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import FrozenBackbone, SamplingSpec, Task, Tensors
from reflexarc.training.objective import Batch

_IMAGE_TOKENS = 4


def tiny_kosmos2(size: int) -> Kosmos2Model:
    text = {
        "vocab_size": VOCABULARY, "embed_dim": WIDTH, "layers": 2, "ffn_dim": 64,
        "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": size, "patch_size": 16,
    }  # fmt: skip
    return Kosmos2Model(
        Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=_IMAGE_TOKENS)
    )


class MobilePolicy(TinyPolicy):
    """Velocities ``(B, H, 2)``, no gripper, no proprioception."""

    family = "test_mobile"

    def __init__(self, config: TinyConfig, contract: PolicyContract) -> None:
        super().__init__(config, contract)
        self.sampling = SamplingSpec(noise_shape=None)
        (camera,) = contract.cameras
        self.kosmos = seeded(config.seed, lambda: tiny_kosmos2(camera.height))
        frozen(self.kosmos.vision_model)
        frozen(self.kosmos.image_to_text_projection)
        self.action_token = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        action = contract.action
        self.head = nn.Linear(WIDTH, action.horizon * action.dimension)

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        names = ("vision_model", "image_to_text_projection")
        return {
            f"kosmos.{name}": identity(f"tiny random Kosmos-2 {name}", getattr(self.kosmos, name))
            for name in names
        }

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        ids, mask = tokens([task.instruction for task in tasks])
        return {"ids": ids.to(self.device), "mask": mask.to(self.device)}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        images = self.pixels(frames)[:, 0]
        return {"image": self.kosmos.get_image_features(images).pooler_output}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """The text model reads image, instruction and action token of each frame; then the LSTM."""
        batch, length = window["image"].shape[:2]
        ids = task["ids"].repeat_interleave(length, 0)
        mask = task["mask"].repeat_interleave(length, 0)
        words = self.kosmos.text_model.model.embed_tokens(ids)
        image = window["image"].flatten(0, 1)
        action = self.action_token.expand(len(image), 1, -1)
        ones = mask.new_ones(len(image), 1)
        outputs = self.kosmos.text_model(
            inputs_embeds=torch.cat([image, words, action], dim=1),
            attention_mask=torch.cat([ones.expand(-1, _IMAGE_TOKENS), mask, ones], dim=1).long(),
        )
        features = outputs.last_hidden_state[:, -1].view(batch, length, WIDTH)
        # Padding is the oldest frame again, as in training: a window, not a carried state.
        return {"last": self.lstm(features)[0][:, -1]}

    def sample_actions(
        self, context: Tensors, noise: Tensor | None, *, steps: int, prefix: Tensor | None = None
    ) -> Tensor:
        action = self.contract.action
        return self.head(context["last"]).view(-1, action.horizon, action.dimension)

    def loss(self, batch: Batch, seed: int) -> Tensor:
        context = self.encode(batch.task, batch.window, batch.valid)
        given = self.sample_actions(context, None, steps=1)
        loss = nn.functional.huber_loss(given, batch.actions, reduction="none").mean(-1)
        return (loss * batch.action_mask).sum() / batch.action_mask.sum()
