"""Which image of the goal a sample is given: the last frame of a demonstration, always a named one.

At serving a goal comes once an episode, from a demonstration of the task; here every demonstration
that may be one is embedded once, whatever the number of samples that see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.training.config_base import FeatureDtype
from reflexarc.training.config_data import GoalConfig
from reflexarc.training.feature_store.dtypes import torch_dtype
from reflexarc.training.feature_store.embedding import prepare_frames

_AT_ONCE = 8
_SHOW_FROM = 32


def goal_task(policy: Policy, episode: DatasetEpisode) -> Task:
    """The task of showing what ``episode`` ends with: its instruction and its last image."""
    last = np.array([len(episode.image_steps) - 1])
    images = prepare_frames(policy.contract, episode, last)
    goal = {name: image[0].to(policy.device) for name, image in images.items()}
    return Task(instruction=episode.instruction, goal_image=goal)


def episode_name(episode: DatasetEpisode) -> str:
    """``file/demo``, as an option names it."""
    return f"{episode.path.name}/{episode.demo}"


@dataclass(frozen=True, eq=False)
class Goals:
    """The goals of a run.

    Attributes:
        policy: embeds them.
        candidates: demonstrations whose last frame is somebody's goal, each once.
        of_episode: id of an episode to the places of those that its samples may be given.
        seed: decides which of several a sample is given; always the same one.
        dtype: of the rows that are kept.
    """

    policy: Policy
    candidates: tuple[DatasetEpisode, ...]
    of_episode: dict[int, tuple[int, ...]]
    seed: int
    dtype: FeatureDtype

    @cached_property
    def rows(self) -> Tensors:
        """``embed_task`` of every candidate, on the CPU."""
        shown = len(self.candidates) >= _SHOW_FROM
        parts: list[Tensors] = []
        with tqdm(total=len(self.candidates), desc="goals", unit="image", disable=not shown) as bar:
            for start in range(0, len(self.candidates), _AT_ONCE):
                some = self.candidates[start : start + _AT_ONCE]
                parts.append(self._embed(some))
                bar.update(len(some))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows_of(self, episode: DatasetEpisode) -> Tensors:
        """One row, of a goal of ``episode``, embedded now."""
        return self._embed([self.candidates[self.of_episode[id(episode)][0]]])

    def task_rows(self, episodes: Sequence[DatasetEpisode]) -> Tensor:
        """``int64 (N,)``: the row of each frame of ``episodes``, one after the other."""
        parts = []
        for episode in episodes:
            places = np.asarray(self.of_episode[id(episode)], dtype=np.int64)
            name = hashlib.sha256(episode_name(episode).encode()).digest()[:4]
            random = np.random.default_rng([self.seed, int.from_bytes(name, "little")])
            chosen = random.integers(len(places), size=len(episode.image_steps))
            parts.append(torch.from_numpy(places[chosen]))
        return torch.cat(parts)

    def names(self) -> list[str]:
        """Of the candidates, for a checkpoint's provenance."""
        return [episode_name(episode) for episode in self.candidates]

    @torch.inference_mode()
    def _embed(self, episodes: Sequence[DatasetEpisode]) -> Tensors:
        self.policy.eval()
        found = self.policy.embed_task([goal_task(self.policy, one) for one in episodes])
        dtype = torch_dtype(self.dtype)
        return {name: rows.to("cpu", dtype).clone() for name, rows in found.items()}


def choose_goals(
    config: GoalConfig,
    policy: Policy,
    train: Sequence[DatasetEpisode],
    held_out: Sequence[DatasetEpisode],
    *,
    seed: int,
    dtype: FeatureDtype,
) -> Goals | None:
    """Goals as the recipe says; None for a policy that is shown none.

    Raises ConfigError where the demonstration that is named is not among those trained on.
    """
    if not policy.contract.needs_goal_image:
        return None
    episodes = [*train, *held_out]
    if config.source == "episode":
        alone: dict[int, tuple[int, ...]] = {
            id(episode): (place,) for place, episode in enumerate(episodes)
        }
        return Goals(policy, tuple(episodes), alone, seed, dtype)
    by_task: dict[str, list[DatasetEpisode]] = {}
    for episode in train:
        by_task.setdefault(episode.task_name, []).append(episode)
    if config.source == "task":
        by_task = {task: [_named(config, task, members)] for task, members in by_task.items()}
    candidates = tuple(episode for members in by_task.values() for episode in members)
    places = {id(episode): place for place, episode in enumerate(candidates)}
    of_task = {task: tuple(places[id(m)] for m in members) for task, members in by_task.items()}
    return Goals(policy, candidates, {id(e): of_task[e.task_name] for e in episodes}, seed, dtype)


def _named(config: GoalConfig, task: str, members: Sequence[DatasetEpisode]) -> DatasetEpisode:
    if config.demonstration is None:
        return members[0]
    for episode in members:
        if episode.demo == config.demonstration:
            return episode
    known = ", ".join(episode.demo for episode in members[:12])
    raise ConfigError(
        f"data.goal.demonstration: {task} has no {config.demonstration!r} among the "
        f"demonstrations that are trained on: {known}{', …' if len(members) > 12 else ''}; a "
        "held-out one would be seen in training, name one of these",
        field="data.goal.demonstration",
    )
