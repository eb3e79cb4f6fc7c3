"""From checked observations to action chunks: what the server's worker thread calls."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from reflexarc.contract import ActionChunk, Observation, PolicyContract, check_observation
from reflexarc.contract.errors import InferenceError
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Task, Tensors

_CACHED_TASKS = 256


class PolicyRuntime:
    """Answers batches of observations. To be called from one thread at a time.

    A chunk depends on its observation and its seed, not on its neighbours: it is bit-identical at
    equal batch shape and place in the batch, and within 1e-5 otherwise.
    """

    def __init__(self, loaded: LoadedPolicy, *, denoising_steps: int | None = None):
        """``denoising_steps`` replaces the policy's own where a request names none."""
        self._policy = loaded.policy
        self._processor = loaded.processor
        self._default_steps = denoising_steps or loaded.policy.sampling.default_steps
        self._tasks: OrderedDict[str | None, Tensors] = OrderedDict()

    @property
    def contract(self) -> PolicyContract:
        return self._policy.contract

    @property
    def default_steps(self) -> int:
        """Euler steps of a request that names none."""
        return self._default_steps

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk an observation, in order; rows with equal denoising steps form a batch.

        Raises:
            ContractViolationError, UnknownInstructionError: of the first observation at fault;
                nothing was computed for the others.
            InferenceError: the policy's actions are not finite.
        """
        for observation in observations:
            check_observation(self.contract, observation)
            self._embed_task(observation.instruction)
        groups: dict[int, list[int]] = {}
        for index, observation in enumerate(observations):
            groups.setdefault(observation.denoising_steps or self._default_steps, []).append(index)
        chunks: dict[int, ActionChunk] = {}
        for steps, indices in groups.items():
            answers = self._infer_group([observations[i] for i in indices], steps)
            chunks.update(zip(indices, answers, strict=True))
        return [chunks[index] for index in range(len(observations))]

    @torch.inference_mode()
    def _infer_group(self, observations: list[Observation], steps: int) -> list[ActionChunk]:
        clock = _Clock(self._policy.device)
        seeds = [
            secrets.randbits(63) if observation.seed is None else observation.seed
            for observation in observations
        ]
        with clock.span("preprocess"):
            task = self._embed_tasks(observations)
            frames, state = self._inputs(observations)
            noise = self._noise(seeds)
        with clock.span("device"):
            actions = self._act(task, frames, state, noise, steps)
        with clock.span("postprocess"):
            # Before the clip to the limits, which would make an infinite action a full one.
            finite = bool(torch.isfinite(actions).all())
            robot_actions = self._processor.actions_to_robot(actions)
        if not finite:
            raise InferenceError("the policy's actions are not finite; its weights are damaged")
        return [
            ActionChunk(
                actions=robot_actions[row],
                seed=seeds[row],
                request_id=observation.request_id,
                session_id=observation.session_id,
                timing=dict(clock.milliseconds),
            )
            for row, observation in enumerate(observations)
        ]

    def _act(
        self, task: Tensors, frames: Tensors, state: Tensor, noise: Tensor | None, steps: int
    ) -> Tensor:
        embedded = self._policy.embed_frames(frames, task)
        window = {name: rows.unsqueeze(1) for name, rows in embedded.items()}
        window["state"] = state.unsqueeze(1)
        valid = torch.ones(len(state), 1, dtype=torch.bool, device=state.device)
        context = self._policy.encode(task, window, valid)
        return self._policy.sample_actions(context, noise, steps=steps)

    def _inputs(self, observations: list[Observation]) -> tuple[Tensors, Tensor]:
        device = self._policy.device
        images = {
            name: np.stack([observation.images[name] for observation in observations])
            for name in self.contract.camera_names
        }
        state = np.stack([observation.state for observation in observations])
        frames = {name: rows.to(device) for name, rows in self._processor.frames(images).items()}
        return frames, self._processor.normalize_state(state).to(device)

    def _embed_tasks(self, observations: list[Observation]) -> Tensors:
        rows = [self._embed_task(observation.instruction) for observation in observations]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _embed_task(self, instruction: str | None) -> Tensors:
        """One row, from the cache where the instruction was seen lately."""
        if instruction in self._tasks:
            self._tasks.move_to_end(instruction)
            return self._tasks[instruction]
        row = self._policy.embed_task([Task(instruction=instruction)])
        self._tasks[instruction] = row
        if len(self._tasks) > _CACHED_TASKS:
            self._tasks.popitem(last=False)
        return row

    def _noise(self, seeds: Sequence[int]) -> Tensor | None:
        shape = self._policy.sampling.noise_shape
        if shape is None:
            return None
        # Always drawn on the CPU, so that a seed means the same chunk on every device.
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self._policy.device)


class _Clock:
    """Milliseconds by name; waits for the accelerator, which computes asynchronously."""

    def __init__(self, device: torch.device):
        self.milliseconds: dict[str, float] = {}
        self._synchronize: Callable[[], None] = {
            "cuda": torch.cuda.synchronize,
            "mps": torch.mps.synchronize,
        }.get(device.type, lambda: None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._synchronize()
        self.milliseconds[name] = (time.perf_counter() - start) * 1e3
