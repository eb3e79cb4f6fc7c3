"""Samples: one a rendered frame, with the chunk of actions that follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode, Labels
from reflexarc.policy.interface import Tensors
from reflexarc.policy.processing import Processor
from reflexarc.training.batch_order import BatchOrder, derived_seed, seeded_generator
from reflexarc.training.feature_store.dtypes import FeatureRows, as_rows
from reflexarc.training.feature_store.gather import gather_rows
from reflexarc.training.feature_store.row_cache import RowCache
from reflexarc.training.objective import Batch
from reflexarc.training.time_windows import (
    chunk_actions,
    frame_rows,
    future_steps,
    window_steps,
    window_valid,
)

__all__ = [
    "BatchOrder",
    "BatchSource",
    "FutureTable",
    "SampleTable",
    "build_samples",
    "derived_seed",
    "newest_frames",
    "sample_weights",
    "seeded_generator",
    "split_episodes",
]


def split_episodes(
    task_names: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out episodes; the same for the same arguments.

    Of every task ``fraction`` of the episodes are held out: at least one when ``fraction`` is
    above zero and the task has two, and never all.
    """
    held_out: set[int] = set()
    for task in sorted(set(task_names)):
        members = [i for i, name in enumerate(task_names) if name == task]
        count = min(len(members) - 1, max(1, round(fraction * len(members)))) if fraction else 0
        # The task's name is part of the seed, so that adding a task moves no other split.
        task_seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "little")
        order = np.random.default_rng([seed, task_seed]).permutation(len(members))
        held_out.update(members[i] for i in order[:count])
    everything = range(len(task_names))
    return [i for i in everything if i not in held_out], sorted(held_out)


@dataclass(frozen=True)
class FutureTable:
    """What lies k control steps after each of N samples; see :class:`Batch`.

    Attributes:
        state: ``float32 (N, states, S)`` normalised.
        frame_row: ``int64 (N, frames)``.
        valid: ``bool (N, T)``.
        exists: ``bool (N,)``, False past the end of the episode.
        actions: ``float32 (N, k, D)`` normalised, as executed.
    """

    state: Tensor
    frame_row: Tensor
    valid: Tensor
    exists: Tensor
    actions: Tensor


@dataclass(frozen=True)
class SampleTable:
    """N samples, everything but the frames' features. T is the longer of frames and states.

    Attributes:
        state: ``float32 (N, states, S)`` normalised, oldest first.
        actions: ``float32 (N, H, D)`` normalised; the gripper is -1 or +1.
        action_mask: ``bool (N, H)``.
        frame_row: ``int64 (N, frames)``, rows in the feature store, oldest first.
        valid: ``bool (N, T)``, False where a row of the window is padding.
        task_row: ``int64 (N,)``, row in the tensors of ``embed_task``.
        future: the same k steps ahead, where it was asked for.
        weight: ``float64 (N,)``, how often an epoch sees each; None where it sees each once.
        window_actions, window_mask: ``(N, F, H, D)`` and ``(N, F, H)``, see :class:`Batch`; None
            where they were not asked for.
    """

    state: Tensor
    actions: Tensor
    action_mask: Tensor
    frame_row: Tensor
    valid: Tensor
    task_row: Tensor
    future: FutureTable | None = None
    weight: Tensor | None = None
    window_actions: Tensor | None = None
    window_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.frame_row)


def build_samples(
    episodes: Sequence[DatasetEpisode],
    first_frame_rows: Sequence[int],
    task_rows: Mapping[str, int],
    processor: Processor,
    *,
    labels: Labels = "executed",
    ahead: int | None = None,
    window_actions: bool = False,
) -> SampleTable:
    """One sample for every rendered frame of ``episodes``.

    Args:
        episodes: whole episodes, in any order.
        first_frame_rows: row of each episode's first frame in the feature store.
        task_rows: row of each instruction in the tensors of ``embed_task``.
        processor: normalises states and actions as serving does.
        labels: which actions the chunks hold.
        ahead: control steps k to the future that the samples hold too.
        window_actions: whether they hold the chunk after every frame of their window.

    Raises DatasetError where an episode's actions or states are wrong, and ConfigError where an
    image that a sample needs was not rendered.
    """
    samples = [
        _episode_samples(episode, first_row, task_rows[episode.instruction], processor, labels)
        for episode, first_row in zip(episodes, first_frame_rows, strict=True)
    ]
    state, actions, mask, rows, valid, tasks = map(torch.cat, zip(*samples, strict=True))
    table = SampleTable(state, actions, mask, rows, valid, tasks, weight=sample_weights(episodes))
    if window_actions:
        table = _with_window_actions(table)
    if ahead is None:
        return table
    later = [
        _episode_future(episode, first_row, processor, ahead)
        for episode, first_row in zip(episodes, first_frame_rows, strict=True)
    ]
    future = FutureTable(*map(torch.cat, zip(*later, strict=True)))
    if not future.exists.any():
        raise ConfigError(
            f"objective.horizon is {ahead}, and none of {len(episodes)} episodes is that long",
            field="objective.horizon",
        )
    return replace(table, future=future)


