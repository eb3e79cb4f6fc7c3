"""Collect demonstrations of the scripted expert, in parallel, resumable, reproducible.

Attempt ``a`` at a task starts from a reset seeded by (base seed, task, ``a``), never from a
benchmark state. The demonstrations of a task are its first successful attempts, so the result
does not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import h5py
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from reflexarc.contract.errors import ConfigError, SimulatorError
from reflexarc.data.libero_writer import TaskFileWriter, TaskHeader, atomic_path
from reflexarc.eval.libero.collect_worker import (
    Attempt,
    AttemptOutcome,
    attempt_seed,
    run_attempt,
)
from reflexarc.eval.libero.contact_sheet import write_contact_sheet
from reflexarc.eval.libero.expert_goals import placement_goals
from reflexarc.eval.libero.package import import_libero, quiet
from reflexarc.eval.libero.suites import LiberoTask, select_tasks
from reflexarc.eval.processes import exit_with_parent


class CollectionSettings(BaseModel):
    """What decides the content of a collection's files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    image_size: Annotated[int, Field(ge=16, le=1024)] = 256
    render_every: Annotated[int, Field(ge=1, le=100)] = 4
    action_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class TaskSummary:
    """One row of the table: ``mean_steps`` and ``longest`` are environment steps."""

    index: int
    task: str
    demos: int
    attempts: int
    mean_steps: float
    longest: int
    frames: int
    megabytes: float


@dataclass(frozen=True)
class CollectionSummary:
    """What ``summary.json`` holds."""

    settings: dict[str, Any]
    tasks: list[TaskSummary]
    seconds: float


