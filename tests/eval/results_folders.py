"""Results folders as a run leaves them: real files, real videos, no simulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reflexarc.eval.arms import Arm
from reflexarc.eval.results import EpisodeResult, ResultsLog, RunIdentity
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.summary import summarize, write_summary
from reflexarc.eval.videos import write_video

IDENTITY = RunIdentity(
    suite="libero_goal",
    seed=0,
    max_steps=300,
    replan_steps=8,
    wait_steps=10,
    checkpoint_fingerprint="f" * 64,
    contract_sha256="c" * 64,
    demonstrations={0: "d" * 64, 9: "d" * 64},
)
INSTRUCTIONS = {0: "open the drawer", 9: "put the bowl on the stove"}


def episode(
    task: int,
    state: int,
    success: bool,
    arm: Arm = "policy",
    identity: RunIdentity = IDENTITY,
    **changes: object,
) -> EpisodeResult:
    shared = identity.model_dump(exclude={"demonstrations", "goals"})
    asked = arm != "replay"
    values = {
        **shared,
        "task": task,
        "task_name": f"task_{task}",
        "instruction": INSTRUCTIONS[task],
        "state": state,
        "arm": arm,
        "success": success,
        "reason": "success" if success else "timeout",
        "steps": 100 + state if success else identity.max_steps,
        "seconds": 9.5,
        "chunks": 15 if asked else 0,
        "latency_median_ms": 40.0 + state if asked else None,
        "latency_max_ms": 90.0 + state if asked else None,
        "demonstration_sha256": None if asked else "d" * 64,
    }
    return EpisodeResult.model_validate({**values, **changes})


def told_another(task: int, state: int, *, named: bool) -> EpisodeResult:
    """An episode of ``other_instruction`` that missed its own goal."""
    other = 9 if task == 0 else 0
    return episode(
        task,
        state,
        False,
        "other_instruction",
        reason="named_goal" if named else "timeout",
        steps=130 if named else 300,
        other_task=other,
        told_instruction=INSTRUCTIONS[other],
        original_success=False,
        named_success=named,
        first_goal="named" if named else None,
    )


def filmed(folder: Path, result: EpisodeResult, frames: int = 20) -> EpisodeResult:
    """The same episode with a video of grey levels that rise from step to step."""
    name = f"task{result.task:02d}_state{result.state:02d}_{result.arm}.mp4"
    levels = np.linspace(0, 240, frames).astype(np.uint8)
    pictures = [
        (8 * n, {c: np.full((64, 64, 3), level, np.uint8) for c in ("agentview", "eye_in_hand")})
        for n, level in enumerate(levels)
    ]
    outcome = "success" if result.success else "failure"
    write_video(
        folder / "videos" / name, pictures, "x", outcome, good=result.success, replan_steps=8
    )
    return result.model_copy(update={"video": name})


def write_folder(
    folder: Path, results: Sequence[EpisodeResult], identity: RunIdentity = IDENTITY
) -> Path:
    """Write results and summary as ``evaluate`` does."""
    with ResultsLog(folder, identity) as log:
        for result in results:
            log.append(result)
    settings = RunSettings(
        server="ws://127.0.0.1:1",
        suite=identity.suite,
        tasks=tuple(sorted({result.task for result in results})),
        states=tuple(sorted({result.state for result in results})),
        baselines=tuple({r.arm: None for r in results if r.arm != "policy"}),
        output=folder,
    )
    write_summary(summarize(results, settings, identity), folder)
    return folder


def every_arm(folder: Path) -> Path:
    """Two tasks, two states, five arms, seven of the twenty episodes filmed."""
    results = []
    for task in (0, 9):
        for state in (40, 41):
            policy = episode(task, state, success=(task, state) != (9, 41))
            told = told_another(task, state, named=state == 40)
            results += [
                filmed(folder, policy) if task == 9 else policy,
                episode(task, state, state == 40, "replay"),
                filmed(folder, episode(task, state, False, "blank")),
                episode(
                    task, state, False, "swap_images", other_task=9 - task,
                    demonstration_sha256="d" * 64,
                ),
                filmed(folder, told) if (task, state) == (0, 40) else told,
            ]  # fmt: skip
    return write_folder(folder, results)
