"""The arms of an evaluation as data: what acts, and what the policy is shown and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Arm = Literal["policy", "replay", "blank", "swap_images", "other_instruction", "other_goal"]
Images = Literal["own", "black", "other_task"]


@dataclass(frozen=True)
class ArmSpec:
    """What distinguishes an arm. Scene, initial state and proprioception are always the real ones.

    Attributes:
        title: of its column in a table, and of its videos.
        asks_policy: False for an arm that only plays recorded actions.
        images: what the policy is shown: its own cameras, black, or frames of another task's
            demonstration.
        other_instruction: whether the policy is told another task's instruction.
        other_goal: whether it is shown the goal image of another task.
    """

    title: str
    asks_policy: bool = True
    images: Images = "own"
    other_instruction: bool = False
    other_goal: bool = False

    @property
    def needs_demonstrations(self) -> bool:
        return not self.asks_policy or self.images == "other_task"

    @property
    def involves_other_task(self) -> bool:
        return self.other_instruction or self.other_goal or self.images == "other_task"


ARMS: Mapping[Arm, ArmSpec] = {
    "policy": ArmSpec("policy"),
    "replay": ArmSpec("blind replay", asks_policy=False),
    "blank": ArmSpec("blank images", images="black"),
    "swap_images": ArmSpec("swapped images", images="other_task"),
    "other_instruction": ArmSpec("other instruction", other_instruction=True),
    "other_goal": ArmSpec("other goal", other_goal=True),
}
BASELINES: tuple[Arm, ...] = tuple(arm for arm in ARMS if arm != "policy")
