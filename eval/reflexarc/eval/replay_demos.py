"""``reflexarc eval replay-demos``: do recorded demonstrations still do what they did?

A demonstration that does not replay teaches something else than it shows. Finished demonstrations
are on disk at once, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from reflexarc.contract.errors import ConfigError, DatasetError, SimulatorError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.durable_log import DurableLog, unequal
from reflexarc.eval.processes import exit_with_parent
from reflexarc.eval.replay_episode import (
    Replayed,
    ReplayIdentity,
    actions_sha256,
    replay_episode,
)

if TYPE_CHECKING:
    from reflexarc.data.libero_episode import Episode
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import LiberoTask


class Job(NamedTuple):
    """One demonstration to replay; ``name`` is ``file/demo``, unique within the data."""

    task: LiberoTask
    episode: Episode
    name: str


class ReplaySettings(FrozenModel):
    """One call of ``reflexarc eval replay-demos``.

    Attributes:
        data: HDF5 file of LIBERO demonstrations, or a folder of them.
        tasks: parts of tasks' names that fit one each; empty for all.
        episodes: positions among each task's demonstrations; None for all.
        run: suite, mistakes, and steps to hold still after the last action.
        workers: simulator processes.
    """

    data: Path
    run: ReplayIdentity
    tasks: tuple[str, ...] = ()
    episodes: tuple[int, ...] | None = None
    workers: int = Field(default=1, ge=1, le=16)


class ReplayLog(DurableLog[Replayed]):
    """The finished demonstrations of an output folder; refuses those of another run.

    Args:
        actions: name of every demonstration of this run to the sha256 of its actions.
    """

    def __init__(
        self,
        folder: Path,
        run: ReplayIdentity,
        actions: dict[str, str],
        notify: Callable[[str], None],
    ) -> None:
        def differences(one: Replayed) -> list[str]:
            found = unequal(
                (name, getattr(one.run, name), getattr(run, name))
                for name in ("suite", "settle_steps")
            )
            found += unequal([("mistakes", one.run.mistakes.in_words, run.mistakes.in_words)])
            if actions.get(one.demonstration, one.actions_sha256) != one.actions_sha256:
                found.append(
                    f"actions_sha256: {one.demonstration} holds other actions than it did then"
                )
            return found

        mend = "give the options and the data of the run that began there"
        super().__init__(folder, Replayed, "a replayed demonstration", differences, notify, mend)


def replay(
    settings: ReplaySettings,
    output: Path,
    *,
    notify: Callable[[str], None] = print,
    on_progress: Callable[[int, int], object] = lambda finished, total: None,
) -> list[Replayed]:
    """Every chosen demonstration, task by task; those that ``output`` holds are not run again.

    ``on_progress`` is called with how many there are finished, and of how many.

    Raises DatasetError for data that does not read or tasks that the suite has not, ConfigError for
    a choice that fits nothing or a shift that leaves nothing, ResultsError for an output folder of
    another run, and SimulatorError for a simulator that died.
    """
    jobs = plan_replay(settings)
    actions = {job.name: actions_sha256(job.episode.actions()) for job in jobs}
    with ReplayLog(output, settings.run, actions, notify) as log:
        found = {one.demonstration: one for one in log.results}
        left = [job for job in jobs if job.name not in found]
        on_progress(len(jobs) - len(left), len(jobs))
        for one in _results(settings, left):
            log.append(one)
            found[one.demonstration] = one
            on_progress(sum(job.name in found for job in jobs), len(jobs))
    return [found[job.name] for job in jobs]


def plan_replay(settings: ReplaySettings) -> list[Job]:
    """The demonstrations to replay, task by task; nothing is simulated.

    Raises DatasetError and ConfigError as :func:`replay` does.
    """
    from reflexarc.data.libero_hdf5 import open_libero
    from reflexarc.eval.libero.suites import load_tasks

    known = {task.name: task for task in load_tasks(settings.run.suite)}
    by_task: dict[str, list[Episode]] = {}
    for episode in open_libero([settings.data]).episodes:
        by_task.setdefault(episode.task_name, []).append(episode)
    wanted = [n for n in by_task if not settings.tasks or any(t in n for t in settings.tasks)]
    for text in settings.tasks:
        if not any(text in name for name in by_task):
            raise ConfigError(
                f"--tasks: {text!r} fits none of: {', '.join(by_task)}", field="tasks"
            )
    jobs: list[Job] = []
    for name in wanted:
        if name not in known:
            raise DatasetError(
                f"{settings.data} holds demonstrations of {name}, which is no task of "
                f"{settings.run.suite}; name its suite with --suite",
                field="suite",
            )
        members = by_task[name]
        positions = range(len(members)) if settings.episodes is None else settings.episodes
        chosen = [members[i] for i in positions if i < len(members)]
        if not chosen:
            raise ConfigError(
                f"--episodes: {name} has {len(members)} demonstrations: 0-{len(members) - 1}",
                field="episodes",
            )
        jobs.extend(Job(known[name], one, _name(one, settings.data)) for one in chosen)
    return jobs


def _name(episode: Episode, data: Path) -> str:
    """Two folders in ``data`` may hold files of one name."""
    file = episode.path.relative_to(data) if data.is_dir() else Path(episode.path.name)
    return f"{file.as_posix()}/{episode.demo}"


def _results(settings: ReplaySettings, jobs: Sequence[Job]) -> Iterator[Replayed]:
    if settings.workers == 1 or len(jobs) < 2:
        with _HeldSimulator() as held:
            for job in jobs:
                yield replay_episode(held.of(job.task), job.episode, job.name, settings.run)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(settings.workers, len(jobs)), mp_context=context, initializer=exit_with_parent
    ) as pool:
        futures = [pool.submit(_replayed, job, settings.run) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise SimulatorError(
                "a simulator process died, most likely for lack of memory (each needs about "
                "1 GB); finished demonstrations are kept: run the same command with fewer "
                "--workers; with --workers 1 any other error shows itself"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _HeldSimulator:
    """The simulator of the last task; jobs come task by task, and making one takes seconds."""

    def __init__(self) -> None:
        self._task: str | None = None
        self._simulator: LiberoSimulator | None = None

    def __enter__(self) -> _HeldSimulator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def of(self, task: LiberoTask) -> LiberoSimulator:
        """Of this task, made where another was held."""
        from reflexarc.eval.libero.simulator import LiberoSimulator

        if self._simulator is None or self._task != task.name:
            self.close()
            self._simulator = LiberoSimulator(task, render=False)
            self._task = task.name
        return self._simulator

    def close(self) -> None:
        """Free it. May be called twice."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None


_held = _HeldSimulator()  # a pool's process has one; nothing else uses it


def _replayed(job: Job, run: ReplayIdentity) -> Replayed:
    return replay_episode(_held.of(job.task), job.episode, job.name, run)
