"""One episode: reset to a benchmark state, execute an arm's actions, say how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from reflexarc.client import ChunkPolicy
from reflexarc.eval.baselines import (
    ActionSource,
    Demonstration,
    PolicyActions,
    ReplayActions,
)
from reflexarc.eval.results import EpisodeKey, EpisodeResult, RunIdentity
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.videos import Film, write_video

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from reflexarc.eval.libero.observation import LiberoObserver
    from reflexarc.eval.libero.simulator import LiberoSimulator


@dataclass(frozen=True)
class TaskRun:
    """What all episodes of one task share.

    ``demonstration`` is needed by the replay arm, ``policy`` by the others; ``init_states`` is
    ``(50, S)`` float64.
    """

    settings: RunSettings
    identity: RunIdentity
    simulator: LiberoSimulator
    observer: LiberoObserver
    init_states: npt.NDArray[np.float64]
    policy: ChunkPolicy | None
    demonstration: Demonstration | None


def run_episode(run: TaskRun, key: EpisodeKey) -> EpisodeResult:
    """Run one episode and write its video, if one is wanted.

    Raises what the client raises when the server does not answer.
    """
    began = time.perf_counter()
    identity = run.identity
    run.simulator.reset_to_state(
        run.init_states[key.state], seed=identity.seed, wait_steps=identity.wait_steps
    )
    film = Film(wanted=run.settings.videos != "none")
    source = _action_source(run, key, film)
    success, steps = _roll_out(run.simulator, source, identity.max_steps)
    film.snap(steps, run.simulator)
    seconds = time.perf_counter() - began
    video = _write_video(run, key, film, success)
    return _result(run, key, source.latencies_ms, success, steps, seconds, video)


def _roll_out(simulator: LiberoSimulator, source: ActionSource, max_steps: int) -> tuple[bool, int]:
    """``(success, steps executed)``."""
    for step in range(max_steps):
        if simulator.step(source.next_action(step)):
            return True, step + 1
    return False, max_steps


def _action_source(run: TaskRun, key: EpisodeKey, film: Film) -> ActionSource:
    replan_steps = run.identity.replan_steps
    if key.arm == "replay":
        assert run.demonstration is not None  # loaded before the first episode
        return ReplayActions(run.demonstration, run.simulator, replan_steps=replan_steps, film=film)
    assert run.policy is not None
    return PolicyActions(
        run.policy,
        run.observer,
        run.simulator,
        instruction=run.simulator.task.instruction,
        seeds=(run.identity.seed, key.task, key.state),
        replan_steps=replan_steps,
        blank=key.arm == "blank",
        film=film,
    )


def _write_video(run: TaskRun, key: EpisodeKey, film: Film, success: bool) -> str | None:
    if not film.wanted or (run.settings.videos == "failures" and success):
        return None
    outcome = "success" if success else "failure"
    name = f"task{key.task:02d}_state{key.state:02d}_{key.arm}_{outcome}.mp4"
    arm = {"policy": "policy", "replay": "blind replay", "blank": "policy sees black images"}
    write_video(
        run.settings.output / "videos" / name,
        film.develop(run.simulator),
        f"task {key.task}, state {key.state}, {arm[key.arm]}: {run.simulator.task.instruction}",
        outcome,
        replan_steps=run.identity.replan_steps,
    )
    return name


def _result(
    run: TaskRun,
    key: EpisodeKey,
    latencies_ms: Sequence[float],
    success: bool,
    steps: int,
    seconds: float,
    video: str | None,
) -> EpisodeResult:
    identity, task = run.identity, run.simulator.task
    return EpisodeResult(
        suite=identity.suite,
        task=key.task,
        task_name=task.name,
        instruction=task.instruction,
        state=key.state,
        arm=key.arm,
        success=success,
        reason="success" if success else "timeout",
        steps=steps,
        seconds=round(seconds, 3),
        chunks=len(latencies_ms),
        latency_median_ms=round(median(latencies_ms), 3) if latencies_ms else None,
        latency_max_ms=round(max(latencies_ms), 3) if latencies_ms else None,
        seed=identity.seed,
        max_steps=identity.max_steps,
        replan_steps=identity.replan_steps,
        wait_steps=identity.wait_steps,
        checkpoint_fingerprint=identity.checkpoint_fingerprint,
        contract_sha256=identity.contract_sha256,
        demonstration_sha256=identity.demonstrations.get(key.task) if key.arm == "replay" else None,
        video=video,
    )
