"""Where an episode's actions come from: a served policy, or the replay of a demonstration."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.client import ChunkExecutor
from reflexarc.contract import Observation
from reflexarc.contract.errors import DatasetError
from reflexarc.eval.libero.world import LiberoWorld
from reflexarc.eval.shown_images import ShownImages
from reflexarc.eval.videos import Film

if TYPE_CHECKING:
    from reflexarc.data.dataset import DatasetEpisode
    from reflexarc.eval.observer import Observer
    from reflexarc.eval.worlds import Simulator

Action = npt.NDArray[np.floating]


class ActionSource(Protocol):
    """Gives one episode's actions in order."""

    def next_action(self, step: int) -> Action:
        """The action ``(D,)`` to execute at environment step ``step``."""

    @property
    def latencies_ms(self) -> Sequence[float]:
        """Round trip of every request so far."""

    @property
    def held_steps(self) -> int:
        """Steps so far at which the robot stood still for want of a chunk."""


def request_seed(seed: int, task: int, state: int, chunk: int) -> int:
    """Seed of one request, in ``[0, 2**63)``: equal for equal run, task, state and chunk.

    The arm is left out, so that the policy and its blinded twin draw the same noise.
    """
    words = np.random.SeedSequence([seed, task, state, chunk]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class PolicyActions:
    """Actions of a served policy, as an executor asks for them.

    ``images`` and ``instruction`` are what the arm shows and tells; the robot's state is real.
    """

    def __init__(
        self,
        executor: ChunkExecutor,
        observer: Observer[Any],
        simulator: Simulator,
        *,
        images: ShownImages,
        instruction: str,
        seeds: tuple[int, int, int],
        goal: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    ) -> None:
        """``seeds`` are the run's seed, the task's index and the state's index.

        ``goal`` is the goal image by camera; the executor sends it once an episode.
        """
        self._executor = executor
        self._observer, self._simulator = observer, simulator
        self._images, self._instruction, self._seeds = images, instruction, seeds
        self._goal = goal
        # A stream of its own, so that a server never mixes two episodes' histories.
        self._session = uuid.uuid4().hex

    @property
    def latencies_ms(self) -> Sequence[float]:
        return self._executor.latencies_ms

    @property
    def held_steps(self) -> int:
        return self._executor.held

    def next_action(self, step: int) -> Action:
        return self._executor.next_action(lambda: self._observe(step), self._observe_state)

    def _observe_state(self) -> npt.NDArray[np.float32]:
        return self._observer.state(self._simulator.observe_state())

    def _observe(self, step: int) -> Observation:
        # The executor may observe without asking, to feed a history: requests are counted there.
        return self._observer.observation(
            self._images(step),
            self._simulator.observe_state(),
            self._instruction,
            session_id=self._session,
            seed=request_seed(*self._seeds, self._executor.chunks),
            step_index=step,
            goal_image=self._goal,
        )


class FilmedActions:
    """Another source's actions, filmed at regular steps, whenever that source looks."""

    def __init__(self, source: ActionSource, simulator: Simulator, film: Film) -> None:
        self._source, self._simulator, self._film = source, simulator, film

    @property
    def latencies_ms(self) -> Sequence[float]:
        return self._source.latencies_ms

    @property
    def held_steps(self) -> int:
        return self._source.held_steps

    def next_action(self, step: int) -> Action:
        self._film.snap(step, self._simulator)
        return self._source.next_action(step)


@dataclass(frozen=True)
class Demonstration:
    """One demonstration: its actions ``(T, D)``, where they come from, and its file."""

    actions: npt.NDArray[np.float64]
    source: str
    episode: DatasetEpisode

    @property
    def sha256(self) -> str:
        """Hash of the actions."""
        return hashlib.sha256(np.ascontiguousarray(self.actions).tobytes()).hexdigest()


def load_demonstration(path: Path, task_name: str, demo: str | None = None) -> Demonstration:
    """A task's demonstration of this name, or its first, in a file or folder of LIBERO HDF5 files.

    Raises DatasetError naming the task and the path when there is none.
    """
    from reflexarc.data.libero_hdf5 import open_libero

    if not path.exists():
        raise DatasetError(f"{path} does not exist; --demonstrations takes HDF5 files of LIBERO")
    own_file = path / f"{task_name}_demo.hdf5"
    dataset = open_libero([own_file if own_file.is_file() else path])
    for episode in dataset.episodes:
        if episode.task_name == task_name and demo in (None, episode.demo):
            source = f"{episode.path.name}/{episode.demo}"
            return Demonstration(episode.actions(), source, episode)
    named = "" if demo is None else f" named {demo}"
    raise DatasetError(
        f"{path} holds no demonstration of {task_name}{named}; expected {own_file.name}"
    )


class ReplayActions:
    """A demonstration's actions, blind: nothing is observed.

    After its last action ``hold`` (LIBERO's where it is left out) stands still until the episode
    ends, which gives objects time to settle.
    """

    latencies_ms: Sequence[float] = ()
    held_steps = 0

    def __init__(
        self,
        demonstration: Demonstration,
        simulator: Simulator,
        *,
        replan_steps: int,
        film: Film,
        hold: Action | None = None,
    ) -> None:
        self._actions, self._simulator = demonstration.actions, simulator
        self._replan_steps, self._film = replan_steps, film
        self._hold = LiberoWorld().rest(self._actions[-1]) if hold is None else hold

    def next_action(self, step: int) -> Action:
        if step % self._replan_steps == 0:
            self._film.snap(step, self._simulator)
        return self._actions[step] if step < len(self._actions) else self._hold
