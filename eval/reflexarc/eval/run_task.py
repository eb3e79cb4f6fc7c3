"""All episodes of one task in one process, with one simulator and one connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from reflexarc.client import PolicyClient
from reflexarc.contract import PolicyContract
from reflexarc.eval.baselines import Demonstration
from reflexarc.eval.episodes import TaskRun, run_episode
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsError, RunIdentity
from reflexarc.eval.run_settings import RunSettings


@dataclass(frozen=True)
class TaskJob:
    """One task's unfinished episodes, as they travel to a worker process."""

    settings: RunSettings
    identity: RunIdentity
    contract: PolicyContract
    episodes: Sequence[EpisodeKey]
    demonstration: Demonstration | None


def run_task(job: TaskJob, report: Callable[[EpisodeResult], None]) -> None:
    """Run the job's episodes and report each as it ends.

    The client asks a server that went away again, in the middle of an episode too, and accepts
    only the policy that it knows.

    Raises ServerUnavailableError when the server stays silent for ``settings.retry_for``.
    """
    from reflexarc.eval.libero.observation import LiberoObserver
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import load_init_states, load_tasks

    settings = job.settings
    task = load_tasks(settings.suite)[job.episodes[0].task]
    observer = LiberoObserver(job.contract)
    with ExitStack() as stack:
        policy = None
        if any(key.arm != "replay" for key in job.episodes):
            policy = PolicyClient(settings.server, retry_for=settings.retry_for)
            stack.callback(policy.close)
            _check_contract(policy, job)
        simulator = stack.enter_context(LiberoSimulator(task, image_size=observer.image_size))
        run = TaskRun(
            settings=settings,
            identity=job.identity,
            simulator=simulator,
            observer=observer,
            init_states=load_init_states(task),
            policy=policy,
            demonstration=job.demonstration,
        )
        for key in job.episodes:
            report(run_episode(run, key))


def _check_contract(policy: PolicyClient, job: TaskJob) -> None:
    if policy.contract != job.contract:
        raise ResultsError(
            f"{job.settings.server} now serves another checkpoint "
            f"({policy.contract.checkpoint_fingerprint or 'without fingerprint'}); serve the one "
            "that the run began with, or choose another --output"
        )