def collect(
    settings: CollectionSettings,
    output: Path,
    *,
    demos: int,
    tasks: Sequence[int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> CollectionSummary:
    """Bring every task's file in ``output`` to ``demos`` demonstrations.

    Also writes ``summary.json`` and ``contact_sheet.png``. Existing demonstrations of the same
    settings are kept.

    Raises:
        ConfigError: ``output`` holds a collection of other settings.
        SimulatorError: a task fails too often, or its goal is beyond the expert.
    """
    if demos < 1 or workers < 1:
        raise ConfigError(f"demos ({demos}) and workers ({workers}) must be at least 1")
    import_libero()
    selected = select_tasks(settings.suite, tasks)
    for task in selected:
        placement_goals(task)  # refuses what the expert cannot do, before anything is written
    output.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, output)
    _remove_temporary_files(output)
    start = time.monotonic()
    _collect_attempts(_Plan.resume(settings, output, selected, demos), workers, progress)
    paths = [_assemble(settings, output, task) for task in selected]
    summary = CollectionSummary(
        settings=settings.model_dump(),
        tasks=[_summarise(task, path) for task, path in zip(selected, paths, strict=True)],
        seconds=round(time.monotonic() - start, 1),
    )
    with atomic_path(output / "summary.json") as temporary:
        temporary.write_text(json.dumps(asdict(summary), indent=2) + "\n")
    with atomic_path(output / "contact_sheet.png") as temporary:
        write_contact_sheet(paths, temporary)
    return summary


@dataclass
class _Plan:
    """Which attempts are due: as many as demonstrations are missing, and one for each failure."""

    settings: CollectionSettings
    output: Path
    tasks: list[LiberoTask]
    demos: int
    made: dict[str, dict[int, bool]]
    scheduled: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def resume(
        cls, settings: CollectionSettings, output: Path, tasks: list[LiberoTask], demos: int
    ) -> _Plan:
        made = {task.name: TaskFileWriter(output, task.name).attempts() for task in tasks}
        return cls(settings, output, tasks, demos, made)

    @property
    def finished(self) -> int:
        return sum(min(sum(made.values()), self.demos) for made in self.made.values())

    def due(self, task: LiberoTask) -> Iterator[Attempt]:
        """Attempts at a task that are known to be needed and are not scheduled yet."""
        made, scheduled = self.made[task.name], self.scheduled[task.name]
        failures = sum(not success for success in made.values())
        if failures > self.demos + 10:
            reasons = f"{failures} of {len(made)} attempts failed"
            raise SimulatorError(
                f"{task.suite} task {task.index} ({task.name}): {reasons}; lower --action-noise"
            )
        for number in range(self.demos + failures):
            if number not in made and number not in scheduled:
                scheduled.add(number)
                yield Attempt(
                    task=task,
                    number=number,
                    seed=attempt_seed(self.settings.seed, task.name, number),
                    image_size=self.settings.image_size,
                    render_every=self.settings.render_every,
                    action_noise=self.settings.action_noise,
                    folder=self.output,
                )


def _collect_attempts(plan: _Plan, workers: int, progress: bool) -> None:
    """Run all due attempts; each result may make another one due."""
    by_name = {task.name: task for task in plan.tasks}
    first = [attempt for task in plan.tasks for attempt in plan.due(task)]
    if not first:
        return
    bar = tqdm(
        total=len(plan.tasks) * plan.demos,
        initial=plan.finished,
        unit="demo",
        disable=not progress,
        smoothing=0.05,
    )
    pool = ProcessPoolExecutor(
        min(workers, len(first)), mp_context=get_context("spawn"), initializer=exit_with_parent
    )
    failed = 0
    try:
        with bar:
            pending = {pool.submit(run_attempt, attempt) for attempt in first}
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for outcome in map(_outcome, finished):
                    plan.made[outcome.task_name][outcome.number] = outcome.success
                    bar.update(outcome.success)
                    failed += not outcome.success
                    bar.set_postfix(failed=failed, refresh=False)
                    due = plan.due(by_name[outcome.task_name])
                    pending |= {pool.submit(run_attempt, attempt) for attempt in due}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(future: Future[AttemptOutcome]) -> AttemptOutcome:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SimulatorError(
            "a simulator process died, out of memory perhaps (each needs 2.1 GB); "
            "run the same command again with fewer --workers: finished demonstrations are kept"
        ) from error


def _check_settings(settings: CollectionSettings, output: Path) -> None:
    """Write the settings at the first run; refuse to mix demonstrations of different ones."""
    path = output / "collection.json"
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_text(settings.model_dump_json(indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    wanted = settings.model_dump()
    differing = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
    if differing:
        raise ConfigError(
            f"{output} holds a collection made with {differing}; give the same options to "
            "continue it, or another --output"
        )


def _remove_temporary_files(output: Path) -> None:
    """What a killed run left half-written."""
    for pattern in (".*.tmp", ".parts/*/.*.tmp"):
        for path in output.glob(pattern):
            path.unlink()


def _assemble(settings: CollectionSettings, output: Path, task: LiberoTask) -> Path:
    with quiet():
        from libero.libero.envs.bddl_utils import get_problem_info

        problem = get_problem_info(str(task.bddl_path))
    writer = TaskFileWriter(output, task.name)
    return writer.assemble(
        TaskHeader(
            instruction=task.instruction,
            problem_name=problem["problem_name"],
            domain_name=problem["domain_name"],
            bddl_file_name=f"libero/libero/bddl_files/{task.suite}/{task.bddl_path.name}",
            bddl_file_content=task.bddl_path.read_text(),
            image_size=settings.image_size,
            render_stride=settings.render_every,
            action_noise=settings.action_noise,
            seed=settings.seed,
        )
    )


def _summarise(task: LiberoTask, path: Path) -> TaskSummary:
    with h5py.File(path, "r") as file:
        demos = list(file["data"].values())
        lengths = [int(demo.attrs["num_samples"]) for demo in demos]
        failed = json.loads(file["data"].attrs["failed_attempts"])
        return TaskSummary(
            index=task.index,
            task=task.name,
            demos=len(demos),
            attempts=len(demos) + len(failed),
            mean_steps=round(sum(lengths) / len(lengths), 1),
            longest=max(lengths),
            frames=sum(len(demo["obs/image_steps"]) for demo in demos),
            megabytes=round(path.stat().st_size / 1e6, 1),
        )
