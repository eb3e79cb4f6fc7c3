"""The report of ``reflexarc eval replay-demos``: a row a task, and the rule for what followed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.intervals import wilson_interval
from reflexarc.eval.replay_demos import ReplaySettings
from reflexarc.eval.replay_episode import NEAR_METRES, NEAR_RADIANS, Replayed, ReplayIdentity


class ReplayRow(FrozenModel):
    """One line of the report: a task, or all of them."""

    name: str
    episodes: int
    successes: int
    followed: int
    low: float
    high: float
    median_steps: float
    position_error_mm: float
    rotation_error: float


def summary_rows(results: Sequence[Replayed]) -> list[ReplayRow]:
    """A row a task, and last one of all; errors are the largest."""
    names = list(dict.fromkeys(one.task for one in results))
    groups = [(name, [one for one in results if one.task == name]) for name in names]
    rows = []
    for name, members in [*groups, ("all", list(results))]:
        successes = sum(one.success for one in members)
        interval = wilson_interval(successes, len(members))
        rows.append(
            ReplayRow(
                name=name,
                episodes=len(members),
                successes=successes,
                followed=sum(one.followed for one in members),
                low=interval.low,
                high=interval.high,
                median_steps=median(one.steps for one in members),
                position_error_mm=1000 * max(one.position_error for one in members),
                rotation_error=max(one.rotation_error for one in members),
            )
        )
    return rows


def markdown(run: ReplayIdentity, rows: Sequence[ReplayRow]) -> str:
    """The report: what was done, and a table."""
    lines = [
        f"# Replay of demonstrations: {run.mistakes.in_words}",
        "",
        f"{run.suite}, {rows[-1].episodes} demonstrations. *Followed*: the hand never strayed "
        f"more than {1000 * NEAR_METRES:g} mm and {NEAR_RADIANS:g} rad from the recorded one. "
        "Errors are the largest.",
        "",
        "| task | success | 95 % | followed | median steps | position (mm) | rotation (rad) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.successes} of {row.episodes} | {100 * row.low:.0f} to "
            f"{100 * row.high:.0f} | {row.followed} of {row.episodes} | {row.median_steps:g} | "
            f"{row.position_error_mm:.2f} | {row.rotation_error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write_replay(output: Path, settings: ReplaySettings, results: Sequence[Replayed]) -> None:
    """``replay.json`` with every demonstration, and ``replay.md``."""
    rows = summary_rows(results)
    values = {
        "settings": settings.model_dump(mode="json"),
        "rows": [row.model_dump() for row in rows],
        "demonstrations": [one.model_dump(exclude={"run"}) for one in results],
    }
    output.mkdir(parents=True, exist_ok=True)
    texts = {"replay.json": json.dumps(values, indent=1), "replay.md": markdown(settings.run, rows)}
    for name, text in texts.items():
        temporary = output / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output / name)
