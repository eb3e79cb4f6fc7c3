"""Flow noise for the motion, a classifier for the gripper, a prefix for real-time chunking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from policies.common import WIDTH, ActionDecoder, TinyConfig, TinyPolicy, flow_loss
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import PolicyConfig, SamplingSpec, Task, Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.layers.flow_matching import euler_sample
from reflexarc.training.objective import Batch


class FlowPolicy(TinyPolicy):
    """Carries its language embeddings as extra files of the checkpoint."""

    family = "test_flow"

    def __init__(
        self, config: TinyConfig, contract: PolicyContract, language: LanguageEmbeddings
    ) -> None:
        super().__init__(config, contract)
        self.language = language
        action, history = contract.action, contract.history
        self.motion = action.dimension - (action.gripper is not None)
        self.sampling = SamplingSpec(
            noise_shape=(action.horizon, self.motion), default_steps=4, supports_prefix=True
        )
        self.vision = nn.Linear(len(contract.cameras) * 48, WIDTH)
        self.state = nn.Linear(contract.state.dimension, WIDTH)
        self.words = nn.Linear(language.dimension, WIDTH)
        self.age = nn.Parameter(torch.randn(history.rows, WIDTH) * 0.1)
        self.flow = ActionDecoder(action.horizon, self.motion, self.motion)
        self.gripper = nn.Linear(WIDTH, action.horizon) if action.gripper is not None else None

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> FlowPolicy:
        return cls(config, contract, LanguageEmbeddings.from_files(extra_files))  # type: ignore[arg-type]

    def extra_files(self) -> Mapping[str, bytes]:
        return self.language.to_files()

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        return {"language": self.language.lookup([t.instruction for t in tasks]).to(self.device)}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        pooled = nn.functional.adaptive_avg_pool2d(self.pixels(frames).flatten(0, 1), 4)
        return {"pooled": pooled.reshape(-1, len(self.contract.cameras) * 48)}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        frames, states = window["pooled"].shape[1], window["state"].shape[1]
        tokens = [
            self.words(task["language"])[:, None],
            self.vision(window["pooled"]) + self.age[-frames:],
            self.state(window["state"]) + self.age[-states:],
        ]
        known = torch.cat([valid[:, -1:], valid[:, -frames:], valid[:, -states:]], dim=1)
        return {"tokens": torch.cat(tokens, dim=1), "ignore": ~known}

    def velocity(self, context: Tensors, x: Tensor, t: Tensor) -> Tensor:
        return self.flow(context["tokens"], x, t, context["ignore"])

    def sample_actions(
        self, context: Tensors, noise: Tensor | None, *, steps: int, prefix: Tensor | None = None
    ) -> Tensor:
        assert noise is not None
        known = None if prefix is None else prefix[..., : self.motion]
        motion = euler_sample(lambda x, t: self.velocity(context, x, t), noise, steps, known)
        if self.gripper is None:
            return motion
        logits = self.gripper(context["tokens"][:, -1])
        command = torch.where(logits > 0, 1.0, -1.0)
        if prefix is not None:
            command[:, : prefix.shape[1]] = prefix[..., -1]
        return torch.cat([motion, command[..., None]], dim=-1)

    def loss(self, batch: Batch, seed: int) -> Tensor:
        context = self.encode(batch.task, batch.window, batch.valid)
        loss = flow_loss(
            lambda x, t: self.velocity(context, x, t),
            batch.actions[..., : self.motion],
            batch.action_mask,
            seed,
        )
        if self.gripper is not None:
            logits = self.gripper(context["tokens"][:, -1])
            closed = (batch.actions[..., -1] > 0).float()
            loss = loss + nn.functional.binary_cross_entropy_with_logits(logits, closed)
        return loss
