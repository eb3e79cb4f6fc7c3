"""Qwen2.5-VL and a flow head whose layers read the language model's last layers, one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from policies.common import (
    VOCABULARY,
    WIDTH,
    ActionDecoder,
    TinyConfig,
    TinyPolicy,
    flow_loss,
    frozen,
    identity,
    seeded,
    tokens,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import FrozenBackbone, SamplingSpec, Task, Tensors
from reflexarc.policy.layers.flow_matching import euler_sample
from reflexarc.training.objective import Batch

_READ_LAYERS = 3


def tiny_qwen() -> Qwen2_5_VLModel:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": WIDTH, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLModel(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=4,
                         video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
    )  # fmt: skip


class VisionLanguagePolicy(TinyPolicy):
    """All seven dimensions from one flow, the gripper's too."""

    family = "test_vision_language"

    def __init__(self, config: TinyConfig, contract: PolicyContract) -> None:
        super().__init__(config, contract)
        action = contract.action
        shape = (action.horizon, action.dimension)
        self.sampling = SamplingSpec(noise_shape=shape, default_steps=3)
        self.qwen = seeded(config.seed, tiny_qwen)
        frozen(self.qwen.visual)
        self.layers = nn.ModuleList(
            ActionDecoder(action.horizon, action.dimension, action.dimension)
            for _ in range(_READ_LAYERS)
        )

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        return {"qwen.visual": identity("tiny random Qwen2.5-VL vision", self.qwen.visual)}

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        ids, mask = tokens([task.instruction for task in tasks])
        return {"ids": ids.to(self.device), "mask": mask.to(self.device)}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``{"vision": (N, V · tokens, WIDTH)}``."""
        images = self.pixels(frames).flatten(0, 1)
        rows = images.shape[-1] // 14
        # Patches in groups of 2 x 2, which the vision tower merges; two equal frames in time.
        patches = images.view(len(images), 3, rows // 2, 2, 14, rows // 2, 2, 14)
        patches = (
            patches.permute(0, 2, 5, 3, 6, 1, 4, 7)
            .unsqueeze(6)
            .expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
        )
        grid = torch.tensor([[1, rows, rows]], device=images.device).expand(len(images), -1)
        features = self.qwen.get_image_features(
            patches.reshape(len(images) * rows * rows, -1), grid
        ).pooler_output
        vision = torch.stack(list(features))
        return {"vision": vision.view(-1, len(self.contract.cameras) * vision.shape[1], WIDTH)}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        vision = window["vision"].flatten(1, 2)
        shown = valid[:, -window["vision"].shape[1] :].repeat_interleave(
            window["vision"].shape[2], 1
        )
        words = self.qwen.language_model.embed_tokens(task["ids"])
        mask = torch.cat([shown, task["mask"]], dim=1)
        outputs = self.qwen.language_model(
            inputs_embeds=torch.cat([vision, words], dim=1),
            attention_mask=mask.long(),
            # Padding in the middle must not move what follows it.
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[None].expand(3, -1, -1),
            output_hidden_states=True,
            use_cache=False,
        )
        read = outputs.hidden_states[-_READ_LAYERS:]
        return {**{f"layer_{i}": hidden for i, hidden in enumerate(read)}, "ignore": ~mask}

    def velocity(self, context: Tensors, x: Tensor, t: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x + layer(context[f"layer_{index}"], x, t, context["ignore"])
        return x

    def sample_actions(
        self, context: Tensors, noise: Tensor | None, *, steps: int, prefix: Tensor | None = None
    ) -> Tensor:
        assert noise is not None
        return euler_sample(lambda x, t: self.velocity(context, x, t), noise, steps)

    def loss(self, batch: Batch, seed: int) -> Tensor:
        context = self.encode(batch.task, batch.window, batch.valid)
        return flow_loss(
            lambda x, t: self.velocity(context, x, t), batch.actions, batch.action_mask, seed
        )
