"""Runs episodes in one process: one connection, one simulator at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

from reflexarc.client import PolicyClient
from reflexarc.contract import PolicyContract
from reflexarc.eval.arms import ARMS
from reflexarc.eval.baselines import Demonstration
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.episodes import TaskRun, run_episode
from reflexarc.eval.goal_images import Goal
from reflexarc.eval.results import EpisodeKey, EpisodeResult, RunIdentity
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.worlds import Simulator, Task, world_of


@dataclass(frozen=True)
class RunPlan:
    """What every process of a run needs to run any of its episodes.

    ``tasks``, ``demonstrations`` and ``goals`` are of the selected tasks, by index.
    """

    settings: RunSettings
    identity: RunIdentity
    contract: PolicyContract
    tasks: Mapping[int, Task]
    demonstrations: Mapping[int, Demonstration]
    goals: Mapping[int, Goal] = field(default_factory=dict)


class EpisodeRunner:
    """Runs a plan's episodes one after the other; a context manager.

    The simulator of a task stays open until an episode of another task comes: making one takes
    seconds. The client asks a server that went away again, in the middle of an episode too, and
    accepts only the policy that it knows.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._world = world_of(plan.settings.suite)
        self._observer = self._world.observer(plan.contract)
        self._client: PolicyClient | None = None
        self._simulator: Simulator | None = None
        self._open = ExitStack()  # closes both

    def __enter__(self) -> EpisodeRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the simulator and close the connection. May be called twice."""
        self._open.close()

    def run(self, key: EpisodeKey) -> EpisodeResult:
        """Run one episode.

        Raises ServerUnavailableError when the server stays silent for ``settings.retry_for``.
        """
        plan = self._plan
        policy = self._connected() if ARMS[key.arm].asks_policy else None
        simulator = self._simulator_of(plan.tasks[key.task])
        run = TaskRun(
            settings=plan.settings,
            identity=plan.identity,
            tasks=plan.tasks,
            demonstrations=plan.demonstrations,
            world=self._world,
            simulator=simulator,
            observer=self._observer,
            policy=policy,
            goals=plan.goals,
        )
        return run_episode(run, key)

    def _connected(self) -> PolicyClient:
        if self._client is None:
            settings = self._plan.settings
            self._client = PolicyClient(settings.server, retry_for=settings.retry_for)
            self._open.callback(self._client.close)
            self._check_contract(self._client)
        return self._client

    def _simulator_of(self, task: Task) -> Simulator:
        if self._simulator is None or self._simulator.task != task:
            if self._simulator is not None:
                self._simulator.close()
            self._simulator = self._world.simulator(task, self._observer)
            self._open.callback(self._simulator.close)
        return self._simulator

    def _check_contract(self, client: PolicyClient) -> None:
        if client.contract != self._plan.contract:
            served = client.contract.checkpoint_fingerprint or "without fingerprint"
            began = self._plan.contract.checkpoint_fingerprint or "without fingerprint"
            raise ResultsError(
                f"{self._plan.settings.server} now serves another checkpoint ({served}) than the "
                f"one that the run began with ({began}); serve that one, or choose another --output"
            )
