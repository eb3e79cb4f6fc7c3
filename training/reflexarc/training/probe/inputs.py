"""What is probed at every frame: z, and beside it what z is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Policy, Task
from reflexarc.training.feature_store.dtypes import FeatureRows
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.feature_store.keys import feature_key
from reflexarc.training.feature_store.store import find_features, frame_features
from reflexarc.training.objective import Batch
from reflexarc.training.probe.split import Split
from reflexarc.training.samples import BatchSource, build_samples

Inputs = dict[str, npt.NDArray[np.float32]]

Z, STATE, VISION, RANDOM = "z", "state", "vision", "random"
"""The representation; proprioception alone; pooled vision features; z of random weights."""

_BATCH = 32
_PIXEL_GRID = 8


@dataclass(frozen=True)
class ProbedInputs:
    """What is known of every frame.

    Attributes:
        inputs: name to ``(F, d)``.
        tokens: K of z.
        width: d of z.
        target: ``(F, K·d)``, z of the target network that predictions were trained on; None
            without one.
    """

    inputs: Inputs
    tokens: int
    width: int
    target: npt.NDArray[np.float32] | None = None


def representation_of(policy: Policy) -> nn.Module:
    """The module that makes z. ConfigError for a family that has none."""
    module = getattr(policy, "representation", None)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"the family {policy.family!r} has no representation z to probe; families with one "
            "hold it as their module `representation`, as statevla does",
            field="family",
        )
    return module


@torch.inference_mode()
def compute_inputs(
    loaded: LoadedPolicy,
    split: Split,
    cache: Path | None,
    *,
    target: nn.Module | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ProbedInputs:
    """All inputs at every rendered frame of ``split.episodes``, in their order.

    Args:
        cache: a feature store: its features are used, and what is missing is computed into it.
            Without one they are computed and forgotten.
        target: the target network of a temporal objective, whose z is kept apart.
        seed: of the random representation's weights.
    """
    policy = loaded.policy
    trained, untrained = representation_of(policy), _random_representation(policy, seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in (Z, STATE, VISION, RANDOM)}
    of_target: list[Tensor] = []
    shape = (0, 0)
    total = sum(len(episode.image_steps) for episode in split.episodes)
    with tqdm(total=total, desc="representation", unit="frame", disable=not progress) as bar:
        for batch in _batches(loaded, split, cache, progress):
            z = _call(trained, batch)
            shape = (z.shape[1], z.shape[2])
            parts[Z].append(z.flatten(1).float().cpu())
            if target is not None:
                of_target.append(_call(target, batch).flatten(1).float().cpu())
            parts[RANDOM].append(_call(untrained, batch).flatten(1).float().cpu())
            parts[STATE].append(batch.window["state"].flatten(1).float().cpu())
            parts[VISION].append(pooled_vision(batch.window).cpu())
            bar.update(batch.size)
    inputs = {name: torch.cat(rows).numpy() for name, rows in parts.items()}
    return ProbedInputs(inputs, *shape, target=torch.cat(of_target).numpy() if of_target else None)


def pooled_vision(window: Mapping[str, Tensor]) -> Tensor:
    """Frozen features averaged over an image's patches, pixels over 8 x 8 cells: ``(B, d)``."""
    rows = []
    for name, values in window.items():
        if name == "state":
            continue
        if values.dtype == torch.uint8:
            pixels = values.flatten(0, -4).permute(0, 3, 1, 2).float()
            cells = F.adaptive_avg_pool2d(pixels, _PIXEL_GRID)
            rows.append(cells.reshape(len(values), -1))
        else:
            rows.append(values.float().mean(-2).flatten(1))
    return torch.cat(rows, dim=1)


def _call(representation: nn.Module, batch: Batch) -> Tensor:
    z: Tensor = representation(batch.task, batch.window, batch.valid)
    return z


def _random_representation(policy: Policy, seed: int) -> nn.Module:
    """The same architecture, its weights drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(policy).build(policy.config, policy.contract, policy.extra_files())
    return representation_of(fresh.eval().to(policy.device))


def _batches(
    loaded: LoadedPolicy, split: Split, cache: Path | None, progress: bool
) -> Iterator[Batch]:
    policy = loaded.policy
    instructions = sorted({episode.instruction for episode in split.episodes})
    task = policy.embed_task([Task(instruction=text) for text in instructions])
    task_rows = {text: row for row, text in enumerate(instructions)}
    for features, first_row, episode in _features(policy, split, cache, progress):
        samples = build_samples([episode], [first_row], task_rows, loaded.processor)
        source = BatchSource(samples, features, {name: rows.cpu() for name, rows in task.items()})
        for start in range(0, len(source), _BATCH):
            rows = torch.arange(start, min(start + _BATCH, len(source)))
            yield source.batch(rows).to(policy.device)


def _features(
    policy: Policy, split: Split, cache: Path | None, progress: bool
) -> Iterator[tuple[Mapping[str, FeatureRows], int, DatasetEpisode]]:
    """Features that hold an episode's frames, the row of its first one, and the episode."""
    if cache is None:
        for episode in split.episodes:
            rows = embed_episode(policy, episode, np.arange(len(episode.image_steps)))
            yield rows, 0, episode
        return
    # What training stored holds the frames of a smaller probe too.
    stored_episodes = split.everything
    key = feature_key(policy, stored_episodes, split.fingerprint)
    if find_features(cache, key) is None and len(split.episodes) < len(stored_episodes):
        stored_episodes = split.episodes
        key = feature_key(policy, stored_episodes, split.fingerprint)
    stored = frame_features(policy, stored_episodes, key, cache, progress=progress)
    first_rows = dict(zip(stored_episodes, stored.first_rows, strict=True))
    for episode in split.episodes:
        yield stored.arrays, first_rows[episode], episode
