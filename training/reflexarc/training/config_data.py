"""What a recipe says of its data: which demonstrations, and what of them goes where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from reflexarc.contract.policy_contract import ActionKind
from reflexarc.data.dataset import Labels
from reflexarc.training.config_base import FeatureDtype, Fraction, Positive, RecipeModel

Names: TypeAlias = dict[str, str] | tuple[str, ...] | None
"""The contract's name to the dataset's, or names that both use; None takes everything."""


class SourceConfig(RecipeModel):
    """One part of a mixture: a LeRobot folder, or LIBERO's files.

    ``weight`` is how often an epoch sees each of its samples: 2 twice, 0.5 half of them now and
    the others in the next epoch. ``episodes`` is how many there must be: a folder with another
    number is another dataset, and refused. ``state``, ``action`` and ``cameras`` take the place of
    those of ``data``.
    """

    path: Path
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    episodes: Positive | None = None
    state: Names = None
    action: Names = None
    cameras: Names = None


class GoalConfig(RecipeModel):
    """Where goal images come from, for a policy that is shown one (``contract.needs_goal_image``).

    A goal is the last image of a demonstration. ``source`` says of which: of the ``episode``
    itself; of one of the ``task`` (``demonstration`` such as ``demo_0``, or the first that is
    trained on), which is then the goal of all its episodes; ``any`` of the task that is trained on,
    drawn once a sample.
    """

    source: Literal["episode", "task", "any"] = "episode"
    demonstration: str | None = None

    @model_validator(mode="after")
    def _a_demonstration_is_of_the_task(self) -> GoalConfig:
        if self.demonstration is not None and self.source != "task":
            raise ValueError("demonstration names the goal of a task: give source: task")
        return self


class GripperConfig(RecipeModel):
    """Which dimension of a LeRobot action a classifier commands, and its commands."""

    name: str
    open: float
    closed: float


class DataConfig(RecipeModel):
    """Which demonstrations, and which of them are held out.

    ``paths`` are files or folders of LIBERO's HDF5, or LeRobot folders; empty means
    ``datasets/<suite>``. ``sources`` says more of each, in the place of ``paths``. ``tasks`` are
    task names or shell patterns (``*soup*``); empty means all. ``validation_fraction`` of each
    task's episodes are held out, drawn with ``split_seed``: whole episodes, never frames of one
    episode; with ``split_by: dataset``, of all episodes together, for data in which hardly two
    share a task. ``alignment`` says whether observations stand before or after their action, in
    files that do not show it. ``goal`` says where goal images come from. ``labels`` says which
    actions the policy learns, and so which the statistics are of: those that were executed, or
    their mean over the noise injected while collecting. ``feature_dtype`` is how the features of
    frames are stored (``fp16``, ``bf16``, ``fp32``). With ``feature_memory_mib`` they are read from
    the disk, and those read last are kept in so much memory; without it, all where there is room.

    Of a mobile robot's episodes: ``pattern`` of file names, ``control_hz`` where they do not say,
    ``fallback_instruction`` of those that hold none. ``train_fraction`` says
    ``validation_fraction`` the other way round.

    Of LeRobot data: ``state`` and ``action`` are parts by GR00T's names (``left_arm``), features or
    columns of them (``action[0:7]``), in order; ``cameras`` likewise. ``action_kind`` says whether
    actions are targets, ``gripper`` which of their dimensions is one. Every ``frame_stride``-th
    frame is used; one may lie ``timestamp_tolerance`` seconds from its row's timestamp.
    """

    suite: str = "libero_object"
    paths: tuple[Path, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    tasks: tuple[str, ...] = ()
    episodes_per_task: Positive | None = None
    validation_fraction: Fraction = 0.1
    split_seed: int = 0
    split_by: Literal["task", "dataset"] = "task"
    alignment: Literal["before_action", "after_action"] | None = None
    goal: GoalConfig = GoalConfig()
    labels: Labels = "executed"
    feature_dtype: FeatureDtype = "fp16"
    state: Names = None
    action: Names = None
    cameras: Names = None
    action_kind: ActionKind = "position"
    gripper: GripperConfig | None = None
    feature_memory_mib: Positive | None = None
    frame_stride: Positive = 1
    timestamp_tolerance: Annotated[float, Field(gt=0, lt=10)] = 1e-3
    pattern: str | None = Field(default=None, min_length=1)
    control_hz: Annotated[float, Field(gt=0, le=1000)] | None = None
    fallback_instruction: str | None = Field(default=None, min_length=1)
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_split(cls, values: Any) -> Any:
        """``validation_fraction`` follows from ``train_fraction`` where that is given."""
        if not isinstance(values, Mapping) or not isinstance(
            values.get("train_fraction"), int | float
        ):
            return values
        held_out = round(1.0 - values["train_fraction"], 12)
        given = values.get("validation_fraction", held_out)
        if given != held_out:
            raise ValueError(
                f"train_fraction {values['train_fraction']} leaves {held_out} to hold out, "
                f"validation_fraction is {given}: give one of them"
            )
        return {**values, "validation_fraction": held_out}

    @model_validator(mode="after")
    def _one_of_paths_and_sources(self) -> DataConfig:
        if self.paths and self.sources:
            raise ValueError(
                "give paths or sources, not both; --data replaces paths, clear the other with "
                "--set data.sources=[]"
            )
        return self
