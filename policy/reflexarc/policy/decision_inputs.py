"""Observations as the tensors that a policy takes, on its device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.policy.processing import Processor
from reflexarc.policy.sessions import Decision

_CACHED_TASKS = 256


class DecisionInputs:
    """Preprocessing of one policy. Tasks without a goal image are embedded once and kept."""

    def __init__(self, policy: Policy, processor: Processor):
        self._policy = policy
        self._processor = processor
        self._tasks: OrderedDict[str | None, Tensors] = OrderedDict()

    def new_frames(self, decisions: Sequence[Decision]) -> Tensors:
        """Images of all decisions that have no row yet, ``uint8 (N, H, W, 3)``, oldest first."""
        new = [decision.images[step] for decision in decisions for step in sorted(decision.images)]
        names = self._policy.contract.camera_names
        images = {name: np.stack([images[name] for images in new]) for name in names}
        device = self._policy.device
        return {name: rows.to(device) for name, rows in self._processor.frames(images).items()}

    def states(self, decisions: Sequence[Decision]) -> list[dict[int, Tensor]]:
        """For each decision the normalised states ``(S,)`` by step, those that are held too."""
        device = self._policy.device
        new = [decision.states[step] for decision in decisions for step in sorted(decision.states)]
        rows = iter(self._processor.normalize_state(np.stack(new)).to(device))
        return [
            {**decision.held.states, **{step: next(rows) for step in sorted(decision.states)}}
            for decision in decisions
        ]

    def task_row(self, decision: Decision) -> Tensors:
        """One row, from the session or, without goal image, from where it was seen lately."""
        if decision.held.task is not None:
            return decision.held.task
        instruction, goal = decision.observation.instruction, decision.observation.goal_image
        if goal is not None:
            rows = {name: image[None] for name, image in goal.items()}
            images = {n: rows[0].to(self._policy.device)
                      for n, rows in self._processor.frames(rows).items()}  # fmt: skip
            return self._policy.embed_task([Task(instruction=instruction, goal_image=images)])
        if instruction in self._tasks:
            self._tasks.move_to_end(instruction)
            return self._tasks[instruction]
        row = self._policy.embed_task([Task(instruction=instruction)])
        self._tasks[instruction] = row
        if len(self._tasks) > _CACHED_TASKS:
            self._tasks.popitem(last=False)
        return row

    def noise(self, seeds: Sequence[int]) -> Tensor | None:
        """One row a seed; None for a policy that samples without."""
        shape = self._policy.sampling.noise_shape
        if shape is None:
            return None
        # Always drawn on the CPU, so that a seed means the same chunk on every device.
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self._policy.device)

    def normalized(self, actions: Sequence[npt.NDArray[Any] | None]) -> Tensor | None:
        """Robot actions of one length ``(B, N, D)``, normalised; None where there are none."""
        rows = [row for row in actions if row is not None]
        if not rows:
            return None
        return self._processor.normalize_actions(np.stack(rows)).to(self._policy.device)
