"""From a recipe to everything that a run needs: episodes, contract, statistics, policy."""

from __future__ import annotations

import fnmatch
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from reflexarc.contract import Camera, NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action
from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import LiberoDataset, open_libero
from reflexarc.data.statistics import compute_statistics
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.policy.processing import Processor
from reflexarc.training.config import DataConfig, Recipe
from reflexarc.training.families import build_policy
from reflexarc.training.feature_store.dtypes import FeatureRows
from reflexarc.training.feature_store.keys import FeatureKey, feature_key
from reflexarc.training.feature_store.store import FrameFeatures, frame_features
from reflexarc.training.freezing import freeze_modules, module_at
from reflexarc.training.objective import Objective
from reflexarc.training.objectives.making import make_objective
from reflexarc.training.samples import (
    BatchSource,
    SampleTable,
    build_samples,
    derived_seed,
    split_episodes,
)
from reflexarc.training.starting_weights import check_fits, load_start, origin_of


@dataclass(frozen=True)
class Preparation:
    """A run before its first step; nothing has been written yet.

    Attributes:
        train_episodes, held_out_episodes: a seeded split by episode.
        task: rows of ``embed_task``, one an instruction, on the CPU.
        task_rows: instruction to its row in ``task``.
        origin: the checkpoint that the weights come from, None where they are random.
    """

    recipe: Recipe
    dataset_fingerprint: str
    train_episodes: list[Episode]
    held_out_episodes: list[Episode]
    statistics: NormalizationStatistics
    policy: Policy
    objective: Objective
    processor: Processor
    task: Tensors
    task_rows: dict[str, int]
    origin: dict[str, Any] | None = None

    @property
    def contract(self) -> PolicyContract:
        return self.policy.contract

    @property
    def episodes(self) -> list[Episode]:
        return self.train_episodes + self.held_out_episodes

    @cached_property
    def feature_key(self) -> FeatureKey:
        """Key of the frames' features in a feature store."""
        return feature_key(
            self.policy, self.episodes, self.dataset_fingerprint, self.recipe.data.feature_dtype
        )

    def features(self, cache: Path, *, progress: bool = True) -> FrameFeatures:
        """Features of every frame, from the store in ``cache`` or computed into it."""
        return frame_features(
            self.policy, self.episodes, self.feature_key, cache, progress=progress
        )

    def sources(
        self, features: Mapping[str, FeatureRows], first_rows: Sequence[int]
    ) -> tuple[BatchSource, BatchSource | None]:
        """Batches of the training episodes, and of the held-out ones where there are any.

        Args:
            features: rows of all ``episodes``.
            first_rows: row of each episode's first frame.
        """
        count = len(self.train_episodes)
        train = self._source(self.train_episodes, first_rows[:count], features)
        if not self.held_out_episodes:
            return train, None
        return train, self._source(self.held_out_episodes, first_rows[count:], features)

    def _source(
        self,
        episodes: Sequence[Episode],
        first_rows: Sequence[int],
        features: Mapping[str, FeatureRows],
    ) -> BatchSource:
        return BatchSource(self.samples(episodes, first_rows), features, self.task)

    def samples(self, episodes: Sequence[Episode], first_rows: Sequence[int]) -> SampleTable:
        """The samples of some episodes, whose first frames stand at ``first_rows``."""
        return build_samples(
            episodes,
            first_rows,
            self.task_rows,
            self.processor,
            labels=self.recipe.data.labels,
            ahead=self.objective.needs_future,
        )

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says about its origin, beside position and metrics."""
        return {
            # Where the files lay is a fact of one machine; the fingerprint says which they were.
            "recipe": self.recipe.model_dump(mode="json", exclude={"data": {"paths"}}),
            "seed": self.recipe.training.seed,
            "init_from": self.origin,
            # False after a stage that only learnt to represent: its chunks mean nothing.
            "action_heads_trained": self.objective.trains_actions,
            "dataset": {
                "fingerprint": self.dataset_fingerprint,
                "tasks": sorted({e.task_name for e in self.episodes}),
                "training_episodes": len(self.train_episodes),
                "held_out_episodes": len(self.held_out_episodes),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("reflexarc", "torch", "numpy", "safetensors")},
            },
        }


def prepare(
    recipe: Recipe, device: torch.device, *, start: LoadedPolicy | None = None
) -> Preparation:
    """Open the data, split it, compute statistics, and build the policy with seeded weights.

    Args:
        recipe: of one stage.
        device: of policy and objective.
        start: the checkpoint whose weights take the place of the seeded ones.

    Raises:
        DatasetError: the files are not there or not what they claim to be.
        ConfigError: the recipe asks for a task or size that the data does not have, or ``start``
            is not what this recipe starts from.
    """
    dataset = open_dataset(recipe.data)
    episodes = _limit(dataset.episodes, recipe.data.episodes_per_task)
    names = [episode.task_name for episode in episodes]
    train, held_out = split_episodes(names, recipe.data.validation_fraction, recipe.data.split_seed)
    train_episodes = [episodes[i] for i in train]
    held_out_episodes = [episodes[i] for i in held_out]
    statistics = compute_statistics(
        LiberoDataset(train_episodes), recipe.contract.state_layout, labels=recipe.data.labels
    )
    contract = make_contract(recipe, episodes)
    instructions = sorted({episode.instruction for episode in episodes})
    torch.manual_seed(derived_seed(recipe.training.seed, "weights", 0))
    policy = build_policy(recipe, contract, instructions)
    if start is not None:
        check_fits(recipe, start, policy, statistics)
        load_start(policy, start)
    policy = policy.to(device)
    objective = make_objective(recipe, policy, train_episodes[0]).to(device)
    objective.attach(policy)  # before freezing, which a copy would inherit
    for path in recipe.learning_rate_scale:
        module_at(policy, path, "learning_rate_scale")
    freeze_modules(policy, recipe.freeze)
    with torch.inference_mode():
        task = policy.embed_task([Task(instruction=text) for text in instructions])
    return Preparation(
        recipe=recipe,
        dataset_fingerprint=dataset.fingerprint(),
        train_episodes=train_episodes,
        held_out_episodes=held_out_episodes,
        statistics=statistics,
        policy=policy,
        objective=objective,
        processor=Processor(contract, statistics),
        task={name: rows.cpu().clone() for name, rows in task.items()},
        origin=None if start is None else origin_of(start),
        task_rows={text: row for row, text in enumerate(instructions)},
    )


def open_dataset(config: DataConfig) -> LiberoDataset:
    """The files of the recipe's tasks, and no others.

    Raises ConfigError for a task pattern that matches nothing, naming the tasks there are.
    """
    paths = config.paths or (Path("datasets") / config.suite,)
    for path in paths:
        if not path.exists():
            raise DatasetError(
                f"there is no {path}: name the demonstrations with --data PATH, or collect them "
                f"with: reflexarc data collect --suite {config.suite}",
                field="data.paths",
            )
    dataset = open_libero(paths, alignment=config.alignment)
    if not config.tasks:
        return dataset
    known = sorted({episode.task_name for episode in dataset.episodes})
    for pattern in config.tasks:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(
                f"data.tasks: {pattern!r} matches none of the tasks in "
                f"{', '.join(map(str, paths))}: {', '.join(known)}",
                field="data.tasks",
            )
    wanted = {name for pattern in config.tasks for name in fnmatch.filter(known, pattern)}
    files = sorted({e.path for e in dataset.episodes if e.task_name in wanted})
    return open_libero(files, alignment=config.alignment)


def make_contract(recipe: Recipe, episodes: Sequence[Episode]) -> PolicyContract:
    """The recipe's contract, with the image size that the data was recorded at.

    Raises DatasetError for data of two image sizes, and ConfigError when the recipe insists on
    another size than the data's.
    """
    parts = recipe.contract
    height, width = _recorded_size(episodes)
    if parts.source_size is not None and (height, width) != (parts.source_size,) * 2:
        raise ConfigError(
            f"contract.source_size is {parts.source_size}, but {episodes[0].path.name} holds "
            f"images of {height}x{width}",
            field="contract.source_size",
        )
    cameras = tuple(
        Camera(
            name=name,
            height=parts.image_size,
            width=parts.image_size,
            orientation=parts.orientation,
            source_height=height,
            source_width=width,
        )
        for name in parts.cameras
    )
    return PolicyContract(
        family=recipe.family,
        cameras=cameras,
        state=LIBERO_STATES[parts.state_layout],
        action=libero_action(parts.horizon),
        history=parts.history,
        state_normalization=parts.state_normalization,
        action_normalization=parts.action_normalization,
    )


def _recorded_size(episodes: Sequence[Episode]) -> tuple[int, int]:
    first = episodes[0]
    for episode in episodes:
        if episode.image_shape != first.image_shape:
            one, two = ("x".join(map(str, e.image_shape[:2])) for e in (episode, first))
            raise DatasetError(
                f"{episode.path.name}, {episode.demo} holds images of {one}, {first.path.name} "
                f"of {two}; train on files of one image size",
                field="data.paths",
            )
    return first.image_shape[0], first.image_shape[1]


def _limit(episodes: Sequence[Episode], per_task: int | None) -> list[Episode]:
    """The first ``per_task`` episodes of every task, in the order of the files."""
    if per_task is None:
        return list(episodes)
    seen: dict[str, int] = {}
    kept = []
    for episode in episodes:
        seen[episode.task_name] = seen.get(episode.task_name, 0) + 1
        if seen[episode.task_name] <= per_task:
            kept.append(episode)
    return kept
