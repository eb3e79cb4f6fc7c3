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
from reflexarc.contract.errors import ContractViolationError, InferenceError
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Task, Tensors
from reflexarc.policy.sessions import Decision, SessionStore, advance, plan
from reflexarc.policy.windows import join_rows, pad_window

_CACHED_TASKS = 256


class PolicyRuntime:
    """Answers batches of observations. To be called from one thread at a time.

    A chunk depends on its observation, the rows that its session holds and its seed, not on its
    neighbours: it is bit-identical at equal batch shape and place in the batch, and within 1e-5
    otherwise.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        *,
        denoising_steps: int | None = None,
        sessions: SessionStore | None = None,
    ):
        """``denoising_steps`` replaces the policy's own where a request names none."""
        self._policy = loaded.policy
        self._processor = loaded.processor
        self._default_steps = denoising_steps or loaded.policy.sampling.default_steps
        self._tasks: OrderedDict[str | None, Tensors] = OrderedDict()
        self.sessions = sessions if sessions is not None else SessionStore()

    @property
    def contract(self) -> PolicyContract:
        return self._policy.contract

    @property
    def default_steps(self) -> int:
        """Euler steps of a request that names none."""
        return self._default_steps

    def end_session(self, session_id: str) -> bool:
        """Forget what is kept of a session; whether there was something."""
        return self.sessions.end(session_id)

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk an observation, in order.

        Rows with equal denoising steps and prefix length form a batch. Of two observations of
        one session the second is answered after the first.

        Raises:
            ContractViolationError, UnknownInstructionError, HistoryMissingError: of the first
                observation at fault; nothing was computed for the others, and no session has
                changed (but by an earlier observation of the same session in this call).
            InferenceError: the policy's actions are not finite.
        """
        for observation in observations:
            check_observation(self.contract, observation)
            self._check_prefix(observation)
        chunks: dict[int, ActionChunk] = {}
        for wave in _waves(observations):
            answers = self._infer_wave([observations[index] for index in wave])
            chunks.update(zip(wave, answers, strict=True))
        return [chunks[index] for index in range(len(observations))]

    @torch.inference_mode()
    def _infer_wave(self, observations: list[Observation]) -> list[ActionChunk]:
        """One chunk an observation, of sessions that all differ."""
        decisions, tasks = [], []
        for observation in observations:
            decision = plan(self.contract, observation, self.sessions.get(observation.session_id))
            decisions.append(decision)
            tasks.append(self._task_row(decision))
        groups: dict[tuple[int, int], list[int]] = {}
        for index, observation in enumerate(observations):
            prefix = observation.action_prefix
            key = (
                observation.denoising_steps or self._default_steps,
                0 if prefix is None else len(prefix),
            )
            groups.setdefault(key, []).append(index)
        chunks: dict[int, ActionChunk] = {}
        for (steps, _), indices in groups.items():
            answers = self._infer_group(
                [decisions[i] for i in indices], [tasks[i] for i in indices], steps
            )
            chunks.update(zip(indices, answers, strict=True))
        return [chunks[index] for index in range(len(observations))]

    def _infer_group(
        self, decisions: list[Decision], tasks: list[Tensors], steps: int
    ) -> list[ActionChunk]:
        clock = _Clock(self._policy.device)
        observations = [decision.observation for decision in decisions]
        seeds = [
            secrets.randbits(63) if observation.seed is None else observation.seed
            for observation in observations
        ]
        with clock.span("preprocess"):
            frames = self._new_frames(decisions)
            states = self._states(decisions)
            noise, prefix = self._noise(seeds), self._prefix(observations)
        with clock.span("device"):
            window, valid = self._windows(decisions, tasks, frames, states)
            context = self._policy.encode(join_rows(tasks), window, valid)
            actions = self._sample(context, noise, steps, prefix)
        with clock.span("postprocess"):
            # Before the clip to the limits, which would make an infinite action a full one.
            finite = bool(torch.isfinite(actions).all())
            robot_actions = self._processor.actions_to_robot(actions)
        if not finite:
            raise InferenceError("the policy's actions are not finite; its weights are damaged")
        for row, observation in enumerate(observations):
            if observation.action_prefix is not None:
                # Committed as they stand, without the last bit that normalising costs.
                robot_actions[row, : len(observation.action_prefix)] = observation.action_prefix
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

    def _sample(
        self, context: Tensors, noise: Tensor | None, steps: int, prefix: Tensor | None
    ) -> Tensor:
        if prefix is None:  # a policy that supports none need not know the argument
            return self._policy.sample_actions(context, noise, steps=steps)
        return self._policy.sample_actions(context, noise, steps=steps, prefix=prefix)

    def _new_frames(self, decisions: list[Decision]) -> Tensors:
        """Images of all decisions that have no row yet, ``uint8 (N, H, W, 3)``, oldest first."""
        new = [decision.images[step] for decision in decisions for step in sorted(decision.images)]
        images = {
            name: np.stack([images[name] for images in new]) for name in self.contract.camera_names
        }
        device = self._policy.device
        return {name: rows.to(device) for name, rows in self._processor.frames(images).items()}

    def _states(self, decisions: list[Decision]) -> list[dict[int, Tensor]]:
        """For each decision the normalised states ``(S,)`` by step, those that are held too."""
        device = self._policy.device
        new = [decision.states[step] for decision in decisions for step in sorted(decision.states)]
        rows = iter(self._processor.normalize_state(np.stack(new)).to(device))
        return [
            {**decision.held.states, **{step: next(rows) for step in sorted(decision.states)}}
            for decision in decisions
        ]

    def _windows(
        self,
        decisions: list[Decision],
        tasks: list[Tensors],
        new_frames: Tensors,
        states: list[dict[int, Tensor]],
    ) -> tuple[Tensors, Tensor]:
        """Embed the new frames; ``encode``'s window and valid. The sessions move on here."""
        history = self.contract.history
        of_frame = [task for d, task in zip(decisions, tasks, strict=True) for _ in d.images]
        embedded = self._policy.embed_frames(new_frames, join_rows(of_frame))
        if history.rows == 1:
            window = {name: rows.unsqueeze(1) for name, rows in embedded.items()}
            current = torch.stack([s[d.step] for s, d in zip(states, decisions, strict=True)])
            window["state"] = current.unsqueeze(1)
            valid = torch.ones(len(decisions), 1, dtype=torch.bool, device=current.device)
            frames: list[dict[int, Tensors]] = [{} for _ in decisions]
        else:
            frames = _frames_by_step(decisions, embedded)
            window, valid = pad_window(history, [d.step for d in decisions], frames, states)
        if self.contract.needs_session:
            for decision, task, kept, seen in zip(decisions, tasks, frames, states, strict=True):
                session = advance(self.contract, decision, task, kept, seen)
                self.sessions.put(decision.observation.session_id, session)
        return window, valid

    def _task_row(self, decision: Decision) -> Tensors:
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

    def _noise(self, seeds: Sequence[int]) -> Tensor | None:
        shape = self._policy.sampling.noise_shape
        if shape is None:
            return None
        # Always drawn on the CPU, so that a seed means the same chunk on every device.
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self._policy.device)

    def _prefix(self, observations: list[Observation]) -> Tensor | None:
        """Committed actions ``(B, P, D)``, normalised; all of one length, or all None."""
        rows = [o.action_prefix for o in observations if o.action_prefix is not None]
        if not rows:
            return None
        return self._processor.normalize_actions(np.stack(rows)).to(self._policy.device)

    def _check_prefix(self, observation: Observation) -> None:
        if observation.action_prefix is not None and not self._policy.sampling.supports_prefix:
            raise ContractViolationError(
                f"action_prefix: this {self._policy.family} policy samples whole chunks and "
                "takes no prefix; leave it out",
                field="action_prefix",
            )


def _waves(observations: Sequence[Observation]) -> list[list[int]]:
    """Indices in groups that hold each session once; a session's observations keep their order."""
    waves: list[list[int]] = []
    next_wave: dict[str, int] = {}
    for index, observation in enumerate(observations):
        name = observation.session_id
        wave = 0 if name is None else next_wave.get(name, 0)
        if name is not None:
            next_wave[name] = wave + 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(index)
    return waves


def _frames_by_step(decisions: list[Decision], embedded: Tensors) -> list[dict[int, Tensors]]:
    """For each decision its rows by step, those that are held and those that are new."""
    found, row = [], 0
    for decision in decisions:
        frames = dict(decision.held.frames)
        for step in sorted(decision.images):
            # Copies: a view would keep the rows of all other sessions in memory.
            frames[step] = {name: rows[row].clone() for name, rows in embedded.items()}
            row += 1
        found.append(frames)
    return found


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
