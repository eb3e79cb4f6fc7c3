"""What an evaluation asks of a simulated world: LIBERO's, or the small mobile one.

Runs, arms, results, summaries and reports are the same for both; what differs stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.eval.observer import Observer

if TYPE_CHECKING:
    from reflexarc.eval.baselines import Demonstration

MOBILE_SUITE = "mobile"
UInt8Image = npt.NDArray[np.uint8]


class Task(Protocol):
    """One task of a suite."""

    @property
    def suite(self) -> str: ...

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def instruction(self) -> str:
        """What a policy is told."""


class RawObservation(Protocol):
    """What the cameras see now."""

    @property
    def images(self) -> Mapping[str, UInt8Image]: ...


class Simulator(Protocol):
    """One task's scene; rendered only when somebody looks."""

    @property
    def task(self) -> Any:
        """A :class:`Task`."""

    @property
    def over(self) -> bool:
        """Whether nothing that comes can change how the episode ended."""

    def step(self, action: npt.NDArray[np.floating]) -> bool:
        """Execute one action; whether the task's goal holds afterwards."""

    def observe(self) -> RawObservation: ...

    def observe_state(self) -> Any:
        """Proprioception, as the observer takes it."""

    def snapshot(self) -> Any:
        """Keep what a frame of this moment is drawn from."""

    def render_snapshot(self, snapshot: Any) -> dict[str, UInt8Image]:
        """The images of that moment; only a reset may follow."""

    def close(self) -> None: ...


class Goal(Protocol):
    """A task's goal, judged in the scene at hand."""

    def holds(self, simulator: Any) -> bool: ...


class World(Protocol):
    """Everything that is particular to one world.

    Attributes:
        command: that evaluates in it.
        control_hz: of its actions.
        video_cameras: the two that a film shows side by side.
        upside_down: whether its images are, as OpenGL has them.
    """

    command: str
    control_hz: float
    video_cameras: tuple[str, str]
    upside_down: bool

    def max_steps(self, suite: str) -> int:
        """Steps that an episode may take where nobody says otherwise."""

    def select_tasks(self, suite: str, indices: Sequence[int] | None) -> Sequence[Any]:
        """The tasks with these indices. SimulatorError for one that there is not."""

    def check_contract(self, contract: PolicyContract) -> None:
        """ContractViolationError for what this world cannot give or execute."""

    def observer(self, contract: PolicyContract) -> Observer[Any]: ...

    def simulator(self, task: Any, observer: Any) -> Simulator: ...

    def start(self, simulator: Any, state: int, seed: int, wait_steps: int) -> None:
        """Reset to the task's initial state of this number."""

    def goal_in_scene(self, simulator: Any, task: Any) -> Goal | None:
        """Another task's goal; None where this scene cannot meet it, or meets it already."""

    def demonstration(self, path: Path, task: Any) -> Demonstration:
        """One of the task. DatasetError where ``path`` holds none."""

    def rest(self, last_action: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The action that stands still after the last one of a demonstration."""


def world_of(suite: str) -> World:
    """The world that a suite belongs to; its packages are imported when they are needed."""
    if suite == MOBILE_SUITE:
        from reflexarc.eval.mobile.world import MobileWorld

        return MobileWorld()
    from reflexarc.eval.libero.world import LiberoWorld

    return LiberoWorld()
