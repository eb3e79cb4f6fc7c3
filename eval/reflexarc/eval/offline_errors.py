"""How far predicted chunks lie from recorded ones: sums of one episode, from which all follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from reflexarc.client import ChunkPolicy
from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.offline_data import RecordedEpisode
from reflexarc.eval.offline_settings import OfflineIdentity

Table = tuple[tuple[float, ...], ...]


class GripperCounts(FrozenModel):
    """Commands by what was recorded: how many there were, and how many were predicted so."""

    open: int = 0
    open_correct: int = 0
    closed: int = 0
    closed_correct: int = 0

    @property
    def total(self) -> int:
        return self.open + self.closed

    @property
    def correct(self) -> int:
        return self.open_correct + self.closed_correct


class OfflineEpisode(FrozenModel):
    """One finished episode: H positions in a chunk, D action dimensions, T recorded actions.

    Attributes:
        name: ``file/demo``.
        data_sha256: of instruction, asked steps and compared actions.
        questions: observations that were sent.
        count: ``(H,)`` compared actions at each position; those past the episode's end are none.
        absolute, squared: ``(H, D)`` sums of the absolute and squared errors, action units.
        gripper: ``(H,)`` counts of its commands, empty where the contract has no gripper.
        rows: T; label_sum and label_squares ``(D,)`` are sums over these recorded actions.
        latency_median_ms: of one request, as the client saw it.
    """

    identity: OfflineIdentity
    name: str
    task_name: str
    instruction: str
    data_sha256: str
    questions: int
    count: tuple[int, ...]
    absolute: Table
    squared: Table
    gripper: tuple[GripperCounts, ...]
    rows: int
    label_sum: tuple[float, ...]
    label_squares: tuple[float, ...]
    latency_median_ms: float
    seconds: float


@dataclass
class _Sums:
    count: npt.NDArray[np.int64]
    absolute: npt.NDArray[np.float64]
    squared: npt.NDArray[np.float64]
    gripper: npt.NDArray[np.int64]  # (H, 4): open, open_correct, closed, closed_correct

    @classmethod
    def zero(cls, horizon: int, dimension: int) -> _Sums:
        return cls(
            np.zeros(horizon, np.int64),
            np.zeros((horizon, dimension)),
            np.zeros((horizon, dimension)),
            np.zeros((horizon, 4), np.int64),
        )


def compare_episode(
    recorded: RecordedEpisode,
    contract: PolicyContract,
    policy: ChunkPolicy,
    identity: OfflineIdentity,
    on_answer: Callable[[], object],
) -> OfflineEpisode:
    """Ask the policy at every step of the episode; ``on_answer`` is called after each chunk.

    Raises what the client raises, and DatasetError for rows that cannot be read.
    """
    started = perf_counter()
    action = contract.action
    chunks, mask = recorded.chunks(action.horizon)
    sums = _Sums.zero(action.horizon, action.dimension)
    latencies = []
    observations = recorded.observations(contract, identity.seed)
    for observation, chunk, present in zip(observations, chunks, mask, strict=True):
        asked = perf_counter()
        answer = policy.infer(observation)
        latencies.append((perf_counter() - asked) * 1000)
        _add(sums, contract, answer.actions.astype(np.float64), chunk, present)
        on_answer()
    labels = recorded.actions()
    return OfflineEpisode(
        identity=identity,
        name=recorded.name,
        task_name=recorded.episode.task_name,
        instruction=recorded.episode.instruction,
        data_sha256=recorded.sha256(),
        questions=len(latencies),
        count=tuple(sums.count.tolist()),
        absolute=_table(sums.absolute),
        squared=_table(sums.squared),
        gripper=_gripper(sums) if action.gripper is not None else (),
        rows=len(labels),
        label_sum=tuple(labels.sum(0).tolist()),
        label_squares=tuple((labels**2).sum(0).tolist()),
        latency_median_ms=round(median(latencies), 3),
        seconds=round(perf_counter() - started, 3),
    )


def _add(
    sums: _Sums,
    contract: PolicyContract,
    predicted: npt.NDArray[np.float64],
    recorded: npt.NDArray[np.float64],
    present: npt.NDArray[np.bool_],
) -> None:
    error = np.where(present[:, None], predicted - recorded, 0.0)
    sums.count += present
    sums.absolute += np.abs(error)
    sums.squared += error**2
    gripper = contract.action.gripper
    if gripper is None:
        return
    middle, direction = (gripper.open + gripper.closed) / 2, gripper.closed - gripper.open
    closes = (recorded[:, gripper.index] - middle) * direction > 0
    right = closes == ((predicted[:, gripper.index] - middle) * direction > 0)
    sums.gripper += np.stack(
        [present & kind & outcome for kind in (~closes, closes) for outcome in (True, right)],
        axis=1,
    )


def _gripper(sums: _Sums) -> tuple[GripperCounts, ...]:
    names = ("open", "open_correct", "closed", "closed_correct")
    return tuple(
        GripperCounts(**dict(zip(names, map(int, row), strict=True))) for row in sums.gripper
    )


def _table(values: npt.NDArray[np.float64]) -> Table:
    return tuple(tuple(row) for row in values.tolist())
