"""All episodes of one task in one process, with one simulator and one connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import NotReadyError, ServerUnavailableError
from reflexarc.eval.baselines import Demonstration
from reflexarc.eval.episodes import TaskRun, run_episode
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsError, RunIdentity
from reflexarc.eval.run_settings import RunSettings, contract_sha256

Notify = Callable[[str], None]


class PinnedPolicy:
    """A served policy that must stay the one that the run began with.

    The client reconnects by itself. Where it gives up before ``retry_for`` seconds of silence
    are over, :meth:`reopen` makes a new connection, after which the episode starts again.

    Raises ResultsError when another checkpoint answers.
    """

    def __init__(self, url: str, retry_for: float, expected_contract_sha256: str) -> None:
        self._url, self._retry_for = url, retry_for
        self._expected = expected_contract_sha256
        self._silent_since: float | None = None
        self._client = PolicyClient(url, retry_for=retry_for)
        self.check_contract()

    @property
    def contract(self) -> PolicyContract:
        return self._client.contract

    def infer(self, observation: Observation) -> ActionChunk:
        asked = time.monotonic()
        try:
            chunk = self._client.infer(observation)
        except (ServerUnavailableError, NotReadyError):
            self._silent_since = self._silent_since or asked
            raise
        self._silent_since = None
        return chunk

    def reopen(self) -> None:
        """Connect again for what is left of ``retry_for``; else ServerUnavailableError."""
        silent = time.monotonic() - (self._silent_since or time.monotonic())
        remaining = self._retry_for - silent
        if remaining <= 0:
            raise ServerUnavailableError(
                f"{self._url} did not answer for {silent:.0f} s (--retry-for {self._retry_for:g})"
            )
        self._client.close()
        time.sleep(min(1.0, remaining))
        self._client = PolicyClient(self._url, retry_for=remaining)
        self.check_contract()

    def check_contract(self) -> None:
        """Raise ResultsError unless the server still serves what the run began with."""
        if contract_sha256(self._client.contract) != self._expected:
            raise ResultsError(
                f"{self._url} now serves another checkpoint "
                f"({self._client.contract.checkpoint_fingerprint or 'without fingerprint'}); "
                "serve the one that the run began with, or choose another --output"
            )

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True)
class TaskJob:
    """One task's unfinished episodes, as they travel to a worker process."""

    settings: RunSettings
    identity: RunIdentity
    contract: PolicyContract
    episodes: Sequence[EpisodeKey]
    demonstration: Demonstration | None


def run_task(job: TaskJob, report: Callable[[EpisodeResult], None], notify: Notify) -> None:
    """Run the job's episodes and report each as it ends.

    Raises ServerUnavailableError when the server stays silent for ``settings.retry_for``.
    """
    settings, identity = job.settings, job.identity
    from reflexarc.eval.libero.observation import LiberoObserver
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import load_init_states, load_tasks

    task = load_tasks(settings.suite)[job.episodes[0].task]
    observer = LiberoObserver(job.contract)
    with ExitStack() as stack:
        policy = None
        if any(key.arm != "replay" for key in job.episodes):
            policy = PinnedPolicy(settings.server, settings.retry_for, identity.contract_sha256)
            stack.callback(policy.close)
        simulator = stack.enter_context(LiberoSimulator(task, image_size=observer.image_size))
        run = TaskRun(
            settings=settings,
            identity=identity,
            simulator=simulator,
            observer=observer,
            init_states=load_init_states(task),
            policy=policy,
            demonstration=job.demonstration,
        )
        for key in job.episodes:
            report(_run_until_it_ends(run, key, policy, notify))


def _run_until_it_ends(
    run: TaskRun, key: EpisodeKey, policy: PinnedPolicy | None, notify: Notify
) -> EpisodeResult:
    """Run an episode, from its beginning again when its connection was lost."""
    while True:
        try:
            result = run_episode(run, key)
        except (ServerUnavailableError, NotReadyError) as error:
            if policy is None:
                raise
            notify(
                f"task {key.task}, state {key.state}, {key.arm}: {error.message}; trying again, "
                "the episode then starts from its initial state"
            )
            policy.reopen()
            continue
        if policy is not None and key.arm != "replay":
            policy.check_contract()  # the client may have reconnected to another server
        return result
