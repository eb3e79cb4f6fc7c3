"""The mobile world as one of those that an evaluation runs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import DatasetError
from reflexarc.eval.mobile.observation import MobileObserver, check_mobile_contract
from reflexarc.eval.mobile.scene import draw_scene
from reflexarc.eval.mobile.tasks import CONTROL_HZ, MAX_STEPS, MobileTask, select_tasks

if TYPE_CHECKING:
    from reflexarc.eval.baselines import Demonstration
    from reflexarc.eval.mobile.simulator import MobileSimulator


@dataclass(frozen=True)
class TargetReached:
    """The goal of a task: the base stands at its target."""

    target: int

    def holds(self, simulator: MobileSimulator) -> bool:
        return simulator.reached == self.target


class MobileWorld:
    """See :class:`reflexarc.eval.worlds.World`."""

    command = "reflexarc eval mobile"
    control_hz = CONTROL_HZ
    video_cameras = ("front", "above")
    upside_down = False

    def max_steps(self, suite: str) -> int:
        return MAX_STEPS

    def select_tasks(self, suite: str, indices: Sequence[int] | None) -> list[MobileTask]:
        return select_tasks(indices)

    def check_contract(self, contract: PolicyContract) -> None:
        check_mobile_contract(contract)

    def observer(self, contract: PolicyContract) -> MobileObserver:
        return MobileObserver(contract)

    def simulator(self, task: MobileTask, observer: MobileObserver) -> MobileSimulator:
        from reflexarc.eval.mobile.simulator import MobileSimulator

        return MobileSimulator(task, image_size=observer.image_size)

    def start(self, simulator: MobileSimulator, state: int, seed: int, wait_steps: int) -> None:
        """A scene that no collection draws; nothing has to settle."""
        simulator.reset(draw_scene("evaluated", simulator.task.index, state, seed))

    def goal_in_scene(self, simulator: MobileSimulator, task: MobileTask) -> TargetReached:
        """Every scene has every target."""
        return TargetReached(task.index)

    def demonstration(self, path: Path, task: MobileTask) -> Demonstration:
        from reflexarc.data.mobile.dataset import open_mobile
        from reflexarc.eval.baselines import Demonstration

        for episode in open_mobile([path], control_hz=CONTROL_HZ).episodes:
            if episode.instruction == task.instruction:
                return Demonstration(episode.actions(), episode.path.name, episode)
        raise DatasetError(
            f"{path} holds no episode of {task.instruction!r}; collect some with: reflexarc data "
            "collect-mobile"
        )

    def rest(self, last_action: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        return np.zeros(len(last_action))
