"""A policy that keeps the windows it was shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from policies.common import TinyConfig, TinyPolicy
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import SamplingSpec, Task, Tensors


class EchoPolicy(TinyPolicy):
    """A frame's row is its first pixel; ``seen`` holds ``(window, valid)`` of every decision."""

    family = "test_echo"

    def __init__(self, config: TinyConfig, contract: PolicyContract) -> None:
        super().__init__(config, contract)
        self.sampling = SamplingSpec(noise_shape=None)
        self.nothing = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensors, Tensor]] = []
        self.embedded: list[int] = []

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        return {"length": torch.tensor([[len(task.instruction or "")] for task in tasks])}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        (name,) = self.contract.camera_names
        pixels = frames[name][:, 0, 0].long()
        steps = pixels[:, 0] + 256 * pixels[:, 1]
        self.embedded += steps.tolist()
        return {"step": steps}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        self.seen.append((window, valid))
        return {"rows": valid}

    def sample_actions(
        self, context: Tensors, noise: Tensor | None, *, steps: int, prefix: Tensor | None = None
    ) -> Tensor:
        action = self.contract.action
        return torch.zeros(len(context["rows"]), action.horizon, action.dimension)
