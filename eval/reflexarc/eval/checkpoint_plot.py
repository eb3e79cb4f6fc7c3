"""Does a smaller validation loss mean more success? Both of several checkpoints of one run.

Losses of recorded chunks and success in closed loop measure different things, and the checkpoint
of the least loss need not be the best one. Here both stand beside each other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.arms import Arm
from reflexarc.eval.intervals import Interval, wilson_interval
from reflexarc.eval.offline_summary import write_atomically
from reflexarc.eval.report_html.palette import LIGHT
from reflexarc.eval.saved_run import read_results

_DOTS_PER_INCH = 130


class CheckpointPoint(FrozenModel):
    """One checkpoint.

    Attributes:
        step: optimiser steps that it had been trained.
        value: of the metric on the held-out episodes; less is better.
        successes, episodes: in closed loop.
    """

    step: int
    value: float
    successes: int
    episodes: int

    @property
    def success(self) -> Interval:
        return wilson_interval(self.successes, self.episodes)


def validation_values(metrics: Path, metric: str) -> dict[int, float]:
    """Step to the value that a run's ``metrics.jsonl`` has of it. ConfigError where it has none."""
    found: dict[int, float] = {}
    names: set[str] = set()
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("kind") == "validation":
            names |= record.keys() - {"kind", "step", "epoch"}
            if metric in record:
                found[int(record["step"])] = float(record[metric])
    if not found:
        raise ConfigError(
            f"{metrics} holds no validation of {metric!r}, but of: {', '.join(sorted(names))}",
            field="metric",
        )
    return found


def checkpoint_points(
    steps: Mapping[str, int], values: Mapping[int, float], results: Sequence[Path], arm: Arm
) -> list[CheckpointPoint]:
    """Sorted by step, from results folders of ``eval libero``.

    Args:
        steps: fingerprint of each checkpoint of the run to its step.
        values: step to metric.

    Raises ConfigError for results of a checkpoint of another run, or of one without a validation,
    and for results of different episodes.
    """
    points, first = [], None
    for folder in results:
        episodes = [one for one in read_results(folder) if one.arm == arm]
        if not episodes:
            raise ConfigError(f"{folder} holds no episode of the arm {arm!r}", field="arm")
        fingerprint = episodes[0].checkpoint_fingerprint
        step = steps.get(fingerprint)
        if step is None or step not in values:
            raise ConfigError(
                f"{folder} was measured on the checkpoint {fingerprint[:12]}, of which the run has "
                f"{'no folder' if step is None else f'no validation (step {step})'}; name the run "
                "that it belongs to, trained with training.keep_every",
                field="results",
            )
        which = {(one.task, one.state) for one in episodes}
        first = which if first is None else first
        if which != first:
            raise ConfigError(
                f"{folder} holds other tasks and states than {results[0]}; run all checkpoints on "
                "the same --tasks and --states",
                field="results",
            )
        successes = sum(one.success for one in episodes)
        points.append(CheckpointPoint(step=step, value=values[step], successes=successes,
                                      episodes=len(episodes)))  # fmt: skip
    return sorted(points, key=lambda point: point.step)


def rank_correlation(points: Sequence[CheckpointPoint]) -> float | None:
    """Spearman's, of the metric with success; None where one of them does not vary."""
    values, rates = zip(*((p.value, p.success.estimate) for p in points), strict=True)
    if len(set(values)) < 2 or len(set(rates)) < 2:
        return None
    return float(spearmanr(values, rates).statistic)


def markdown(points: Sequence[CheckpointPoint], metric: str) -> str:
    lines = [f"| step | {metric}, held out | success | 95 % |", "|--:|--:|--:|--:|"]
    for point in points:
        rate = point.success
        lines.append(
            f"| {point.step:,} | {point.value:.4f} | {point.successes}/{point.episodes} | "
            f"{100 * rate.low:.0f} to {100 * rate.high:.0f} |"
        )
    rank = rank_correlation(points)
    if rank is not None:
        lines += ["", f"Rank correlation (Spearman) of {metric} with success: {rank:.2f}."]
    return "\n".join(lines) + "\n"


def write_checkpoint_plot(points: Sequence[CheckpointPoint], metric: str, path: Path) -> None:
    """A PNG, written atomically: both over the training on the left, against each other right."""
    loss_colour, success_colour = LIGHT.series[1], LIGHT.series[0]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over, against = figure.subplots(1, 2)
    steps = [point.step for point in points]
    rates = [100 * point.success.estimate for point in points]
    below = [100 * (p.success.estimate - p.success.low) for p in points]
    above = [100 * (p.success.high - p.success.estimate) for p in points]
    values = [point.value for point in points]
    over.errorbar(steps, rates, yerr=[below, above], color=success_colour, marker="o", capsize=3)
    over.set(xlabel="step", ylim=(-3, 103))
    over.set_ylabel("success in closed loop, % (95 %)", color=success_colour)
    beside = over.twinx()
    beside.plot(steps, values, color=loss_colour, marker="s", linestyle="--")
    beside.set_ylabel(f"{metric}, held out", color=loss_colour)
    against.errorbar(values, rates, yerr=[below, above], color=success_colour, marker="o",
                     capsize=3, linestyle="none")  # fmt: skip
    for point, rate in zip(points, rates, strict=True):
        against.annotate(f"{point.step:,}", (point.value, rate), xytext=(5, 4),
                         textcoords="offset points", fontsize=8)  # fmt: skip
    against.margins(x=0.12)
    against.set(xlabel=f"{metric}, held out", ylabel="success, %", ylim=(-3, 103))
    rank = rank_correlation(points)
    if rank is not None:
        against.set_title(f"rank correlation {rank:.2f}", fontsize=9)
    for axes in (over, against):
        axes.grid(color=LIGHT.grid, linewidth=0.6)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    write_atomically(path, picture.getvalue())
