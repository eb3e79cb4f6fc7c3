"""What a server keeps of an episode between requests: the task's row, and rows of past steps.

Features are kept, not pixels, and only those that later windows can reach. Nothing here is shared
between sessions.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reflexarc.contract import Observation, PolicyContract
from reflexarc.contract.errors import HistoryMissingError
from reflexarc.policy.interface import Tensors

MAX_SESSIONS = 64
IDLE_SECONDS = 600.0
_STEPS_NAMED = 16

Images = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Session:
    """One episode so far.

    Attributes:
        step: of the latest decision; -1 before the first.
        instruction: what the task's row was made of.
        task: one row ``(1, ...)`` of ``embed_task``, None where it has to be made.
        frames: environment step to one row of ``embed_frames``, without the first axis.
        states: environment step to a normalised state ``float32 (S,)``.
    """

    step: int = -1
    instruction: str | None = None
    task: Tensors | None = None
    frames: Mapping[int, Tensors] = field(default_factory=dict)
    states: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """One observation together with what its session holds of use.

    Attributes:
        step: of the decision.
        held: rows of earlier requests that are still true.
        images: environment step to the images to embed now, the decision's own among them.
        states: environment step to the states ``(S,)`` that came now, not normalised.
    """

    observation: Observation
    step: int
    held: Session
    images: Mapping[int, Images]
    states: Mapping[int, npt.NDArray[np.floating]]


def plan(contract: PolicyContract, observation: Observation, session: Session | None) -> Decision:
    """What has to be embedded for a decision, and what is there already. Changes nothing.

    What an observation brings replaces what the session holds of the same step: a chunk depends
    on its request first.

    Raises HistoryMissingError naming the steps that neither of them holds.
    """
    history, step = contract.history, observation.step_index or 0
    held = _still_true(observation, session, step)
    rows = [row for row in observation.history if row.step_index < step]
    images: dict[int, Images] = {
        row.step_index: row.images
        for row in rows
        if row.images is not None and row.step_index >= step - (history.frames - 1) * history.stride
    }
    states = {
        row.step_index: row.state
        for row in rows
        if row.step_index >= step - (history.states - 1) * history.stride
    }
    images[step], states[step] = observation.images, observation.state
    frames_missing = set(history.frame_steps(step)) - images.keys() - held.frames.keys()
    states_missing = set(history.state_steps(step)) - states.keys() - held.states.keys()
    goal_missing = (
        contract.needs_goal_image and held.task is None and observation.goal_image is None
    )
    if frames_missing or states_missing or goal_missing:
        raise _missing(observation, frames_missing, states_missing, goal_missing)
    return Decision(observation, step, held, images, states)


def _still_true(observation: Observation, session: Session | None, step: int) -> Session:
    if session is None or step == 0 or step < session.step:
        return Session()
    if observation.instruction == session.instruction and observation.goal_image is None:
        return session
    # Frames may have been embedded in the light of the task; states were not.
    return Session(step=session.step, states=session.states)


def advance(
    contract: PolicyContract,
    decision: Decision,
    task: Tensors,
    frames: Mapping[int, Tensors],
    states: Mapping[int, Tensor],
) -> Session:
    """The session after a decision, holding no row that no later window can reach."""
    history, step = contract.history, decision.step
    oldest_frame = step - (history.frames - 1) * history.stride
    oldest_state = step - (history.states - 1) * history.stride
    return Session(
        step=step,
        instruction=decision.observation.instruction,
        task=task,
        frames={s: row for s, row in frames.items() if s >= oldest_frame},
        states={s: row for s, row in states.items() if s >= oldest_state},
    )


def waves(observations: Sequence[Observation]) -> list[list[int]]:
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


def frames_by_step(
    decisions: list[Decision], embedded: Tensors, *, keep: bool
) -> list[dict[int, Tensors]]:
    """For each decision its rows by step, those that are held and those that are new."""
    found, row = [], 0
    for decision in decisions:
        frames = dict(decision.held.frames)
        for step in sorted(decision.images):
            new = {name: rows[row] for name, rows in embedded.items()}
            # Copies: a view would keep the rows of all other sessions in memory.
            frames[step] = {name: tensor.clone() for name, tensor in new.items()} if keep else new
            row += 1
        found.append(frames)
    return found


class SessionStore:
    """Sessions by name: the least recently used leave first, and those that are idle too long."""

    def __init__(
        self,
        *,
        max_sessions: int = MAX_SESSIONS,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions, self._idle_seconds, self._clock = max_sessions, idle_seconds, clock
        self._sessions: OrderedDict[str, tuple[float, Session]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str | None) -> Session | None:
        """The session, or None where it is unknown or was idle for too long."""
        self._expire()
        return self._sessions[name][1] if name is not None and name in self._sessions else None

    def put(self, name: str | None, session: Session) -> None:
        """Keep a session; without a name nothing is kept."""
        if name is None:
            return
        self._sessions[name] = (self._clock(), session)
        self._sessions.move_to_end(name)
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def end(self, name: str) -> bool:
        """Forget a session; whether there was one."""
        return self._sessions.pop(name, None) is not None

    def _expire(self) -> None:
        oldest = self._clock() - self._idle_seconds
        while self._sessions and next(iter(self._sessions.values()))[0] < oldest:
            self._sessions.popitem(last=False)


def _missing(
    observation: Observation, frames: set[int], states: set[int], goal: bool
) -> HistoryMissingError:
    lacks = [
        *([f"images of the steps {_listed(frames)}"] if frames else []),
        *([f"states of the steps {_listed(states)}"] if states else []),
        *(["the goal image"] if goal else []),
    ]
    where = "the session" if observation.session_id is not None else "a request without session_id"
    return HistoryMissingError(
        f"{where} lacks {' and '.join(lacks)}, which the decision at step "
        f"{observation.step_index} sees; send them with this observation, in 'history'"
        + (" and 'goal_image'" if goal else ""),
        field="history" if frames or states else "goal_image",
    )


def _listed(steps: set[int]) -> str:
    ordered = sorted(steps)
    more = f" and {len(ordered) - _STEPS_NAMED} more" if len(ordered) > _STEPS_NAMED else ""
    return ", ".join(map(str, ordered[:_STEPS_NAMED])) + more
