"""All features of a recipe ahead of training, by one process or several."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import asdict, dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reflexarc.contract.errors import ReflexarcError
from reflexarc.policy.memory import keep_freed_memory
from reflexarc.training.config import Recipe
from reflexarc.training.feature_store.building import (
    Building,
    begin,
    find_partial,
    free_disk,
)
from reflexarc.training.feature_store.index import row_bytes
from reflexarc.training.feature_store.store import (
    FrameFeatures,
    find_features,
    frame_features,
    nearest,
    open_features,
    rows_found,
)
from reflexarc.training.preparation import Preparation, prepare

_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class FeaturePlan:
    """What ``reflexarc data precompute`` is about to do.

    Attributes:
        path: the folder of the store.
        rows, rows_found: frames, and how many of them need not be computed.
        bytes: of all arrays; ``bytes_to_write`` are not on the disk yet.
        disk_free: where the store lies.
        arrays: name to stored dtype and shape.
        nearest: a store of the same data that does not fit, and in what it differs.
    """

    path: str
    rows: int
    rows_found: int
    bytes: int
    bytes_to_write: int
    disk_free: int
    dtype: str
    arrays: dict[str, str]
    encoders: dict[str, dict[str, str]]
    nearest: str

    @property
    def fits(self) -> bool:
        return self.bytes_to_write <= self.disk_free

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}


def plan_features(preparation: Preparation, cache: Path) -> FeaturePlan:
    """Look, and write nothing. ConfigError where ``cache`` is one store, and not this one."""
    key = preparation.feature_key
    complete = find_features(cache, key)
    begun = find_partial(cache, key)
    size = key.rows * row_bytes(key.fields)
    return FeaturePlan(
        path=str(complete or cache / key.digest),
        rows=key.rows,
        rows_found=rows_found(cache, key),
        bytes=size,
        # What was begun has its whole size already.
        bytes_to_write=0 if complete is not None or begun is not None else size,
        disk_free=free_disk(cache),
        dtype=key.fields.dtype,
        arrays={
            name: f"{array.dtype} {(key.rows, *array.row_shape)}"
            for name, array in key.fields.arrays.items()
        },
        encoders={path: encoder.model_dump() for path, encoder in key.fields.encoders.items()},
        nearest="" if complete is not None else nearest(cache, key),
    )


def precompute(
    preparation: Preparation,
    cache: Path,
    *,
    workers: int = 1,
    threads: int = 1,
    progress: bool = True,
) -> FrameFeatures:
    """Compute what is missing; the same command elsewhere on this machine shares the work.

    Args:
        workers: processes; each loads the policy.
        threads: of each of several processes.

    Raises ConfigError where the disk has no room, ReflexarcError where a process fails; what is
    done is kept.
    """
    key = preparation.feature_key
    if workers == 1 or find_features(cache, key) is not None:
        return preparation.features(cache, progress=progress)
    found = rows_found(cache, key)
    building = begin(cache, key)
    device = str(preparation.policy.device)
    arguments = (preparation.recipe, device, threads, cache, key.digest)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=arguments) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        _watch(building, processes, progress=progress)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if find_features(cache, key) is None:
        raise ReflexarcError(
            f"{len(failed)} of {workers} processes ended with status "
            f"{', '.join(map(str, failed))}; {building.rows_done():,} of {key.rows:,} rows are "
            "done and kept. Mend what they say above and run the same command again, with fewer "
            "--workers if memory ran out",
            field="workers",
        )
    return open_features(building.complete, key, found=found)


def _watch(building: Building, processes: list[SpawnProcess], *, progress: bool) -> None:
    """Show how many rows are done until every process has ended."""
    done = building.rows_done()
    with tqdm(
        total=building.index.rows,
        initial=done,
        desc="frame features",
        unit="frame",
        disable=not progress,
    ) as bar:
        while any(process.is_alive() for process in processes):
            time.sleep(_LOOK_SECONDS)
            bar.update(building.rows_done() - bar.n)
        bar.update(building.rows_done() - bar.n)


def _work(recipe: Recipe, device: str, threads: int, cache: Path, digest: str) -> None:
    """One of several processes: build the same policy, compute what nobody else does."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    preparation = prepare(recipe, torch.device(device))
    key = preparation.feature_key
    if key.digest != digest:
        raise ReflexarcError(
            f"this process would compute other features ({key.digest}) than the one that started "
            f"it ({digest}): did the data or the weights change meanwhile?"
        )
    frame_features(preparation.policy, preparation.episodes, key, cache, progress=False)
