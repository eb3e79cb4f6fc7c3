"""Two evaluations of the same initial states, side by side: ``reflexarc eval compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reflexarc.client import ExecutorName
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.arms import Arm
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.execution import execution_in_words
from reflexarc.eval.intervals import (
    PairedCounts,
    mcnemar_exact,
    paired_difference,
    wilson_interval,
)
from reflexarc.eval.results import EpisodeKey, EpisodeResult
from reflexarc.eval.saved_run import RUN_FIELDS, read_results
from reflexarc.eval.summary import RateSummary

# May differ, and is then said: it changes what a success means, or what the policy was asked.
_CONDITIONS = (
    "max_steps", "replan_steps", "wait_steps", "seed", "executor", "injected_latency_ms",
)  # fmt: skip
Pair = tuple[EpisodeResult, EpisodeResult]


class RunSide(FrozenModel):
    """One of the two runs: where it came from, and what its episodes share."""

    name: str
    folder: str
    suite: str
    seed: int
    max_steps: int
    replan_steps: int
    wait_steps: int
    executor: ExecutorName
    injected_latency_ms: float
    checkpoint_fingerprint: str
    contract_sha256: str

    @property
    def execution(self) -> str:
        """How chunks are executed, in words."""
        return execution_in_words(self.executor, self.replan_steps, self.injected_latency_ms)


class ComparedGroup(FrozenModel):
    """One task, or all of them (``task`` is None), over the episodes that both runs have.

    ``difference`` is A's rate minus B's, with the 95 % interval of Newcombe's method 10;
    ``mcnemar_p`` is exact and two-sided.
    """

    task: int | None
    instruction: str
    pairs: int
    a: RateSummary
    b: RateSummary
    both: int
    a_only: int
    b_only: int
    neither: int
    difference: float
    low: float
    high: float
    mcnemar_p: float


class Disagreement(FrozenModel):
    """An episode that one run solved and the other did not."""

    task: int
    state: int
    other_task: int | None
    instruction: str
    solved_by: str
    a_steps: int
    b_steps: int


class Comparison(FrozenModel):
    """What ``compare.json`` holds.

    Attributes:
        warnings: in what the runs differ beside their policy, and episodes that only one has.
    """

    arm: Arm
    a: RunSide
    b: RunSide
    states: tuple[int, ...]
    warnings: tuple[str, ...]
    tasks: tuple[ComparedGroup, ...]
    total: ComparedGroup
    disagreements: tuple[Disagreement, ...]

    @property
    def same_checkpoint(self) -> bool:
        """Whether both runs asked one checkpoint (one without fingerprint is never the same)."""
        fingerprint = self.a.checkpoint_fingerprint
        return bool(fingerprint) and fingerprint == self.b.checkpoint_fingerprint


def compare(a: Path, b: Path, arm: Arm = "policy") -> Comparison:
    """Pair the episodes of two results folders by task and initial state.

    Raises ResultsError for a folder without results, for different suites or task names, for an
    arm that a folder lacks, and when there is no episode that both have.
    """
    results_a, results_b = read_results(a), read_results(b)
    side_a, side_b = _side("A", a, results_a[0]), _side("B", b, results_b[0])
    if side_a.suite != side_b.suite:
        raise ResultsError(
            f"{a} is of {side_a.suite} and {b} of {side_b.suite}: their tasks are different ones; "
            "compare runs of one suite",
            field="suite",
        )
    episodes_a, episodes_b = _of_arm(a, results_a, arm), _of_arm(b, results_b, arm)
    keys = sorted(episodes_a.keys() & episodes_b.keys(), key=_order)
    if not keys:
        raise ResultsError(
            f"{a} and {b} have no episode of {arm} in common: {_covered(episodes_a)} there, "
            f"{_covered(episodes_b)} here; evaluate both on the same --tasks and --states"
        )
    pairs = [(episodes_a[key], episodes_b[key]) for key in keys]
    _refuse_other_tasks(pairs)
    by_task = {key.task: [p for p in pairs if p[0].task == key.task] for key in keys}
    return Comparison(
        arm=arm,
        a=side_a,
        b=side_b,
        states=tuple(sorted({key.state for key in keys})),
        warnings=tuple(_warnings(side_a, side_b, episodes_a, episodes_b)),
        tasks=tuple(_group(task, rows[0][0].instruction, rows) for task, rows in by_task.items()),
        total=_group(None, "all tasks", pairs),
        disagreements=tuple(_disagreement(p) for p in pairs if p[0].success != p[1].success),
    )


def _side(name: str, folder: Path, first: EpisodeResult) -> RunSide:
    shared = {field: getattr(first, field) for field in RUN_FIELDS}
    return RunSide(name=name, folder=str(folder), **shared)


def _of_arm(
    folder: Path, results: Sequence[EpisodeResult], arm: Arm
) -> dict[EpisodeKey, EpisodeResult]:
    found = {result.key: result for result in results if result.arm == arm}
    if not found:
        there = ", ".join(sorted({result.arm for result in results}))
        raise ResultsError(f"{folder} has no episode of {arm}; it has {there}", field="arm")
    return found


def _order(key: EpisodeKey) -> tuple[int, int, int]:
    return key.task, key.state, -1 if key.other_task is None else key.other_task


def _covered(episodes: dict[EpisodeKey, EpisodeResult]) -> str:
    tasks = sorted({key.task for key in episodes})
    states = sorted({key.state for key in episodes})
    return f"tasks {tasks}, states {states}"


def _refuse_other_tasks(pairs: Sequence[Pair]) -> None:
    for first, second in pairs:
        if first.task_name != second.task_name:
            raise ResultsError(
                f"task {first.task} is {first.task_name!r} in one folder and "
                f"{second.task_name!r} in the other: the suites are of different versions",
                field="task_name",
            )


def _warnings(
    a: RunSide,
    b: RunSide,
    episodes_a: dict[EpisodeKey, EpisodeResult],
    episodes_b: dict[EpisodeKey, EpisodeResult],
) -> list[str]:
    found = [
        f"{name}: A has {getattr(a, name)}, B has {getattr(b, name)}"
        for name in _CONDITIONS
        if getattr(a, name) != getattr(b, name)
    ]
    for name, mine, other in (("A", episodes_a, episodes_b), ("B", episodes_b, episodes_a)):
        alone = len(mine.keys() - other.keys())
        if alone:
            verb = "episode is" if alone == 1 else "episodes are"
            left_out = "is left out" if alone == 1 else "are left out"
            found.append(f"{alone} {verb} only in {name} and {left_out}")
    return found


def _group(task: int | None, instruction: str, pairs: Sequence[Pair]) -> ComparedGroup:
    counts = PairedCounts.from_outcomes([(a.success, b.success) for a, b in pairs])
    interval = paired_difference(counts)
    return ComparedGroup(
        task=task,
        instruction=instruction,
        pairs=counts.total,
        a=_rate(counts.both + counts.first_only, counts.total),
        b=_rate(counts.both + counts.second_only, counts.total),
        both=counts.both,
        a_only=counts.first_only,
        b_only=counts.second_only,
        neither=counts.neither,
        difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        mcnemar_p=mcnemar_exact(counts),
    )


def _rate(successes: int, trials: int) -> RateSummary:
    interval = wilson_interval(successes, trials)
    return RateSummary(
        successes=successes,
        trials=trials,
        rate=interval.estimate,
        low=interval.low,
        high=interval.high,
    )


def _disagreement(pair: Pair) -> Disagreement:
    a, b = pair
    return Disagreement(
        task=a.task,
        state=a.state,
        other_task=a.other_task,
        instruction=a.instruction,
        solved_by="A" if a.success else "B",
        a_steps=a.steps,
        b_steps=b.steps,
    )
