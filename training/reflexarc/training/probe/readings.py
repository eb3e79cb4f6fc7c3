"""Fit the probes and score them on held-out episodes: per task and over all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reflexarc.training.probe.episodes import Frames, Rows
from reflexarc.training.probe.inputs import Inputs, Z
from reflexarc.training.probe.ridge import Floats, fit_ridge
from reflexarc.training.probe.scores import EpisodeSums, interval, resamples

ALL_TASKS = "all tasks"
TARGET = "target object"
ALWAYS, BEFORE, AFTER = "all", "before touch", "after grasp"

_FEWEST_FRAMES = 10


@dataclass(frozen=True)
class Score:
    """Of one input: R² (None where the target does not vary) with its 95 % interval, RMSE."""

    r2: float | None
    r2_interval: tuple[float, float] | None
    rmse_mm: float
    strength: float


@dataclass(frozen=True)
class Reading:
    """How well one target is read in one scope and phase.

    Attributes:
        scope: a task, or all of them with one probe.
        frames, episodes: that it was tested on.
        std_mm: deviation of the target around its mean in the task's training episodes.
        scores: by input.
        z_minus: R² of z minus that of another input, with its interval.
    """

    scope: str
    target: str
    phase: str
    frames: int
    episodes: int
    std_mm: float
    scores: Mapping[str, Score]
    z_minus: Mapping[str, tuple[float, tuple[float, float] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    name: str
    values: Floats  # (F, D), NaN where it does not exist


def read_all(frames: Frames, inputs: Inputs, test: Rows, *, seed: int = 0) -> Iterator[Reading]:
    """Every reading, all tasks first. ``test (F,)`` says which frames test the probes."""
    scopes: list[tuple[str, Rows]] = [(ALL_TASKS, np.ones(len(test), dtype=bool))]
    if len(frames.task_names) > 1:
        scopes += [(name, frames.task == i) for i, name in enumerate(frames.task_names)]
    else:
        scopes = [(frames.task_names[0], scopes[0][1])]
    for scope, rows in scopes:
        general = [_Target(name, values) for name, values in frames.general.items()]
        target, objects = _Target(TARGET, frames.target), _objects(frames, rows)
        for phase, within, targets in (
            (ALWAYS, rows, [*general, target, *objects]),
            (BEFORE, rows & ~frames.touched, [target]),
            (AFTER, rows & frames.grasped, [target]),
        ):
            for group, there in _by_rows(targets, within):
                yield from _read(frames, inputs, test, there, scope, phase, group, seed)


def _objects(frames: Frames, rows: Rows) -> list[_Target]:
    return [
        _Target(name, values)
        for name, values in frames.objects.items()
        if np.isfinite(values[rows, 0]).any()
    ]


def _by_rows(targets: list[_Target], rows: Rows) -> list[tuple[list[_Target], Rows]]:
    """Targets that exist in the same frames share one fit."""
    groups: dict[bytes, tuple[list[_Target], Rows]] = {}
    for target in targets:
        there = rows & np.isfinite(target.values[:, 0])
        groups.setdefault(there.tobytes(), ([], there))[0].append(target)
    return list(groups.values())


def _read(
    frames: Frames,
    inputs: Inputs,
    test: Rows,
    rows: Rows,
    scope: str,
    phase: str,
    targets: list[_Target],
    seed: int,
) -> Iterator[Reading]:
    fit, held = rows & ~test, rows & test
    enough = len(np.unique(frames.episode[fit])) >= 2 and fit.sum() >= _FEWEST_FRAMES
    if not (enough and held.any()):
        return
    values = np.concatenate([target.values for target in targets], axis=1)
    widths = [target.values.shape[1] for target in targets]
    mean = _training_means(values, frames, fit, held)
    among = np.unique(frames.episode[held])
    tasks = np.array([frames.task[frames.episode == episode][0] for episode in among])
    weights = resamples(tasks, seed=seed)
    errors, strengths = {}, {}
    for name, x in inputs.items():
        fitted = fit_ridge(x[fit], values[fit], frames.episode[fit], widths, seed=seed)
        errors[name] = np.square(fitted.predict(x[held]) - values[held])
        strengths[name] = fitted.strengths
    spread = np.square(values[held] - mean)
    stops = np.cumsum(widths)
    for i, (target, stop) in enumerate(zip(targets, stops, strict=True)):
        part = slice(int(stop) - widths[i], int(stop))
        sums = {
            name: EpisodeSums.over(
                error[:, part].sum(1), spread[:, part].sum(1), frames.episode[held], among
            )
            for name, error in errors.items()
        }
        yield _reading(
            sums, weights, {name: s[i] for name, s in strengths.items()}, scope, target.name, phase
        )


def _training_means(values: Floats, frames: Frames, fit: Rows, held: Rows) -> Floats:
    """``(held frames, m)``: the mean of each frame's own task in the fitted episodes.

    With the mean of all tasks, telling the tasks apart would look like seeing where things are.
    """
    everywhere = values[fit].mean(0)
    means = np.tile(everywhere, (len(frames.task_names), 1))
    for task in np.unique(frames.task[fit]):
        means[task] = values[fit & (frames.task == task)].mean(0)
    return np.asarray(means[frames.task[held]])


def _reading(
    sums: Mapping[str, EpisodeSums],
    weights: Floats,
    strengths: Mapping[str, float],
    scope: str,
    target: str,
    phase: str,
) -> Reading:
    varies = next(iter(sums.values())).varies()
    several = weights.shape[1] > 1
    resampled = {name: s.resampled_r2(weights) for name, s in sums.items()}
    scores = {
        name: Score(
            r2=s.r2() if varies else None,
            r2_interval=interval(resampled[name]) if varies and several else None,
            rmse_mm=s.rmse_mm(),
            strength=strengths[name],
        )
        for name, s in sums.items()
    }
    z_minus: dict[str, Any] = {}
    if varies and Z in sums:
        for name, s in sums.items():
            if name != Z:
                between = interval(resampled[Z] - resampled[name]) if several else None
                z_minus[name] = (sums[Z].r2() - s.r2(), between)
    some = next(iter(sums.values()))
    return Reading(
        scope=scope,
        target=target,
        phase=phase,
        frames=int(some.frames.sum()),
        episodes=int((some.frames > 0).sum()),
        std_mm=some.spread_mm(),
        scores=scores,
        z_minus=z_minus,
    )
