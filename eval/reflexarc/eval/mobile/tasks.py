"""The world's tasks: one a target, told apart by colour and shape in the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reflexarc.contract.errors import SimulatorError

SUITE = "mobile"
CONTROL_HZ = 5.0
MAX_STEPS = 80
SPEED_LIMIT = 0.6
"""Metres a second, of each of the two velocities."""


@dataclass(frozen=True)
class Target:
    """A thing to drive to: how it is called, and how it looks."""

    name: str
    shape: Literal["box", "cylinder", "sphere", "post"]
    rgb: tuple[float, float, float]


TARGETS = (
    Target("red box", "box", (0.85, 0.12, 0.12)),
    Target("green cylinder", "cylinder", (0.12, 0.65, 0.22)),
    Target("blue ball", "sphere", (0.12, 0.30, 0.90)),
    Target("yellow post", "post", (0.95, 0.80, 0.10)),
)


@dataclass(frozen=True)
class MobileTask:
    """``index`` is that of its target in :data:`TARGETS`."""

    suite: str
    index: int
    name: str
    instruction: str


def load_tasks() -> list[MobileTask]:
    return [
        MobileTask(SUITE, index, f"navigate_to_the_{target.name.replace(' ', '_')}",
                   f"navigate to the {target.name}")
        for index, target in enumerate(TARGETS)
    ]  # fmt: skip


def select_tasks(indices: Sequence[int] | None) -> list[MobileTask]:
    """The tasks with these indices, or all of them. SimulatorError for an index out of range."""
    tasks = load_tasks()
    if indices is None:
        return tasks
    for index in indices:
        if not 0 <= index < len(tasks):
            raise SimulatorError(f"the mobile world has tasks 0 to {len(tasks) - 1}, not {index}")
    return [tasks[index] for index in dict.fromkeys(indices)]
