"""Policies for the tests and the benchmark of replicas; each answer says which process gave it.

serve-policy --policy benchmarks.replica_policies:Remembers --replicas 2
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.errors import HistoryMissingError
from reflexarc.contract.policy_contract import History
from reflexarc.server import libero_contract

Actions = np.ndarray[Any, Any]


def process_of(chunk: ActionChunk) -> int:
    """Which process computed a chunk: its number stands in the third action."""
    parts = enumerate(chunk.actions[2, :3])
    return sum(round(float(part) * 1000) * 1000**place for place, part in parts)


def told() -> Actions:
    """Actions that say the process, all of them within the limits of [-1, 1]."""
    actions = np.zeros((10, 7), np.float32)
    actions[2, :3] = [os.getpid() // 1000**place % 1000 / 1000 for place in range(3)]
    return actions


class WhoAnswers:
    """Takes ``milliseconds`` a row, as a device that is full; dies on the instruction ``die``."""

    def __init__(self, milliseconds: float = 0.0, image_size: int = 32) -> None:
        self.contract = libero_contract(image_size=image_size)
        self._seconds = milliseconds / 1000

    def infer(self, observation: Observation) -> Actions:
        if observation.instruction == "die":
            os._exit(1)
        time.sleep(self._seconds)
        return told()


class Remembers:
    """Sees the states of four steps, keeps them by session, and asks for those that it lacks.

    Ask it every second step: requests then bring two of the four.
    """

    def __init__(self, milliseconds: float = 0.0) -> None:
        contract = libero_contract(image_size=32)
        self.contract = contract.model_copy(update={"history": History(frames=1, states=4)})
        self._seconds = milliseconds / 1000
        self._sessions: OrderedDict[str | None, dict[int, Actions]] = OrderedDict()

    def infer(self, observation: Observation) -> Actions:
        time.sleep(self._seconds)
        step = observation.step_index or 0
        kept = {} if step == 0 else self._sessions.get(observation.session_id, {})
        for row in observation.history:
            kept[row.step_index] = row.state
        kept[step] = observation.state
        missing = [past for past in self.contract.history.state_steps(step) if past not in kept]
        if missing:
            raise HistoryMissingError(f"states of steps {missing} are missing", field="history")
        self._sessions[observation.session_id] = kept
        # What was remembered is part of the answer: the sum of the window's first numbers.
        actions = told()
        window = [kept[past][0] for past in self.contract.history.state_steps(step)]
        actions[1, 0] = float(np.clip(sum(window) / 1000, -1, 1))
        return actions

    def reset(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
