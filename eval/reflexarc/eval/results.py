"""What one finished episode of an evaluation in a simulated world says, and a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from reflexarc.client import ExecutorName
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.durable_log import DurableLog, parse_lines, unequal
from reflexarc.eval.execution import execution_in_words

Reason = Literal["success", "named_goal", "timeout", "over"]
TITLE = "an episode"


class EpisodeKey(NamedTuple):
    """Which episode of a run: task index in the suite, index of the init state, arm.

    ``other_task`` is the task whose images are shown or whose instruction is told, for the arms
    that have one.
    """

    task: int
    state: int
    arm: Arm
    other_task: int | None = None

    @property
    def demonstration_task(self) -> int | None:
        """The task whose demonstration this episode uses, if it uses one."""
        if not ARMS[self.arm].needs_demonstrations:
            return None
        return self.task if self.other_task is None else self.other_task

    def goal(self, identity: RunIdentity) -> str | None:
        """sha256 of the goal image that the policy is shown, if it is shown one."""
        if not ARMS[self.arm].asks_policy:
            return None
        shown = self.other_task if ARMS[self.arm].other_goal else self.task
        return None if shown is None else identity.goals.get(shown)

    def demonstration(self, identity: RunIdentity) -> str | None:
        """sha256 of the demonstration that this episode uses in a run, if it uses one."""
        task = self.demonstration_task
        return None if task is None else identity.demonstrations.get(task)


class RunIdentity(FrozenModel):
    """What must be equal for two episodes to belong to one table.

    ``demonstrations`` maps a task index to the sha256 of its demonstration's actions, ``goals`` to
    that of its goal image.
    ``injected_latency_ms`` counts in control steps, rounded up.
    """

    suite: str
    seed: int
    max_steps: int
    replan_steps: int
    wait_steps: int
    executor: ExecutorName = "receding_horizon"
    injected_latency_ms: float = 0.0
    checkpoint_fingerprint: str
    contract_sha256: str
    demonstrations: Mapping[int, str] = Field(default_factory=dict)
    goals: Mapping[int, str] = Field(default_factory=dict)

    @property
    def execution(self) -> str:
        """How chunks are executed, in words."""
        return execution_in_words(self.executor, self.replan_steps, self.injected_latency_ms)


class EpisodeResult(FrozenModel):
    """One finished episode.

    Attributes:
        instruction: the task's own, whatever the policy was told.
        success: whether the task's own goal was reached, whatever the policy was told.
        reason: why it ended: ``success``, ``named_goal`` (the goal that the policy was told, where
            that is another task's), ``timeout`` after ``max_steps`` steps, or ``over``: nothing
            could change any more, as where the base stands at another target.
        steps: environment steps executed after the wait steps.
        seconds: wall clock of the episode, with its reset.
        chunks: how often the policy was asked; 0 for a blind replay.
        held_steps: steps at which the arm stood still because no chunk was there.
        latency_median_ms, latency_max_ms: round trip of one request as the client saw it.
        seed: of the run; every request's seed follows from it (``episodes.request_seed``).
        demonstration_sha256: of the actions of the demonstration that was replayed, or whose
            images were shown; None for the other arms.
        goal_sha256: of the goal image that the policy was shown; None where it takes none.
        other_task: index of the task whose images or goal were shown, or whose instruction was
            told.
        told_instruction: what the policy was told, where it is another task's instruction.
        original_success: ``success``, where another task's instruction was told.
        named_success: whether the goal that was told was reached; None where the scene lacks one
            of its objects.
        first_goal: which of the two goals was reached first, if any.
        video: file name under ``videos/``, or None.
    """

    suite: str
    task: int
    task_name: str
    instruction: str
    state: int
    arm: Arm
    success: bool
    reason: Reason
    steps: int
    seconds: float
    chunks: int
    latency_median_ms: float | None
    latency_max_ms: float | None
    seed: int
    max_steps: int
    replan_steps: int
    wait_steps: int
    executor: ExecutorName = "receding_horizon"
    injected_latency_ms: float = 0.0
    held_steps: int = 0
    checkpoint_fingerprint: str
    contract_sha256: str
    demonstration_sha256: str | None = None
    goal_sha256: str | None = None
    other_task: int | None = None
    told_instruction: str | None = None
    original_success: bool | None = None
    named_success: bool | None = None
    first_goal: Literal["original", "named"] | None = None
    video: str | None = None

    @property
    def key(self) -> EpisodeKey:
        return EpisodeKey(self.task, self.state, self.arm, self.other_task)

    def differences(self, identity: RunIdentity) -> list[str]:
        """What keeps this episode out of a run, as ``field: there X, this run Y``."""
        pairs = [
            (name, getattr(self, name), getattr(identity, name))
            for name in RunIdentity.model_fields
            if name not in ("demonstrations", "goals")
        ]
        pairs.append(("goal_sha256", self.goal_sha256, self.key.goal(identity)))
        wanted = self.key.demonstration(identity)
        if wanted is not None:
            pairs.append(("demonstration_sha256", self.demonstration_sha256, wanted))
        return unequal(pairs)


class ResultsLog(DurableLog[EpisodeResult]):
    """The finished episodes of an output folder; refuses those of another run than ``identity``."""

    def __init__(
        self, folder: Path, identity: RunIdentity, notify: Callable[[str], None] = print
    ) -> None:
        super().__init__(
            folder, EpisodeResult, TITLE, lambda result: result.differences(identity), notify
        )

    @property
    def finished(self) -> set[EpisodeKey]:
        return {result.key for result in self.results}


def parse_results(content: bytes, path: Path) -> list[EpisodeResult]:
    """Read complete lines. Raises ResultsError naming the line that is no episode."""
    return parse_lines(content, path, EpisodeResult, TITLE)
