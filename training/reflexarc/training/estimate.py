"""What a run will cost, before it starts: steps, parameters, memory, time, disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.checkpoint import trained_weights
from reflexarc.policy.interface import Policy
from reflexarc.training.feature_store.building import existing_parent, free_disk
from reflexarc.training.feature_store.dtypes import to_stored
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.feature_store.holding import place_of
from reflexarc.training.feature_store.store import find_features
from reflexarc.training.memory_estimate import (
    MemoryParts,
    divided,
    measure_step,
    rows_of_a_pass,
)
from reflexarc.training.objective import Batch, Objective
from reflexarc.training.optimization import trained_parameters
from reflexarc.training.preparation import Preparation
from reflexarc.training.samples import BatchOrder, BatchSource

_FLOAT = 4
_PROBE_FRAMES = 2


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, counts otherwise.

    Attributes:
        memory: of one process, part by part.
        rows: samples that one process computes at once.
        step_seconds: forward and backward passes of one optimiser step, on this device and without
            what processes send each other; None where it was not measured.
        checkpoint: the newest checkpoint, with its training state.
        features: frame features on disk; ``features_cached`` when they are there already.
        disk_needed: two checkpoints while the newest is written, those kept, and the features where
            they lie on the same file system.
        disk_free: on the file system of the run's folder.
    """

    train_samples: int
    held_out_samples: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    trained_parameters: int
    frozen_parameters: int
    memory: MemoryParts
    rows: int
    step_seconds: float | None
    checkpoint: int
    features: int
    features_cached: bool
    disk_needed: int
    disk_free: int


def estimate(
    preparation: Preparation,
    output: Path,
    feature_cache: Path,
    *,
    engine: str = "single",
    world: int = 1,
    timed: bool = False,
) -> Estimate:
    """Measure on two real frames and small batches; writes nothing.

    Args:
        engine: its name, see :mod:`reflexarc.training.distributed`.
        world: processes that would share the run; it is measured on this one alone.
        timed: whether to measure seconds too.
    """
    held = _held_already(preparation.policy)
    recipe = preparation.recipe
    policy = preparation.policy
    sizes = _sizes(policy, preparation.objective)
    train = sum(len(episode.image_steps) for episode in preparation.train_episodes)
    held_out = sum(len(episode.image_steps) for episode in preparation.held_out_episodes)
    order = BatchOrder(
        train,
        recipe.training.batch_size,
        recipe.training.seed,
        preparation.sample_weights(preparation.train_episodes),
    )
    frame_bytes, source = _probe(preparation)
    cost = measure_step(recipe, policy, preparation.objective, partial(_batch, source), timed=timed)
    rows = rows_of_a_pass(recipe, order.batch_size, world)
    cached = find_features(feature_cache, preparation.feature_key)
    averages = sizes.trained_policy if recipe.training.ema_decay is not None else 0
    # What is served, and the objective's own for a probe; the same as they are, and two moments.
    best = _FLOAT * (sizes.policy + sizes.objective)
    checkpoint = 2 * best + _FLOAT * (2 * sizes.trained + averages)
    loop, unit = recipe.training, 1 if recipe.training.epochs is None else order.steps_per_epoch
    total_steps = loop.steps or (loop.epochs or 0) * order.steps_per_epoch
    milestones = total_steps // (loop.keep_every * unit) if loop.keep_every else 0
    kept = loop.keep_best + milestones
    features = frame_bytes * (train + held_out)
    parts = divided(policy, preparation.objective, engine, world, averaged=averages > 0)
    on_device = place_of(features, policy.device) == ("cpu" if held else policy.device.type)
    memory = MemoryParts(
        process=max(0, held - _weight_bytes(policy)),
        activations=cost.activations(rows),
        features=features if on_device else 0,
        **parts,
    )
    disks = (existing_parent(path).stat().st_dev for path in (output, feature_cache))
    elsewhere = len(set(disks)) > 1  # the store looks at its own disk before it computes
    return Estimate(
        train_samples=train,
        held_out_samples=held_out,
        batch_size=order.batch_size,
        steps_per_epoch=order.steps_per_epoch,
        total_steps=total_steps,
        trained_parameters=sizes.trained,
        frozen_parameters=sizes.everything - sizes.trained,
        memory=memory,
        rows=rows,
        step_seconds=cost.seconds and cost.seconds * rows * loop.accumulate,
        checkpoint=checkpoint,
        features=features,
        features_cached=cached is not None,
        disk_needed=2 * checkpoint + kept * best + (0 if cached or elsewhere else features),
        disk_free=free_disk(output),
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of parameters: all, all that is trained, and what a checkpoint's parts hold."""

    everything: int
    trained: int
    trained_policy: int
    policy: int
    objective: int


def _sizes(policy: Policy, objective: Objective) -> _Sizes:
    """``policy`` leaves out the frozen backbones, which a checkpoint names only."""
    trained_policy = sum(p.numel() for p in trained_parameters(policy).values())
    own = sum(tensor.numel() for tensor in objective.state_dict().values())
    return _Sizes(
        everything=sum(p.numel() for m in (policy, objective) for p in m.parameters()),
        trained=trained_policy + sum(p.numel() for p in trained_parameters(objective).values()),
        trained_policy=trained_policy,
        policy=sum(tensor.numel() for tensor in trained_weights(policy).values()),
        objective=own,
    )


def check_disk(found: Estimate, output: Path) -> None:
    """Raise ConfigError when the run would not fit on the disk."""
    if found.disk_needed > found.disk_free:
        raise ConfigError(
            f"the run needs {found.disk_needed / 2**20:.0f} MiB on disk, "
            f"{existing_parent(output)} has {found.disk_free / 2**20:.0f} MiB free; "
            "name another --output or --feature-cache",
            field="output",
        )


def _probe(preparation: Preparation) -> tuple[int, BatchSource]:
    """Bytes of features a frame, and samples that read a few frames alone."""
    episode = preparation.train_episodes[0]
    count = min(_PROBE_FRAMES, len(episode.image_steps))
    preparation.policy.eval()
    rows = embed_episode(preparation.policy, episode, np.arange(count))
    features = {
        name: to_stored(values, preparation.recipe.data.feature_dtype, name)
        for name, values in rows.items()
    }
    frame_bytes = sum(values.nbytes for values in features.values()) // count
    # Every sample reads the same two frames: what they show does not change what it costs.
    samples = preparation.samples([episode], [0])
    few = replace(
        samples,
        frame_row=samples.frame_row % count,
        task_row=torch.zeros_like(samples.task_row),
    )
    if few.future is not None:
        later = replace(few.future, frame_row=few.future.frame_row % count)
        few = replace(few, future=later)
    return frame_bytes, BatchSource(few, features, preparation.task_of(episode))


def _batch(source: BatchSource, rows: int) -> Batch:
    """A batch of ``rows`` samples, however few there are."""
    return source.batch(torch.arange(rows) % len(source))


def _held_already(policy: Policy) -> int:
    """Bytes of the whole process on a CPU, its weights among them; 0 on an accelerator."""
    return int(psutil.Process().memory_info().rss) if policy.device.type == "cpu" else 0


def _weight_bytes(policy: Policy) -> int:
    return sum(p.numel() * p.element_size() for p in policy.parameters())
