"""From checked observations to action chunks: what the server's worker thread calls."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from reflexarc.contract import (
    ActionChunk,
    Observation,
    PolicyContract,
    ReflexarcError,
    check_observation,
)
from reflexarc.contract.errors import InferenceError
from reflexarc.contract.observation_check import refuse_unsupported
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.clock import Clock
from reflexarc.policy.decision_inputs import DecisionInputs
from reflexarc.policy.decisions import CompileMode, make_decisions
from reflexarc.policy.interface import Tensors
from reflexarc.policy.sessions import (
    Decision,
    SessionStore,
    advance,
    frames_by_step,
    plan,
    waves,
)
from reflexarc.policy.windows import join_rows, pad_window

# Frames that are embedded in one pass: the whole window of a few decisions, but no more, because
# activations of an image encoder take some megabytes a frame.
_FRAMES_AT_ONCE = 64

Outcome: TypeAlias = tuple[int, ActionChunk | ReflexarcError]
"""Place of an observation in a call, and what came of it."""


@dataclass
class _Row:
    """One decision on its way: its place in the call, its task's row, its window once embedded."""

    index: int
    decision: Decision
    task: Tensors
    frames: Mapping[int, Tensors] = field(default_factory=dict)
    states: Mapping[int, Tensor] = field(default_factory=dict)


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
        compile_mode: CompileMode = "auto",
    ):
        """``denoising_steps`` replaces the policy's own where a request names none.

        Raises ConfigError for a ``compile_mode`` that the policy's device has not.
        """
        self._policy = loaded.policy
        self._processor = loaded.processor
        self._inputs = DecisionInputs(loaded.policy, loaded.processor)
        self._decisions = make_decisions(loaded.policy, compile_mode)
        self._default_steps = denoising_steps or loaded.policy.sampling.default_steps
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

        All new frames are embedded as one batch; rows with equal denoising steps and prefix
        length are then sampled as one. Of two observations of one session the second is answered
        after the first.

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
        for wave in waves(observations):
            for part in self._decide([self._plan(index, observations[index]) for index in wave]):
                chunks.update((index, _raised(outcome)) for index, outcome in part)
        return [chunks[index] for index in range(len(observations))]

    def infer_in_parts(self, observations: Sequence[Observation]) -> Iterator[list[Outcome]]:
        """The same for checked observations, in parts as their actions are sampled.

        Yields lists of ``(index, chunk)``, or ``(index, error)`` for an observation that cannot
        be answered, which harms no other.
        """
        for wave in waves(observations):
            planned, refused = [], list[Outcome]()
            for index in wave:
                try:
                    planned.append(self._plan(index, observations[index]))
                except ReflexarcError as error:
                    refused.append((index, error))
            if refused:
                yield refused
            if planned:
                yield from self._decide(planned)

    def _plan(self, index: int, observation: Observation) -> _Row:
        """What a decision needs; raises what is wrong with it, and changes no session."""
        decision = plan(self.contract, observation, self.sessions.get(observation.session_id))
        with torch.inference_mode():
            return _Row(index, decision, self._inputs.task_row(decision))

    def _decide(self, rows: list[_Row]) -> Iterator[list[Outcome]]:
        """Embed the frames of all, then sample group by group."""
        clock = Clock(self._policy.device)
        with torch.inference_mode():
            self._embed(rows, clock)
        groups: dict[tuple[int, int, int], list[_Row]] = {}
        for row in rows:
            observation = row.decision.observation
            steps = observation.denoising_steps or self._default_steps
            given = [
                0 if actions is None else len(actions)
                for actions in (observation.action_prefix, observation.action_guide)
            ]
            groups.setdefault((steps, given[0], given[1]), []).append(row)
        for (steps, _, _), group in groups.items():
            with torch.inference_mode():
                part = self._sample_group(group, steps, clock.copy())
            yield part

    def _embed(self, rows: list[_Row], clock: Clock) -> None:
        """Frames and states of all rows, in place. The sessions move on here."""
        decisions = [row.decision for row in rows]
        with clock.span("preprocess_ms"):
            new_frames = self._inputs.new_frames(decisions)
            states = self._inputs.states(decisions)
        with clock.span("device_ms"):
            embedded = self._embed_frames(rows, new_frames)
            frames = frames_by_step(decisions, embedded, keep=self.contract.needs_session)
        for row, seen, kept in zip(rows, states, frames, strict=True):
            row.states, row.frames = seen, kept
            if self.contract.needs_session:
                session = advance(self.contract, row.decision, row.task, kept, seen)
                self.sessions.put(row.decision.observation.session_id, session)

    def _embed_frames(self, rows: list[_Row], new_frames: Tensors) -> Tensors:
        """Rows ``(N, ...)`` of all new frames; long histories in several passes."""
        task = join_rows([row.task for row in rows for _ in row.decision.images])
        count = len(next(iter(new_frames.values())))
        parts = []
        for start in range(0, count, _FRAMES_AT_ONCE):
            part = slice(start, start + _FRAMES_AT_ONCE)
            images = {name: frames[part] for name, frames in new_frames.items()}
            parts.append(
                self._decisions.embed_frames(images, {name: r[part] for name, r in task.items()})
            )
        return parts[0] if len(parts) == 1 else join_rows(parts)

    def _sample_group(self, rows: list[_Row], steps: int, clock: Clock) -> list[Outcome]:
        """Chunks of decisions with equal denoising steps and prefix length."""
        observations = [row.decision.observation for row in rows]
        seeds = [
            secrets.randbits(63) if observation.seed is None else observation.seed
            for observation in observations
        ]
        with clock.span("preprocess_ms"):
            given = {
                "noise": self._inputs.noise(seeds),
                "prefix": self._inputs.normalized([o.action_prefix for o in observations]),
                "guide": self._inputs.normalized([o.action_guide for o in observations]),
            }
        with clock.span("device_ms"):
            window, valid = pad_window(
                self.contract.history,
                [row.decision.step for row in rows],
                [row.frames for row in rows],
                [row.states for row in rows],
            )
            actions = self._decisions.sample(
                join_rows([row.task for row in rows]),
                window,
                valid,
                steps,
                {name: rows for name, rows in given.items() if rows is not None},
            )
        with clock.span("postprocess_ms"):
            # Before the clip to the limits, which would make an infinite action a full one.
            finite = torch.isfinite(actions).flatten(1).all(dim=1).tolist()
            robot_actions = self._processor.actions_to_robot(actions)
        part: list[Outcome] = []
        for place, (row, observation) in enumerate(zip(rows, observations, strict=True)):
            if not finite[place]:
                part.append((row.index, _not_finite()))
                continue
            chunk = robot_actions[place]
            if observation.action_prefix is not None:
                # Committed as they stand, without the last bit that normalising costs.
                chunk[: len(observation.action_prefix)] = observation.action_prefix
            part.append(
                (
                    row.index,
                    ActionChunk(
                        actions=chunk,
                        seed=seeds[place],
                        request_id=observation.request_id,
                        session_id=observation.session_id,
                        timing=dict(clock.milliseconds),
                    ),
                )
            )
        return part

    def _check_prefix(self, observation: Observation) -> None:
        sampling = self._policy.sampling
        refuse_unsupported(
            observation, prefix=sampling.supports_prefix, guide=sampling.supports_guide
        )


def _raised(outcome: ActionChunk | ReflexarcError) -> ActionChunk:
    if isinstance(outcome, ReflexarcError):
        raise outcome
    return outcome


def _not_finite() -> InferenceError:
    return InferenceError("the policy's actions are not finite; its weights are damaged")
