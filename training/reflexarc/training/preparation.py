"""From a recipe to everything that a run needs: episodes, contract, statistics, policy."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflexarc.contract import NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.statistics import compute_statistics
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.policy.processing import Processor
from reflexarc.training.config import Recipe
from reflexarc.training.families import build_policy, open_table
from reflexarc.training.feature_store.dtypes import FeatureRows
from reflexarc.training.feature_store.first_frames import FirstFrames
from reflexarc.training.feature_store.keys import FeatureKey, feature_key
from reflexarc.training.feature_store.row_cache import RowCache
from reflexarc.training.feature_store.store import FrameFeatures, frame_features
from reflexarc.training.freezing import freeze_modules, module_at
from reflexarc.training.goals import Goals, choose_goals
from reflexarc.training.objective import Objective
from reflexarc.training.objectives.making import make_objective
from reflexarc.training.recipe_data import limit_episodes, make_contract, open_dataset
from reflexarc.training.samples import (
    BatchSource,
    SampleTable,
    build_samples,
    derived_seed,
    newest_frames,
    sample_weights,
    split_episodes,
)
from reflexarc.training.scans import SCAN, scan_of
from reflexarc.training.starting_weights import check_fits, load_start, origin_of


@dataclass(frozen=True)
class Preparation:
    """A run before its first step; nothing has been written yet.

    Attributes:
        train_episodes, held_out_episodes: a seeded split by episode.
        task: rows of ``embed_task``, one an instruction, on the CPU; none where there are goals.
        task_rows: instruction to its row in ``task``.
        goals: what takes their place for a policy that is shown a goal image.
        origin: the checkpoint that the weights come from, None where they are random.
        feature_cache: where digests of frames may lie that were read before.
        remarks: on the data, for the log.
    """

    recipe: Recipe
    dataset_fingerprint: str
    train_episodes: list[DatasetEpisode]
    held_out_episodes: list[DatasetEpisode]
    statistics: NormalizationStatistics
    policy: Policy
    objective: Objective
    processor: Processor
    task: Tensors
    task_rows: dict[str, int]
    origin: dict[str, Any] | None = None
    goals: Goals | None = None
    feature_cache: Path | None = None
    remarks: tuple[str, ...] = ()

    @property
    def contract(self) -> PolicyContract:
        return self.policy.contract

    @property
    def episodes(self) -> list[DatasetEpisode]:
        return self.train_episodes + self.held_out_episodes

    @cached_property
    def feature_key(self) -> FeatureKey:
        """Key of the frames' features in a feature store."""
        return feature_key(
            self.policy,
            self.episodes,
            self.dataset_fingerprint,
            self.recipe.data.feature_dtype,
            self._first_frames,
        )

    @cached_property
    def _first_frames(self) -> FirstFrames:
        return FirstFrames(self.feature_cache)

    def features(self, cache: Path, *, progress: bool = True) -> FrameFeatures:
        """Features of every frame, from the store in ``cache`` or computed into it."""
        features = frame_features(
            self.policy, self.episodes, self.feature_key, cache, progress=progress
        )
        self._first_frames.save(cache)
        return features

    def sources(
        self, features: Mapping[str, FeatureRows | RowCache], first_rows: Sequence[int]
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
        episodes: Sequence[DatasetEpisode],
        first_rows: Sequence[int],
        features: Mapping[str, FeatureRows | RowCache],
    ) -> BatchSource:
        task = self.task if self.goals is None else self.goals.rows
        return BatchSource(self.samples(episodes, first_rows), features, task)

    def task_of(self, episode: DatasetEpisode) -> Tensors:
        """One row of ``embed_task`` that samples of ``episode`` may be given."""
        if self.goals is not None:
            return self.goals.rows_of(episode)
        row = self.task_rows[episode.instruction]
        return {name: rows[row : row + 1] for name, rows in self.task.items()}

    def sample_weights(self, episodes: Sequence[DatasetEpisode]) -> Tensor | None:
        """``float64 (N,)``: how often an epoch sees each frame; None where once.

        Raises ConfigError where none is seen.
        """
        labels = self.recipe.data.labels
        factors = [self.objective.frame_weights(episode, labels) for episode in episodes]
        weights = sample_weights(episodes)
        if all(one is None for one in factors):
            return weights
        found = torch.cat(
            [
                torch.ones(len(episode.image_steps), dtype=torch.float64)
                if one is None
                else torch.from_numpy(one)
                for episode, one in zip(episodes, factors, strict=True)
            ]
        )
        found = found if weights is None else found * weights
        if not bool(found.any()):
            raise ConfigError(
                "the objective leaves out every sample: no episode is as long as a chunk; set "
                "objective.every_step: true, or a shorter contract.horizon",
                field="objective.every_step",
            )
        return found

    def samples(self, episodes: Sequence[DatasetEpisode], first_rows: Sequence[int]) -> SampleTable:
        """The samples of some episodes, whose first frames stand at ``first_rows``."""
        table = build_samples(
            episodes,
            first_rows,
            self.task_rows,
            self.processor,
            labels=self.recipe.data.labels,
            ahead=self.objective.needs_future,
            window_actions=self.objective.needs_window_actions,
        )
        if self.policy.embeds_clips:  # a clip is stored in the row of its newest frame
            table = newest_frames(table)
        if self.goals is not None:
            table = replace(table, task_row=self.goals.task_rows(episodes))
        return replace(table, weight=self.sample_weights(episodes))

    @cached_property
    def scan(self) -> str | None:
        """Which scan the policy's Mamba layers use; None where it has none."""
        return scan_of(self.policy, self.policy.device)

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says about its origin, beside position and metrics."""
        return {
            # Where the files lay is a fact of one machine; the fingerprint says which they were.
            "recipe": self.recipe.model_dump(
                mode="json",
                exclude={
                    "data": {"paths": True, "sources": {"__all__": {"path"}}},
                    "language": {"table"},
                },
            ),
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
            **({} if self.goals is None else {"goals": self.goals.names()}),
            **({} if self.scan is None else {SCAN: self.scan}),
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
    open_table(recipe)  # a wrong one is named before the data is read
    dataset = open_dataset(recipe)
    dataset.check_images()
    episodes = limit_episodes(dataset.episodes, recipe.data.episodes_per_task)
    by_task = recipe.data.split_by == "task"
    names = [episode.task_name if by_task else "" for episode in episodes]
    train, held_out = split_episodes(names, recipe.data.validation_fraction, recipe.data.split_seed)
    train_episodes = [episodes[i] for i in train]
    held_out_episodes = [episodes[i] for i in held_out]
    layout = dataset.layout(recipe.contract.state_layout)
    statistics = compute_statistics(
        dataset.subset(train_episodes), layout, labels=recipe.data.labels
    )
    for episode in held_out_episodes:  # what is not finite is named before hours of features
        episode.states(layout)
    contract = make_contract(recipe, dataset.subset(episodes), statistics)
    instructions = sorted({episode.instruction for episode in episodes})
    torch.manual_seed(derived_seed(recipe.training.seed, "weights", 0))
    policy = build_policy(recipe, contract, instructions)
    if start is not None:
        check_fits(start, policy, statistics)
        load_start(policy, start)
    policy = policy.to(device)
    objective = make_objective(recipe, policy, train_episodes[0]).to(device)
    objective.attach(policy)  # before freezing, which a copy would inherit
    for path in recipe.learning_rate_scale:
        module_at(policy, path, "learning_rate_scale")
    freeze_modules(policy, recipe.freeze)
    goals = choose_goals(
        recipe.data.goal,
        policy,
        train_episodes,
        held_out_episodes,
        seed=recipe.data.split_seed,
        dtype=recipe.data.feature_dtype,
    )
    with torch.inference_mode():
        told = [Task(instruction=text) for text in instructions]
        task = policy.embed_task(told) if goals is None else {}
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
        goals=goals,
        remarks=_short_episodes(contract, [*train_episodes, *held_out_episodes]),
    )


def _short_episodes(
    contract: PolicyContract, episodes: Sequence[DatasetEpisode]
) -> tuple[str, ...]:
    """Says how many episodes hold not even one whole window of frames and chunk of actions."""
    if contract.history.frames == 1:
        return ()
    whole = contract.history.span + 1 + contract.action.horizon
    short = sum(episode.length < whole for episode in episodes)
    if not short:
        return ()
    return (
        f"{short} of {len(episodes)} episodes are shorter than {whole} steps (a window of "
        f"{contract.history.frames} frames and a chunk of {contract.action.horizon} actions): what "
        "they lack is padded, and masked in the loss",
    )
