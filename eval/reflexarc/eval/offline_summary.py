"""Errors by action dimension, by position in the chunk and by task, with intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.offline_errors import GripperCounts, OfflineEpisode
from reflexarc.eval.offline_settings import OfflineIdentity

RESAMPLES = 2000
MAX_BUCKETS = 5
_MINIMUM_SCALE = 1e-6  # as in training: a constant dimension is not divided
# LIBERO's controller: what an action of 1 asks for in one step.
LIBERO_UNITS = {
    **{f"delta_{axis}": (50.0, "mm") for axis in "xyz"},
    **{f"delta_r{axis}": (float(np.degrees(0.5)), "°") for axis in "xyz"},
}
FloatArray = npt.NDArray[np.float64]


class Estimate(FrozenModel):
    """A mean over actions; the interval is over episodes, None with fewer than two of them."""

    value: float
    low: float | None = None
    high: float | None = None


class DimensionErrors(FrozenModel):
    """Errors of one action dimension.

    ``mae`` and ``mse`` are in action units. ``mae_physical`` is in ``physical_unit``, where it is
    known. The normalised ones are divided by ``scale`` and its square; None for the gripper.
    """

    name: str
    mae: float
    mse: float
    mae_physical: float | None
    physical_unit: str | None
    scale: float | None
    mae_normalized: float | None
    mse_normalized: float | None


class Bucket(FrozenModel):
    """Positions ``first`` to ``last`` of a chunk, counted from 1; the means leave the gripper out.

    ``dimension_mae`` is in action units.
    """

    first: int
    last: int
    actions: int
    mae_normalized: float
    mse_normalized: float
    dimension_mae: tuple[float, ...]
    gripper: GripperCounts | None


class OfflineGroup(FrozenModel):
    """One task, or all of them (``task_name`` is None).

    ``mae`` and ``mse`` are means over actions and dimensions without the gripper; ``gripper_rate``
    is the share of gripper commands that were predicted as recorded.
    """

    task_name: str | None
    instruction: str
    episodes: int
    questions: int
    actions: int
    mae: Estimate
    mse: Estimate
    mae_normalized: Estimate
    mse_normalized: Estimate
    gripper: GripperCounts | None
    gripper_rate: Estimate | None
    dimensions: tuple[DimensionErrors, ...]


class OfflineSummary(FrozenModel):
    """What ``summary.json`` holds.

    Attributes:
        scale_source: where the normalising deviations come from: the checkpoint's training data,
            as the server states them, or the compared episodes themselves.
        interval: how the intervals were made.
        buckets: the chunk in at most five parts; positions: every position by itself.
        complete: whether every asked episode is in it.
    """

    identity: OfflineIdentity
    scale_source: Literal["checkpoint", "data"]
    interval: str
    complete: bool
    versions: dict[str, str]
    latency_median_ms: float
    buckets: tuple[Bucket, ...]
    positions: tuple[Bucket, ...]
    tasks: tuple[OfflineGroup, ...]
    total: OfflineGroup


def summarize_offline(
    episodes: Sequence[OfflineEpisode],
    contract: PolicyContract,
    *,
    action_std: tuple[float, ...] | None,
    complete: bool,
) -> OfflineSummary:
    """Summarise at least one episode. ``action_std``: of the checkpoint, None to use the data's."""
    scale = _scale(episodes, action_std)
    tasks = list(dict.fromkeys(episode.task_name for episode in episodes))
    groups = [
        _group([e for e in episodes if e.task_name == task], task, contract, scale)
        for task in tasks
    ]
    return OfflineSummary(
        identity=episodes[0].identity,
        scale_source="data" if action_std is None else "checkpoint",
        interval=f"95 % percentile bootstrap over episodes, {RESAMPLES} resamples",
        complete=complete,
        versions={name: version(name) for name in ("reflexarc", "numpy", "scipy")},
        latency_median_ms=median(episode.latency_median_ms for episode in episodes),
        buckets=_buckets(episodes, contract, scale, MAX_BUCKETS),
        positions=_buckets(episodes, contract, scale, contract.action.horizon),
        tasks=tuple(groups),
        total=_group(episodes, None, contract, scale),
    )


