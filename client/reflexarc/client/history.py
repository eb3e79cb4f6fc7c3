"""What an executor keeps of an episode for a policy that sees history, and what it sends of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import HistoryRow, Observation, PolicyContract


class HistoryRecorder:
    """Rows of one episode, asked for every ``replan_steps`` steps; 1 where it may be any step.

    A request carries the rows recorded since the one before; the whole window is kept for a
    server that has lost its session. Rows may be recorded while a request is under way.
    """

    def __init__(self, contract: PolicyContract, replan_steps: int) -> None:
        self._history, self._replan_steps = contract.history, replan_steps
        self._kept: list[HistoryRow] = []
        self._unsent: list[HistoryRow] = []
        self._goal: Mapping[str, npt.NDArray[np.uint8]] | None = None

    def needs_images(self, steps_after_request: int) -> bool:
        """Whether a later request sees the frame at so many steps after the latest request."""
        return self._is_seen(steps_after_request, self._history.frames)

    def needs_state(self, steps_after_request: int) -> bool:
        """The same for the state."""
        return self._is_seen(steps_after_request, self._history.states)

    def _is_seen(self, steps_after_request: int, length: int) -> bool:
        stride = self._history.stride
        return any(
            (steps_after_request + past * stride) % self._replan_steps == 0
            for past in range(1, length)
        )

    def record(self, step: int, state: npt.NDArray[Any], images: Mapping[str, Any] | None) -> None:
        """Keep what was seen at a step between two requests."""
        self._unsent.append(HistoryRow(step_index=step, state=state, images=images))
        # A server that is away for long must not fill the memory: no window reaches further.
        oldest = step - self._history.span
        self._unsent = [row for row in self._unsent if row.step_index >= oldest]

    def request(self, observation: Observation) -> Observation:
        """The observation with all that the latest request could not bring."""
        goal = None if self._same_goal(observation) else observation.goal_image
        oldest = (observation.step_index or 0) - self._history.span
        rows = tuple(row for row in self._unsent if row.step_index >= oldest)
        return replace(observation, history=rows, goal_image=goal)

    def whole(self, observation: Observation) -> Observation:
        """The observation with every row that this or a later window reaches."""
        step = observation.step_index or 0
        oldest_frame = step - (self._history.frames - 1) * self._history.stride
        rows = [
            row if row.step_index >= oldest_frame else replace(row, images=None)
            for row in (*self._kept, *self._unsent)
            if step - self._history.span <= row.step_index < step
        ]
        goal = observation.goal_image if observation.goal_image is not None else self._goal
        return replace(observation, history=tuple(rows), goal_image=goal)

    def answered(self, observation: Observation) -> None:
        """The server has what ``observation`` and the rows before it hold."""
        step = observation.step_index or 0
        if observation.goal_image is not None:
            self._goal = observation.goal_image
        if self._history.rows == 1:
            return
        sent = [row for row in self._unsent if row.step_index < step]
        rows = [*self._kept, *sent, self._row(observation)]
        self._kept = [row for row in rows if row.step_index >= step - self._history.span]
        self._unsent = [row for row in self._unsent if row.step_index > step]

    def unanswered(self, observation: Observation) -> None:
        """Nobody knows whether the server has what ``observation`` holds: send it again."""
        if self._history.rows > 1:
            rows = [*self._unsent, self._row(observation)]
            self._unsent = sorted(rows, key=lambda row: row.step_index)

    def _row(self, observation: Observation) -> HistoryRow:
        images = observation.images if self._history.frames > 1 else None
        return HistoryRow(observation.step_index or 0, observation.state, images)

    def _same_goal(self, observation: Observation) -> bool:
        new, sent = observation.goal_image, self._goal
        if new is None or sent is None:
            return new is sent
        return new.keys() == sent.keys() and all(np.array_equal(new[n], sent[n]) for n in new)
