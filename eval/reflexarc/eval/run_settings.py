"""What one evaluation run is asked to do, and the episodes that follow from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from reflexarc.client import ExecutorName
from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.arms import ARMS, BASELINES, Arm
from reflexarc.eval.results import EpisodeKey, RunIdentity
from reflexarc.eval.worlds import MOBILE_SUITE, world_of

REPORTED_STATES_BEGIN = 40
STATES = 50
MAX_INDEX = 1000
DEFAULT_REPLAN_STEPS: Mapping[ExecutorName, int] = {
    "receding_horizon": 8,
    "temporal_ensembling": 1,
    "asynchronous": 8,
    "real_time_chunking": 8,
}
Videos = Literal["all", "failures", "none"]
OtherTask = Literal["cyclic", "all"]


class RunSettings(FrozenModel):
    """One call of ``reflexarc eval libero``, or of ``reflexarc eval mobile``.

    Attributes:
        states: indices of initial states (LIBERO has 50 a task); every arm runs on all of them.
        executor: how chunks are executed.
        latency_ms: added to every answer, in environment steps of 50 ms, rounded up.
        replan_steps: environment steps between two requests.
        max_steps: steps after which an episode has failed; None takes the suite's usual number.
        other_task: whose instruction the arm ``other_instruction`` tells: the next of the
            selected tasks (the first one after the last), or each of the others in turn. The
            arm ``swap_images`` always shows the next one.
        demonstrations: file or folder with a demonstration of each task, for the arms
            ``replay`` and ``swap_images``.
        goals: file or folder with a demonstration of each task whose last image is its goal, for
            a policy that is shown one.
        goal_demonstration: its name, such as ``demo_0``; None takes each task's first.
        retry_for: seconds during which an absent server is asked again.
        ray: address of a Ray cluster whose machines run the workers; None runs them here.
    """

    server: str
    suite: str
    tasks: tuple[int, ...]
    states: tuple[Annotated[int, Field(ge=0, lt=MAX_INDEX)], ...]
    baselines: tuple[Arm, ...] = ()
    other_task: OtherTask = "cyclic"
    demonstrations: Path | None = None
    goals: Path | None = None
    goal_demonstration: str | None = None
    output: Path
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    executor: ExecutorName = "receding_horizon"
    latency_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    replan_steps: Annotated[int, Field(ge=1)] = 8
    max_steps: Annotated[int, Field(ge=1)] | None = None
    wait_steps: Annotated[int, Field(ge=0)] = 10
    videos: Videos = "failures"
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    retry_for: Annotated[float, Field(ge=0)] = 60.0
    ray: str | None = None

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ("policy", *self.baselines)

    @property
    def episode_steps(self) -> int:
        """Steps an episode may take."""
        return self.max_steps or world_of(self.suite).max_steps(self.suite)

    @field_validator("states")
    @classmethod
    def _states_exist(cls, states: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if info.data.get("suite") != MOBILE_SUITE and states and max(states) >= STATES:
            raise ValueError(f"LIBERO has the states 0 to {STATES - 1}, not {max(states)}")
        return states

    def episodes(self, task: int) -> list[EpisodeKey]:
        """The task's episodes; all arms of a state together, so that pairs complete early."""
        return [
            EpisodeKey(task, state, arm, other)
            for state in self.states
            for arm in self.arms
            for other in self._other_tasks(task, arm)
        ]

    def all_episodes(self) -> list[EpisodeKey]:
        """Every episode of the run, task by task."""
        return [key for task in self.tasks for key in self.episodes(task)]

    def _other_tasks(self, task: int, arm: Arm) -> tuple[int | None, ...]:
        if not ARMS[arm].involves_other_task:
            return (None,)
        place = self.tasks.index(task)
        others = (*self.tasks[place + 1 :], *self.tasks[:place])
        every = self.other_task == "all" and ARMS[arm].other_instruction
        return others if every else others[:1]

    def identity(
        self,
        contract: PolicyContract,
        demonstrations: Mapping[int, str],
        goals: Mapping[int, str] | None = None,
    ) -> RunIdentity:
        """``demonstrations``: task index to the sha256 of its demonstration's actions; ``goals``:
        to that of its goal image.
        """
        return RunIdentity(
            suite=self.suite,
            seed=self.seed,
            max_steps=self.episode_steps,
            replan_steps=self.replan_steps,
            wait_steps=self.wait_steps,
            executor=self.executor,
            injected_latency_ms=self.latency_ms,
            checkpoint_fingerprint=contract.checkpoint_fingerprint,
            contract_sha256=contract_sha256(contract),
            demonstrations=dict(demonstrations),
            goals=dict(goals or {}),
        )


def contract_sha256(contract: PolicyContract) -> str:
    """Hash of the contract's canonical JSON."""
    return hashlib.sha256(contract.model_dump_json().encode()).hexdigest()


def default_states(trials: int) -> tuple[int, ...]:
    """The first ``trials`` of the reported states 40-49. ConfigError for more than there are."""
    available = STATES - REPORTED_STATES_BEGIN
    if not 1 <= trials <= available:
        raise ConfigError(
            f"--trials {trials}: states {REPORTED_STATES_BEGIN}-{STATES - 1} give 1 to {available} "
            f"trials a task; name others with --states, for example --states 0-{STATES - 1}",
            field="trials",
        )
    return tuple(range(REPORTED_STATES_BEGIN, REPORTED_STATES_BEGIN + trials))


def parse_indices(text: str, option: str) -> tuple[int, ...]:
    """``"0,9"`` or ``"40-44,49"`` to sorted distinct indices. ConfigError naming the option."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(
                f"{option} {text!r}: {part!r} is no index or range like 40-49", field=option
            )
        begin, end = int(first), int(last) if dash else int(first)
        if end < begin:
            raise ConfigError(f"{option} {text!r}: {part!r} runs backwards", field=option)
        if end >= MAX_INDEX:
            raise ConfigError(f"{option} {text!r}: {end} is no index of LIBERO", field=option)
        found.update(range(begin, end + 1))
    if not found:
        raise ConfigError(f"{option} is empty; give indices like 0,9 or 40-49", field=option)
    return tuple(sorted(found))


def parse_baselines(text: str) -> tuple[Arm, ...]:
    """``"replay,blank"`` or ``"none"`` to arms. ConfigError naming the unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return ()
    _refuse_unknown(names)
    return tuple(arm for arm in BASELINES if arm in names)


def _refuse_unknown(names: Iterable[str]) -> None:
    for name in names:
        if name not in BASELINES:
            raise ConfigError(
                f"--baselines: {name!r} is unknown; choose from {', '.join(BASELINES)}, or none",
                field="baselines",
            )
