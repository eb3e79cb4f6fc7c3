"""A whole evaluation: plan, resume, run in one or several processes, summarise."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reflexarc.client import PolicyClient
from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError, SimulatorError
from reflexarc.eval.baselines import Demonstration, load_demonstration
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsLog
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.run_task import TaskJob, run_task
from reflexarc.eval.summary import Summary, summarize, write_summary

Notify = Callable[[str], None]


def evaluate(settings: RunSettings, notify: Notify = tqdm.write) -> Summary:
    """Run what is not finished yet in ``settings.output`` and summarise what was asked for.

    Writes ``results.jsonl``, ``videos/*.mp4``, ``summary.json`` and ``summary.md``.

    Raises:
        ServerUnavailableError: the server stayed silent for ``settings.retry_for`` seconds; what
            was finished is kept, and the same call resumes.
        ContractViolationError, ResultsError, SimulatorError, DatasetError, ConfigError: see there.
    """
    from reflexarc.eval.libero.observation import check_libero_contract
    from reflexarc.eval.libero.suites import select_tasks

    tasks = select_tasks(settings.suite, settings.tasks)
    demonstrations = _load_demonstrations(settings, {task.index: task.name for task in tasks})
    with PolicyClient(settings.server, retry_for=settings.retry_for) as client:
        contract = client.contract
    check_libero_contract(contract)
    _check_replan_steps(settings, contract)
    identity = settings.identity(
        contract, {index: demo.sha256 for index, demo in demonstrations.items()}
    )
    with ResultsLog(settings.output, identity, notify) as log:
        jobs = [
            TaskJob(settings, identity, contract, keys, demonstrations.get(task))
            for task, keys in _unfinished(settings, log).items()
        ]
        try:
            _run(settings, jobs, log, notify)
        finally:
            asked = {key for task in settings.tasks for key in settings.episodes(task)}
            results = [result for result in log.results if result.key in asked]
            summary = summarize(results, settings, identity)
            write_summary(summary, settings.output)
    return summary


def _load_demonstrations(
    settings: RunSettings, names: Mapping[int, str]
) -> dict[int, Demonstration]:
    if "replay" not in settings.baselines:
        return {}
    if settings.demonstrations is None:
        raise ConfigError(
            "the replay baseline needs a demonstration of each task: give --demonstrations, "
            "or leave it out with --baselines blank",
            field="demonstrations",
        )
    return {index: load_demonstration(settings.demonstrations, n) for index, n in names.items()}


def _check_replan_steps(settings: RunSettings, contract: PolicyContract) -> None:
    if settings.replan_steps > contract.action.horizon:
        raise ConfigError(
            f"--replan-steps {settings.replan_steps} is more than the policy's chunk of "
            f"{contract.action.horizon} actions",
            field="replan_steps",
        )


def _unfinished(settings: RunSettings, log: ResultsLog) -> dict[int, list[EpisodeKey]]:
    finished = log.finished
    plan = {
        task: [key for key in settings.episodes(task) if key not in finished]
        for task in settings.tasks
    }
    return {task: keys for task, keys in plan.items() if keys}


def _run(settings: RunSettings, jobs: Sequence[TaskJob], log: ResultsLog, notify: Notify) -> None:
    total = len(settings.tasks) * len(settings.states) * len(settings.arms)
    todo = sum(len(job.episodes) for job in jobs)
    if todo < total:
        notify(f"{total - todo} of {total} episodes are finished in {log.path}; skipped")
    with (
        logging_redirect_tqdm(),  # what the client says while it waits for the server
        tqdm(total=total, initial=total - todo, unit="episode", smoothing=0) as progress,
    ):

        def report(result: EpisodeResult) -> None:
            log.append(result)
            progress.set_postfix_str(
                f"task {result.task} state {result.state} {result.arm}: {result.reason}"
            )
            progress.update()

        if settings.workers == 1 or len(jobs) <= 1:
            for job in jobs:
                run_task(job, report)
        else:
            _run_in_processes(jobs, settings.workers, report)


def _run_in_processes(
    jobs: Sequence[TaskJob], workers: int, report: Callable[[EpisodeResult], None]
) -> None:
    """One task a process at a time; only this process writes results."""
    context = multiprocessing.get_context("spawn")
    outbox, stopping = context.Queue(), context.Event()
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=context,
        initializer=_join_pool,
        initargs=(outbox, stopping),
    ) as pool:
        futures = [pool.submit(_run_task_in_worker, job) for job in jobs]
        try:
            while not all(future.done() for future in futures):
                _deliver(outbox, report)
        finally:
            stopping.set()  # after an interrupt, workers end with their current episode
            pool.shutdown(wait=True, cancel_futures=True)
            _deliver(outbox, report)
    _raise_first_error(futures)


# Set in worker processes only: a process pool hands queues over through its initializer.
_pool: Any = None


def _join_pool(outbox: Any, stopping: Any) -> None:
    global _pool  # noqa: PLW0603
    _pool = (outbox, stopping)


def _run_task_in_worker(job: TaskJob) -> None:
    outbox, stopping = _pool

    def report(result: EpisodeResult) -> None:
        outbox.put(result)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # nobody is left to read results; 2 GB of simulator must not stay
        if stopping.is_set():
            raise KeyboardInterrupt

    run_task(job, report)


def _deliver(outbox: Any, report: Callable[[EpisodeResult], None]) -> None:
    """Hand on what workers sent, until nothing came for a while."""
    while True:
        try:
            report(outbox.get(timeout=0.2))
        except queue.Empty:
            return


def _raise_first_error(futures: list[Future[None]]) -> None:
    for future in futures:
        try:
            if not future.cancelled():
                future.result()
        except BrokenProcessPool as error:
            raise SimulatorError(
                "a simulator process died, most likely for lack of memory (each needs about "
                "2 GB); finished episodes are kept: run the same command with --workers 1"
            ) from error