def _episode_samples(
    episode: DatasetEpisode, first_row: int, task_row: int, processor: Processor, labels: Labels
) -> tuple[Tensor, ...]:
    """The columns of a :class:`SampleTable` in order, but the future."""
    steps = np.asarray(episode.image_steps, dtype=np.int64)
    horizon = processor.contract.action.horizon
    actions = episode.labelled_actions(labels)
    chunk, mask = chunk_actions(actions, steps, horizon, processor.contract.action)
    state, frame_row, valid = _windows(episode, steps, first_row, processor)
    return (
        state,
        processor.normalize_actions(chunk),
        torch.from_numpy(mask),
        frame_row,
        valid,
        torch.full((len(steps),), task_row),
    )


def _with_window_actions(table: SampleTable) -> SampleTable:
    """The chunks of each window's frames, which are those of other samples: one a frame.

    A sample stands for its newest frame, in the order of the episodes.
    """
    sample_of = torch.empty(int(table.frame_row.max()) + 1, dtype=torch.int64)
    sample_of[table.frame_row[:, -1]] = torch.arange(len(table))
    samples = sample_of[table.frame_row]
    seen = table.valid[:, -table.frame_row.shape[1] :]
    return replace(
        table,
        window_actions=table.actions[samples],
        window_mask=table.action_mask[samples] & seen[..., None],
    )


def _episode_future(
    episode: DatasetEpisode, first_row: int, processor: Processor, ahead: int
) -> tuple[Tensor, ...]:
    """The columns of a :class:`FutureTable` in order."""
    steps = np.asarray(episode.image_steps, dtype=np.int64)
    later, exists = future_steps(episode, ahead)
    state, frame_row, valid = _windows(episode, later, first_row, processor)
    # What was executed made the future, not what an expert would rather have done.
    taken, _ = chunk_actions(episode.actions(), steps, ahead, processor.contract.action)
    actions = processor.normalize_actions(taken)
    return state, frame_row, valid, torch.from_numpy(exists), actions


def _windows(
    episode: DatasetEpisode, steps: npt.NDArray[np.int64], first_row: int, processor: Processor
) -> tuple[Tensor, Tensor, Tensor]:
    """``state``, ``frame_row`` and ``valid`` of the decisions at ``steps``."""
    history = processor.contract.history
    states = processor.normalize_state(episode.states(processor.contract.state.layout))
    seen = torch.from_numpy(window_steps(steps, history.states, history.stride))
    rows = frame_rows(episode, window_steps(steps, history.frames, history.stride))
    valid = window_valid(steps, history.rows, history.stride)
    return states[seen], torch.from_numpy(first_row + rows), torch.from_numpy(valid)


def newest_frames(table: SampleTable) -> SampleTable:
    """The same samples, of their frames the newest alone."""
    future = table.future
    if future is not None:
        future = replace(future, frame_row=future.frame_row[:, -1:])
    return replace(table, frame_row=table.frame_row[:, -1:], future=future)


def sample_weights(episodes: Sequence[DatasetEpisode]) -> Tensor | None:
    """``float64 (N,)``, the weight of each frame's episode; None where all are 1."""
    weights = [episode.weight for episode in episodes]
    if all(weight == 1 for weight in weights):
        return None
    counts = torch.tensor([len(episode.image_steps) for episode in episodes])
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(counts)


class BatchSource:
    """Makes batches of samples, their features from memory or the disk."""

    def __init__(
        self, samples: SampleTable, features: Mapping[str, FeatureRows | RowCache], task: Tensors
    ) -> None:
        self.samples = samples
        self._features = {
            name: rows if isinstance(rows, RowCache) else as_rows(rows)
            for name, rows in features.items()
        }
        self._task = task

    def __len__(self) -> int:
        return len(self.samples)

    def order(self, batch_size: int, seed: int) -> BatchOrder:
        """The order of its samples in training."""
        return BatchOrder(len(self), batch_size, seed, self.samples.weight)

    def batch(self, indices: Tensor) -> Batch:
        """The samples at ``indices (B,)`` int64 as one batch.

        It is on the CPU, but for features that are held on a device.
        """
        samples = self.samples
        task_rows = samples.task_row[indices]
        batch = Batch(
            window=self._window(samples.state[indices], samples.frame_row[indices]),
            task={name: rows_of_task[task_rows] for name, rows_of_task in self._task.items()},
            valid=samples.valid[indices],
            actions=samples.actions[indices],
            action_mask=samples.action_mask[indices],
            window_actions=_at(samples.window_actions, indices),
            window_mask=_at(samples.window_mask, indices),
        )
        future = samples.future
        if future is None:
            return batch
        return replace(
            batch,
            future=self._window(future.state[indices], future.frame_row[indices]),
            future_valid=future.valid[indices],
            future_mask=future.exists[indices],
            future_actions=future.actions[indices],
        )

    def _window(self, state: Tensor, frame_row: Tensor) -> Tensors:
        """Feature rows ``(B, frames, ...)`` float32, pixels uint8, and the states."""
        wanted = frame_row.flatten()
        window = {}
        for name, features in self._features.items():
            rows = gather_rows(features, wanted)
            window[name] = rows.view(*frame_row.shape, *rows.shape[1:])
        window["state"] = state
        return window


def _at(rows: Tensor | None, indices: Tensor) -> Tensor | None:
    return None if rows is None else rows[indices]
