"""LIBERO as one of the worlds that an evaluation runs in. Imports the simulator when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import libero_action

if TYPE_CHECKING:
    from reflexarc.eval.baselines import Demonstration
    from reflexarc.eval.libero.goals import TaskGoal
    from reflexarc.eval.libero.observation import LiberoObserver
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import LiberoTask


class LiberoWorld:
    """See :class:`reflexarc.eval.worlds.World`."""

    command = "reflexarc eval libero"
    control_hz = 20.0
    video_cameras = ("agentview", "eye_in_hand")
    upside_down = True

    def max_steps(self, suite: str) -> int:
        from reflexarc.eval.libero.suites import max_steps

        return max_steps(suite)

    def select_tasks(self, suite: str, indices: Sequence[int] | None) -> list[LiberoTask]:
        from reflexarc.eval.libero.suites import select_tasks

        return select_tasks(suite, indices)

    def check_contract(self, contract: PolicyContract) -> None:
        from reflexarc.eval.libero.observation import check_libero_contract

        check_libero_contract(contract)

    def observer(self, contract: PolicyContract) -> LiberoObserver:
        from reflexarc.eval.libero.observation import LiberoObserver

        return LiberoObserver(contract)

    def simulator(self, task: LiberoTask, observer: LiberoObserver) -> LiberoSimulator:
        from reflexarc.eval.libero.simulator import LiberoSimulator

        return LiberoSimulator(task, image_size=observer.image_size)

    def start(self, simulator: LiberoSimulator, state: int, seed: int, wait_steps: int) -> None:
        from reflexarc.eval.libero.suites import load_init_states

        states = load_init_states(simulator.task)
        simulator.reset_to_state(states[state], seed=seed, wait_steps=wait_steps)

    def goal_in_scene(self, simulator: LiberoSimulator, task: LiberoTask) -> TaskGoal | None:
        from reflexarc.eval.libero.goals import goal_in_scene

        return goal_in_scene(simulator, task)

    def demonstration(self, path: Path, task: LiberoTask) -> Demonstration:
        from reflexarc.eval.baselines import load_demonstration

        return load_demonstration(path, task.name)

    def rest(self, last_action: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """No motion, with the last gripper command."""
        still = np.zeros(len(last_action))
        gripper = libero_action(1).gripper
        if gripper is not None:
            still[gripper.index] = last_action[gripper.index]
        return still
