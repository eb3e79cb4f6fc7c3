"""Several simulator processes: which episode goes where, and what comes back."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.processes import exit_with_parent
from reflexarc.eval.results import EpisodeKey, EpisodeResult
from reflexarc.eval.runner import EpisodeRunner, RunPlan

Report = Callable[[EpisodeResult], None]


class EpisodeQueue:
    """Hands out episodes so that a worker keeps its task's simulator as long as it can.

    A worker without episodes left in its task joins the task that has the most left for each
    worker at it, so that few tasks, or unequal ones, still keep every worker busy.
    """

    def __init__(self, keys: Sequence[EpisodeKey]) -> None:
        self._left: dict[int, deque[EpisodeKey]] = {}
        for key in keys:
            self._left.setdefault(key.task, deque()).append(key)
        self._workers: Counter[int] = Counter()

    def take(self, current: int | None) -> EpisodeKey | None:
        """The next episode for a worker whose simulator has the task ``current``, or None."""
        if current is not None and self._left[current]:
            return self._left[current].popleft()
        if current is not None:
            self._workers[current] -= 1
        waiting = [task for task, keys in self._left.items() if keys]
        if not waiting:
            return None
        task = max(waiting, key=lambda t: len(self._left[t]) / (self._workers[t] + 1))
        self._workers[task] += 1
        return self._left[task].popleft()


class EpisodeWorker(Protocol):
    """Something that runs one episode at a time, and keeps the simulator of its task."""

    task: int | None

    def run(self, key: EpisodeKey) -> Future[EpisodeResult]: ...

    def close(self) -> None:
        """Free the simulator. May be called twice."""
        ...


def run_in_processes(plan: RunPlan, keys: Sequence[EpisodeKey], report: Report) -> None:
    """Run episodes in ``plan.settings.workers`` processes; only this process reports results.

    Raises what :func:`run_with_workers` raises.
    """
    run_with_workers(
        [_Worker(plan) for _ in range(min(plan.settings.workers, len(keys)))], keys, report
    )


def run_with_workers(
    workers: Sequence[EpisodeWorker], keys: Sequence[EpisodeKey], report: Report
) -> None:
    """Give every worker its next episode as soon as it has finished one, and report results.

    After an error or an interrupt, every other worker ends its current episode, which is still
    reported; then the first error is raised.
    """
    queue = EpisodeQueue(keys)
    pending: dict[Future[EpisodeResult], EpisodeWorker] = {}

    def submit(worker: EpisodeWorker) -> None:
        key = queue.take(worker.task)
        if key is None:
            worker.close()
        else:
            pending[worker.run(key)] = worker

    try:
        for worker in workers:
            submit(worker)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                worker = pending.pop(future)
                report(_result(future))
                submit(worker)
    finally:
        for future in wait(pending).done:
            if not future.cancelled() and future.exception() is None:
                report(future.result())
        for worker in workers:
            worker.close()


class _Worker:
    """One process; ``task`` is the one whose simulator it has."""

    def __init__(self, plan: RunPlan) -> None:
        self.task: int | None = None
        self._closed = False
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin, initargs=(plan,)
        )

    def run(self, key: EpisodeKey) -> Future[EpisodeResult]:
        self.task = key.task
        return self._pool.submit(_run, key)

    def close(self) -> None:
        """End the process, and with it its 2 GB. May be called twice."""
        if not self._closed:
            self._closed = True
            try:
                self._pool.submit(_end).result()
            except BrokenProcessPool:
                pass  # it has ended already, and its episode has said so
            finally:
                self._pool.shutdown()


# Set in worker processes only: a process pool hands over what all its calls share in this way.
_runner: EpisodeRunner | None = None


def _begin(plan: RunPlan) -> None:
    global _runner  # noqa: PLW0603
    exit_with_parent()
    _runner = EpisodeRunner(plan)


def _run(key: EpisodeKey) -> EpisodeResult:
    assert _runner is not None  # _begin has run
    return _runner.run(key)


def _end() -> None:
    if _runner is not None:
        _runner.close()


def _result(future: Future[EpisodeResult]) -> EpisodeResult:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SimulatorError(
            "a simulator process died, most likely for lack of memory (each needs about "
            "2 GB); finished episodes are kept: run the same command with fewer --workers"
        ) from error
