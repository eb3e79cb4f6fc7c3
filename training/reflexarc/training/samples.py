"""Samples: one a rendered frame, with the chunk of actions that follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.data.libero_hdf5 import Episode
from reflexarc.policy.interface import Tensors
from reflexarc.policy.processing import Processor
from reflexarc.training.objective import Batch


def chunk_actions(
    actions: npt.NDArray[np.floating], steps: npt.NDArray[np.int64], horizon: int, gripper: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Chunks ``(F, H, D)`` that start at ``steps (F,)`` of ``actions (T, D)``, and their mask.

    Past the end of the episode a chunk holds zero deltas and the last gripper command, and the
    mask ``(F, H)`` is False.
    """
    padding = np.zeros((horizon, actions.shape[1]))
    padding[:, gripper] = actions[-1, gripper]
    padded = np.concatenate([actions, padding])
    rows = steps[:, None] + np.arange(horizon)
    return padded[rows], rows < len(actions)


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
class SampleTable:
    """N samples, everything but the frames' features.

    Attributes:
        state: ``float32 (N, S)`` normalised.
        actions: ``float32 (N, H, D)`` normalised; the gripper passes through.
        action_mask: ``bool (N, H)``.
        frame_row: ``int64 (N,)``, row in the feature store.
        task_row: ``int64 (N,)``, row in the tensors of ``embed_task``.
    """

    state: Tensor
    actions: Tensor
    action_mask: Tensor
    frame_row: Tensor
    task_row: Tensor

    def __len__(self) -> int:
        return len(self.frame_row)


def build_samples(
    episodes: Sequence[Episode],
    first_frame_rows: Sequence[int],
    task_rows: Mapping[str, int],
    processor: Processor,
) -> SampleTable:
    """One sample for every rendered frame of ``episodes``.

    Args:
        episodes: whole episodes, in any order.
        first_frame_rows: row of each episode's first frame in the feature store.
        task_rows: row of each instruction in the tensors of ``embed_task``.
        processor: normalises states and actions as serving does.

    Raises DatasetError where an episode's actions or states are wrong.
    """
    contract = processor.contract
    gripper = contract.action.gripper
    if gripper is None:
        raise ValueError("samples need a contract whose action has a gripper")
    states, chunks, masks, frame_rows, tasks = [], [], [], [], []
    for episode, first_row in zip(episodes, first_frame_rows, strict=True):
        steps = np.asarray(episode.image_steps, dtype=np.int64)
        chunk, mask = chunk_actions(
            episode.actions(), steps, contract.action.horizon, gripper.index
        )
        states.append(processor.normalize_state(episode.states(contract.state.layout)[steps]))
        chunks.append(processor.normalize_actions(chunk))
        masks.append(torch.from_numpy(mask))
        frame_rows.append(torch.arange(first_row, first_row + len(steps)))
        tasks.append(torch.full((len(steps),), task_rows[episode.instruction]))
    return SampleTable(
        state=torch.cat(states),
        actions=torch.cat(chunks),
        action_mask=torch.cat(masks),
        frame_row=torch.cat(frame_rows),
        task_row=torch.cat(tasks),
    )


class BatchSource:
    """Makes batches of samples from memory and the memory-mapped features."""

    def __init__(
        self,
        samples: SampleTable,
        features: Mapping[str, npt.NDArray[np.floating]],
        task: Tensors,
    ) -> None:
        self.samples = samples
        self._features = features
        self._task = task

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Tensor) -> Batch:
        """The samples at ``indices (B,)`` int64 as one batch on the CPU."""
        samples = self.samples
        rows = samples.frame_row[indices].numpy()
        window = {
            name: torch.from_numpy(np.asarray(array[rows])).float().unsqueeze(1)
            for name, array in self._features.items()
        }
        window["state"] = samples.state[indices].unsqueeze(1)
        task_rows = samples.task_row[indices]
        return Batch(
            window=window,
            task={name: rows_of_task[task_rows] for name, rows_of_task in self._task.items()},
            valid=torch.ones(len(indices), 1, dtype=torch.bool),
            actions=samples.actions[indices],
            action_mask=samples.action_mask[indices],
        )


class BatchOrder:
    """Which samples each optimiser step sees: a seeded permutation an epoch.

    A pure function of the step, so that a resumed run sees the same batches. Every sample is
    seen once an epoch; the last batch of an epoch may be smaller.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = min(batch_size, samples)
        self.steps_per_epoch = -(-samples // self.batch_size)
        self._seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Sample indices of optimiser step ``step``, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = seeded_generator(self._seed, "order", epoch)
            self._permutation = torch.randperm(self.samples, generator=generator)
            self._epoch = epoch
        start = position * self.batch_size
        return self._permutation[start : start + self.batch_size]


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A seed in [0, 2**63) for one purpose and index of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))
