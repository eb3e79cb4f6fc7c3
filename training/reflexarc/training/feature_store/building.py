"""Computing features into a store, shard by shard, from the start or from where it was left.

While it is computed a store is ``<digest>.partial``: its arrays have their whole size from the
start, so that a full disk shows before any work, and each shard's rows reach the disk before it
is marked as done. The whole store is renamed to ``<digest>``.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy, Tensors
from reflexarc.training.config_base import FeatureDtype
from reflexarc.training.feature_store.dtypes import NUMPY_DTYPES, to_stored
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.feature_store.index import (
    StoreIndex,
    make_index,
    read_index,
    write_index,
)
from reflexarc.training.feature_store.keys import FeatureKey
from reflexarc.training.feature_store.shards import Shards

SHARD_ROWS = 128
_MAP = "shards"


@dataclass(frozen=True)
class Building:
    """A store that is being computed.

    Attributes:
        complete: the folder that it becomes.
        index: what it will hold.
    """

    complete: Path
    index: StoreIndex

    @property
    def partial(self) -> Path:
        return self.complete.with_name(self.complete.name + ".partial")

    @property
    def locks(self) -> Path:
        return self.complete.with_name(self.complete.name + ".locks")

    @property
    def shards(self) -> Shards:
        return Shards(self.partial / _MAP, self.locks)

    def rows_of(self, shard: int) -> range:
        start = shard * self.index.shard_rows
        return range(start, min(start + self.index.shard_rows, self.index.rows))

    def rows_done(self) -> int:
        """Rows in shards that are done; all of them once the store is complete."""
        try:
            left = self.shards.left()
        except FileNotFoundError:
            return self.index.rows if self.complete.is_dir() else 0
        return self.index.rows - sum(len(self.rows_of(shard)) for shard in left)


def find_partial(cache: Path, key: FeatureKey) -> Building | None:
    """What an interrupted computation of ``key`` left, None where nothing was begun."""
    complete = cache / key.digest
    index = read_index(complete.with_name(complete.name + ".partial"))
    return None if index is None else Building(complete, index)


def begin(cache: Path, key: FeatureKey, shard_rows: int = SHARD_ROWS) -> Building:
    """Reserve the disk for a store, or find what was begun.

    Raises ConfigError where the file system of ``cache`` has no room for it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    complete = cache / key.digest
    fresh = Building(complete, make_index(key, shard_rows))
    with FileLock(complete.with_name(complete.name + ".lock")):
        begun = find_partial(cache, key)
        if begun is not None or complete.is_dir():
            return begun or fresh
        check_room(cache, fresh.index.bytes)
        shutil.rmtree(fresh.partial, ignore_errors=True)  # killed before its index was written
        fresh.partial.mkdir()
        try:
            for name, array in key.fields.arrays.items():
                shape = (fresh.index.rows, *array.row_shape)
                _reserve(fresh.partial / f"{name}.npy", np.dtype(NUMPY_DTYPES[array.dtype]), shape)
        except OSError as error:
            shutil.rmtree(fresh.partial, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise _no_room(cache, fresh.index.bytes) from error
            raise
        fresh.shards.create(fresh.index.shards)
        write_index(fresh.partial, fresh.index)
    return fresh


def check_room(cache: Path, needed: int) -> None:
    """Raise ConfigError where the file system of ``cache`` has not ``needed`` bytes free."""
    if needed > free_disk(cache):
        raise _no_room(cache, needed)


def free_disk(path: Path) -> int:
    """Bytes free on the file system that ``path`` stands on, or will."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def compute(
    building: Building,
    policy: Policy,
    episodes: Sequence[DatasetEpisode],
    key: FeatureKey,
    *,
    batch_size: int = 16,
    on_rows: Callable[[int], None] = lambda done: None,
) -> None:
    """Compute all that nobody else computes, wait for the rest, and complete the store.

    Args:
        episodes: as listed in ``key``.
        batch_size: frames that pass through the front at once.
        on_rows: is told after each shard how many rows are done, by all processes.
    """
    by_digest = dict(zip(key.episodes, episodes, strict=True))
    dtype: FeatureDtype = key.fields.dtype  # type: ignore[assignment]  # of a key that we made
    policy.eval()
    try:
        for shard in building.shards.claim():
            own = building.rows_of(shard)
            row = own.start
            for episode, frames in _pieces(building, shard, by_digest):
                rows = embed_episode(policy, episode, frames, batch_size=batch_size)
                _write_rows(building.partial, rows, row, dtype)
                row += len(frames)
            _sync(building.partial, key)
            on_rows(building.rows_done() + len(own))
    except FileNotFoundError:
        if not building.complete.is_dir():
            raise  # another process has not completed it meanwhile: a file is really missing
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(building.complete.parent, building.index.bytes) from error
        raise
    _complete(building)
    on_rows(building.index.rows)


def _pieces(
    building: Building, shard: int, episodes: dict[str, DatasetEpisode]
) -> Iterator[tuple[DatasetEpisode, np.ndarray[tuple[int], np.dtype[np.int64]]]]:
    """The episodes whose rows lie in a shard, and which of their frames do."""
    rows = building.rows_of(shard)
    for held in building.index.episodes:
        start = max(rows.start, held.first_row) - held.first_row
        stop = min(rows.stop, held.first_row + held.rows) - held.first_row
        if start < stop:
            yield episodes[held.sha256], np.arange(start, stop)


def _reserve(path: Path, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    """An array's header, and its bytes taken from the disk now."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                   "shape": shape}
        )  # fmt: skip
        size = file.tell() + int(np.prod(shape)) * dtype.itemsize
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # no such call, or a file system without it
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            file.truncate(size)


def _write_rows(folder: Path, rows: Tensors, first_row: int, dtype: FeatureDtype) -> None:
    for name, values in rows.items():
        stored = to_stored(values, dtype, name)
        with (folder / f"{name}.npy").open("r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(first_row * (stored.nbytes // len(stored)), os.SEEK_CUR)
            file.write(np.ascontiguousarray(stored).data)


def _sync(folder: Path, key: FeatureKey) -> None:
    for name in key.fields.arrays:
        with (folder / f"{name}.npy").open("rb") as file:
            os.fsync(file.fileno())


def _complete(building: Building) -> None:
    with FileLock(building.complete.with_name(building.complete.name + ".lock")):
        if not building.complete.is_dir():
            (building.partial / _MAP).unlink()
            building.partial.replace(building.complete)
    shutil.rmtree(building.locks, ignore_errors=True)


def _no_room(cache: Path, needed: int) -> ConfigError:
    return ConfigError(
        f"the features need {needed / 2**20:,.1f} MiB, {cache} has {free_disk(cache) / 2**20:,.1f} "
        "MiB free; name another --feature-cache, or store them with fewer bytes "
        "(data.feature_dtype: fp16 or bf16)",
        field="feature_cache",
    )
