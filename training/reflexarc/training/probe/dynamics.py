"""How much z changes over time, and how much of the change a temporal predictor foresees."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.processing import Processor
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor
from reflexarc.training.probe.inputs import ProbedInputs, Z
from reflexarc.training.probe.ridge import Floats
from reflexarc.training.probe.scores import interval, resamples
from reflexarc.training.saving import OBJECTIVE_FILE

WANTED_HORIZONS = (1, 5, 10)
_PREDICTOR, _TARGET = "predictor.", "target."


@dataclass(frozen=True)
class Change:
    """Over one horizon, on held-out episodes; every token of z brought to mean 0, variance 1.

    Where a predictor is measured, z is the target network's throughout: that is what it was
    trained to foresee, and the served representation has moved on from its slow average.

    Attributes:
        horizon: control steps.
        pairs: of frames.
        identity_mse: mean squared difference of z at t and t + horizon.
        share_of_random: the same, over that of two frames of different episodes; None with one.
        predicted_mse: mean squared error of the predictor; None without one.
        mse_over_identity: their ratio: below 1 something about change was learnt.
        rollouts: how often the predictor was applied.
    """

    horizon: int
    pairs: int
    identity_mse: float
    share_of_random: float | None
    predicted_mse: float | None = None
    mse_over_identity: float | None = None
    ratio_interval: tuple[float, float] | None = None
    rollouts: int | None = None


@dataclass(frozen=True)
class LoadedPredictor:
    """What a temporal objective left beside its checkpoint: predictor, target, horizon."""

    predictor: TemporalPredictor
    target: nn.Module
    horizon: int


def load_predictor(
    directory: Path, action_dimension: int, representation: nn.Module
) -> LoadedPredictor | None:
    """From ``objective.safetensors``; None where there is none. CheckpointError when it is odd.

    Args:
        representation: the policy's own, of whose form the target network is.
    """
    path = directory / OBJECTIVE_FILE
    if not path.is_file():
        return None
    try:
        tensors = safetensors.torch.load_file(path)
        own = _below(tensors, _PREDICTOR)
        if not own or "mask_token" in own:
            return None  # another objective's
        hidden, z_dimension = own["state.weight"].shape
        actions = own["action.weight"].shape[1]
        predictor = TemporalPredictor(z_dimension, actions, hidden=hidden)
        predictor.load_state_dict(own)
        target = copy.deepcopy(representation)
        target.load_state_dict(_below(tensors, _TARGET))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no temporal predictor that can be read: {str(error)[:200]}; "
            "copy the checkpoint's folder again"
        ) from error
    if actions % action_dimension:
        raise CheckpointError(
            f"{path}: its predictor takes {actions} numbers of actions, which is no multiple of "
            f"the contract's {action_dimension}; it belongs to another checkpoint"
        )
    # The target stays where the policy is, beside its inputs; the predictor meets stored rows.
    return LoadedPredictor(predictor.eval(), target.eval(), actions // action_dimension)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def choose_horizons(
    episodes: Sequence[DatasetEpisode], wanted: Sequence[int] | None, predicted: int | None
) -> tuple[int, ...]:
    """Control steps between pairs of rendered frames.

    Args:
        wanted: named by the caller; None takes 1, 5 and 10, each rounded up to the next that
            the data has.
        predicted: the predictor's own horizon, which is added where it can be.

    Raises ConfigError for a horizon that has no pair of frames, naming those that have.
    """
    offered = sorted(set().union(*(_offered(episode) for episode in episodes)))
    if wanted is not None:
        missing = [k for k in wanted if k not in offered]
        if missing:
            raise ConfigError(
                f"no two rendered frames stand {missing[0]} control steps apart; the data has "
                f"images every {episodes[0].render_stride} steps: choose from "
                f"{', '.join(map(str, offered[:12]))}{', ...' if len(offered) > 12 else ''}",
                field="horizons",
            )
        return tuple(sorted(set(wanted)))
    chosen = {min((k for k in offered if k >= want), default=0) for want in WANTED_HORIZONS}
    if predicted in offered:
        chosen.add(predicted or 0)
    return tuple(sorted(chosen - {0}))


@torch.inference_mode()
def measure_change(
    probed: ProbedInputs,
    first_rows: Mapping[DatasetEpisode, int],
    tasks: npt.NDArray[np.int64],
    horizons: Sequence[int],
    processor: Processor,
    loaded: LoadedPredictor | None,
    *,
    seed: int = 0,
) -> list[Change]:
    """One :class:`Change` a horizon.

    Args:
        probed: holds the frames of ``first_rows``' episodes.
        first_rows: each test episode's first row in it.
        tasks: ``(E,)`` task of each test episode, for the intervals.
    """
    online = _tokens(probed, probed.inputs[Z], first_rows)
    z = online if probed.target is None else _tokens(probed, probed.target, first_rows)
    actions = {e: processor.normalize_actions(e.actions()) for e in first_rows}
    random = _random_mse([normed(rows) for rows in z.values()], seed)
    weights = resamples(tasks, seed=seed)
    return [
        _one_horizon(horizon, online, z, actions, random, weights, loaded) for horizon in horizons
    ]


def normed(z: Tensor) -> Tensor:
    """``(..., d)``, each token at mean 0 and variance 1: the space in which predictions count."""
    return F.layer_norm(z, z.shape[-1:])


def _one_horizon(
    horizon: int,
    online: Mapping[DatasetEpisode, Tensor],
    z: Mapping[DatasetEpisode, Tensor],
    actions: Mapping[DatasetEpisode, Tensor],
    random_mse: float,
    weights: Floats,
    loaded: LoadedPredictor | None,
) -> Change:
    predicts = loaded is not None and horizon % loaded.horizon == 0
    identity, predicted, pairs = (np.zeros(len(z)) for _ in range(3))
    for i, (episode, rows) in enumerate(z.items()):
        now, later = _pairs(episode, horizon)
        if not len(now):
            continue
        pairs[i] = len(now)
        target = normed(rows[later])
        identity[i] = float((normed(rows[now]) - target).square().mean((1, 2)).sum())
        if predicts and loaded is not None:
            steps = torch.from_numpy(np.asarray(episode.image_steps)[now])
            ahead = _roll_out(loaded, online[episode][now], actions[episode], steps, horizon)
            predicted[i] = float((normed(ahead) - target).square().mean((1, 2)).sum())
    count = float(pairs.sum())
    change = Change(
        horizon=horizon,
        pairs=int(count),
        identity_mse=identity.sum() / count,
        share_of_random=identity.sum() / count / random_mse if random_mse else None,
    )
    if not predicts or loaded is None or not identity.sum():
        return change
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weights @ predicted) / (weights @ identity)
    return Change(
        horizon=horizon,
        pairs=change.pairs,
        identity_mse=change.identity_mse,
        share_of_random=change.share_of_random,
        predicted_mse=predicted.sum() / count,
        mse_over_identity=float(predicted.sum() / identity.sum()),
        ratio_interval=interval(ratios) if len(z) > 1 else None,
        rollouts=horizon // loaded.horizon,
    )


def _roll_out(
    loaded: LoadedPredictor, z: Tensor, actions: Tensor, steps: Tensor, horizon: int
) -> Tensor:
    """``z (n, K, d)`` at ``steps (n,)`` to the prediction ``horizon`` steps later."""
    flat = z.flatten(1)
    for start in range(0, horizon, loaded.horizon):
        window = steps[:, None] + torch.arange(start, start + loaded.horizon)
        flat = loaded.predictor(flat, actions[window].flatten(1))
    return flat.view_as(z)


def _tokens(
    probed: ProbedInputs, z: npt.NDArray[np.float32], first_rows: Mapping[DatasetEpisode, int]
) -> dict[DatasetEpisode, Tensor]:
    """Each episode's ``(frames, K, d)``."""
    shape = (-1, probed.tokens, probed.width)
    return {
        episode: torch.from_numpy(z[row : row + len(episode.image_steps)]).view(shape)
        for episode, row in first_rows.items()
    }


def _pairs(
    episode: DatasetEpisode, horizon: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the frames at t and at t + horizon."""
    steps = np.asarray(episode.image_steps, dtype=np.int64)
    now = np.flatnonzero(np.isin(steps + horizon, steps))
    return now, np.searchsorted(steps, steps[now] + horizon)


def _offered(episode: DatasetEpisode) -> set[int]:
    steps = np.asarray(episode.image_steps, dtype=np.int64)
    return set((steps[1:] - steps[0]).tolist()) | set(np.diff(steps).tolist())


def _random_mse(z: Sequence[Tensor], seed: int) -> float:
    """Mean squared difference of random frames of different episodes; 0 for one episode."""
    if len(z) < 2:
        return 0.0
    rows = torch.cat(list(z))
    episode = torch.repeat_interleave(torch.arange(len(z)), torch.tensor([len(part) for part in z]))
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(rows), (2, 20_000), generator=generator)
    other = episode[first] != episode[second]
    # In parts: z may be wide.
    parts = [
        (rows[a] - rows[b]).square().mean((1, 2))
        for a, b in zip(first[other].split(1024), second[other].split(1024), strict=True)
    ]
    return float(torch.cat(parts).mean())