def write_offline_summary(summary: OfflineSummary, folder: Path) -> None:
    """Write ``summary.json`` and ``offline.md``, each atomically."""
    from reflexarc.eval.offline_report import markdown

    write_atomically(folder / "summary.json", summary.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(folder / "offline.md", markdown(summary).encode())


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _scale(episodes: Sequence[OfflineEpisode], stated: tuple[float, ...] | None) -> FloatArray:
    if stated is not None:
        std = np.array(stated)
    else:
        rows = sum(episode.rows for episode in episodes)
        mean = np.sum([episode.label_sum for episode in episodes], axis=0) / rows
        squares = np.sum([episode.label_squares for episode in episodes], axis=0) / rows
        std = np.sqrt(np.maximum(squares - mean**2, 0.0))
    return np.where(std < _MINIMUM_SCALE, 1.0, std)


def _motion(contract: PolicyContract) -> npt.NDArray[np.int64]:
    """Indices of the dimensions that are not the gripper."""
    gripper = contract.action.gripper
    indices = range(contract.action.dimension)
    return np.array([i for i in indices if gripper is None or i != gripper.index])


def _group(
    episodes: Sequence[OfflineEpisode],
    task_name: str | None,
    contract: PolicyContract,
    scale: FloatArray,
) -> OfflineGroup:
    absolute = np.array([np.sum(episode.absolute, axis=0) for episode in episodes])  # (E, D)
    squared = np.array([np.sum(episode.squared, axis=0) for episode in episodes])
    counts = np.array([sum(episode.count) for episode in episodes])
    motion = _motion(contract)
    gripper = [_added(episode.gripper) for episode in episodes] if episodes[0].gripper else []
    return OfflineGroup(
        task_name=task_name,
        instruction=episodes[0].instruction if task_name is not None else "all tasks",
        episodes=len(episodes),
        questions=sum(episode.questions for episode in episodes),
        actions=int(counts.sum()),
        mae=_estimate(absolute[:, motion].mean(1), counts),
        mse=_estimate(squared[:, motion].mean(1), counts),
        mae_normalized=_estimate((absolute / scale)[:, motion].mean(1), counts),
        mse_normalized=_estimate((squared / scale**2)[:, motion].mean(1), counts),
        gripper=_added(gripper) if gripper else None,
        gripper_rate=_estimate(
            np.array([float(one.correct) for one in gripper]),
            np.array([one.total for one in gripper]),
        )
        if gripper
        else None,
        dimensions=_dimensions(absolute.sum(0), squared.sum(0), int(counts.sum()), contract, scale),
    )


def _dimensions(
    absolute: FloatArray,
    squared: FloatArray,
    count: int,
    contract: PolicyContract,
    scale: FloatArray,
) -> tuple[DimensionErrors, ...]:
    motion = set(_motion(contract).tolist())
    found = []
    for index, name in enumerate(contract.action.names):
        mae, mse = float(absolute[index] / count), float(squared[index] / count)
        factor, unit = LIBERO_UNITS.get(name, (None, None))
        divisor = float(scale[index]) if index in motion else None
        found.append(
            DimensionErrors(
                name=name,
                mae=mae,
                mse=mse,
                mae_physical=None if factor is None else mae * factor,
                physical_unit=unit,
                scale=divisor,
                mae_normalized=None if divisor is None else mae / divisor,
                mse_normalized=None if divisor is None else mse / divisor**2,
            )
        )
    return tuple(found)


def _buckets(
    episodes: Sequence[OfflineEpisode], contract: PolicyContract, scale: FloatArray, most: int
) -> tuple[Bucket, ...]:
    absolute = np.sum([episode.absolute for episode in episodes], axis=0)  # (H, D)
    squared = np.sum([episode.squared for episode in episodes], axis=0)
    counts = np.sum([episode.count for episode in episodes], axis=0)
    motion, horizon = _motion(contract), contract.action.horizon
    found = []
    for rows in np.array_split(np.arange(horizon), min(horizon, most)):
        count = int(counts[rows].sum())
        if count == 0:  # no episode is that long
            continue
        gripper = [episode.gripper[row] for episode in episodes if episode.gripper for row in rows]
        found.append(
            Bucket(
                first=int(rows[0]) + 1,
                last=int(rows[-1]) + 1,
                actions=count,
                mae_normalized=float(
                    (absolute / scale)[rows][:, motion].sum() / count / len(motion)
                ),
                mse_normalized=float(
                    (squared / scale**2)[rows][:, motion].sum() / count / len(motion)
                ),
                dimension_mae=tuple((absolute[rows].sum(0) / count).tolist()),
                gripper=_added(gripper) if gripper else None,
            )
        )
    return tuple(found)


def _mean(sums: FloatArray, count: int) -> float:
    """Over ``count`` actions and the columns of ``sums (P, D)``."""
    return float(sums.sum() / count / sums.shape[1])


def _added(counts: Sequence[GripperCounts]) -> GripperCounts:
    names = GripperCounts.model_fields
    return GripperCounts(**{name: sum(getattr(one, name) for one in counts) for name in names})


def _estimate(sums: FloatArray, counts: npt.NDArray[np.int64]) -> Estimate:
    """Sum over count, both ``(E,)`` by episode; neighbouring frames are alike, episodes are not."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(value=value)
    limits = bootstrap(
        (sums, counts),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value=value, low=float(limits.low), high=float(limits.high))
