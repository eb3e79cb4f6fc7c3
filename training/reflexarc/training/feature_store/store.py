"""Finding features in a folder of stores, or computing them into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reflexarc.contract.errors import ConfigError, ReflexarcError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy
from reflexarc.training.feature_store.building import (
    SHARD_ROWS,
    begin,
    compute,
    find_partial,
)
from reflexarc.training.feature_store.dtypes import FeatureArray
from reflexarc.training.feature_store.index import StoreIndex, open_arrays, read_index
from reflexarc.training.feature_store.keys import FeatureKey, differences

_SHOWN_DIFFERENCES = 6


@dataclass(frozen=True)
class FrameFeatures:
    """Features of every frame of a list of episodes.

    Attributes:
        arrays: name to memory-mapped rows as they lie on disk, which ``as_rows`` reads. Rows of
            other episodes may stand among them.
        first_rows: row of each episode's first frame.
        path: the folder they lie in.
        needed: rows of the episodes.
        found: how many of them were there already.
        remark: why a store in the same folder was not taken; empty where that is not worth a line.
    """

    arrays: dict[str, FeatureArray]
    first_rows: list[int]
    path: Path
    needed: int
    found: int
    remark: str = ""

    @property
    def hit(self) -> bool:
        """Whether all of it was there already."""
        return self.found == self.needed

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def find_features(cache: Path, key: FeatureKey) -> Path | None:
    """The folder of a complete store that holds the features of ``key``, else None.

    It may hold other episodes and other arrays too.

    ``cache`` is a folder of stores, or one store, which is then refused by name where it is not
    the one that is wanted: ConfigError says which fields differ, with both values.
    """
    named = read_index(cache)
    if named is not None:
        _refuse_other(cache, named, key)
        return cache
    exact = cache / key.digest
    if exact.is_dir():
        return exact
    for folder, index in _stores(cache):
        if not differences(key.fields, index.key) and index.first_rows(key) is not None:
            return folder
    return None


def rows_found(cache: Path, key: FeatureKey) -> int:
    """How many rows of ``key`` are in ``cache``, those of an interrupted computation included."""
    if find_features(cache, key) is not None:
        return key.rows
    begun = find_partial(cache, key)
    return 0 if begun is None else begun.rows_done()


def open_features(folder: Path, key: FeatureKey, *, found: int, remark: str = "") -> FrameFeatures:
    """The features of ``key`` in a complete store.

    Raises DatasetError where a file is damaged.
    """
    index = read_index(folder)
    first_rows = None if index is None else index.first_rows(key)
    if index is None or first_rows is None:
        raise ConfigError(
            f"{folder} does not hold the features that its name promises; remove it, and they are "
            "computed again",
            field="feature_cache",
        )
    opened = open_arrays(folder, index)
    arrays = {name: opened[name] for name in key.fields.arrays}
    return FrameFeatures(arrays, first_rows, folder, key.rows, found, remark)


def frame_features(
    policy: Policy,
    episodes: Sequence[DatasetEpisode],
    key: FeatureKey,
    cache: Path,
    *,
    batch_size: int = 16,
    shard_rows: int = SHARD_ROWS,
    progress: bool = True,
) -> FrameFeatures:
    """Features of every frame of ``episodes``, from the store or computed into it.

    Processes that ask for the same features share the work.

    Args:
        policy: its ``embed_frames`` must depend on frozen weights only.
        key: of :func:`feature_key`, for these episodes in this order.
        cache: folder of stores, made when it is absent; or one store, which must be the right one.
        batch_size: frames a pass.
        shard_rows: at most how many frames an interruption loses.
    """
    folder = find_features(cache, key)
    if folder is not None:
        return open_features(folder, key, found=key.rows)
    remark = nearest(cache, key)
    building = begin(cache, key, shard_rows)
    found = building.rows_done()
    total = building.index.rows
    with tqdm(
        total=total, initial=found, desc="frame features", unit="frame", disable=not progress
    ) as bar:
        compute(
            building,
            policy,
            episodes,
            key,
            batch_size=batch_size,
            on_rows=lambda done: _show(bar, done),
        )
    return open_features(building.complete, key, found=min(found, key.rows), remark=remark)


def nearest(cache: Path, key: FeatureKey) -> str:
    """Which store of the same dataset comes nearest, and in what it differs; empty without one."""
    misses = [
        (len(found), f"{folder} differs: {_shown(found)}")
        for folder, index in _stores(cache)
        if index.key.dataset == key.fields.dataset and (found := _all_differences(index, key))
    ]
    return min(misses)[1] if misses else ""


def _stores(cache: Path) -> list[tuple[Path, StoreIndex]]:
    """The complete stores in a folder; what does not read as one is passed over."""
    stores = []
    for path in sorted(cache.glob("*/index.json")):
        if path.parent.suffix == ".partial":
            continue
        try:
            index = read_index(path.parent)
        except ReflexarcError:
            continue
        if index is not None:
            stores.append((path.parent, index))
    return stores


def _refuse_other(folder: Path, index: StoreIndex, key: FeatureKey) -> None:
    if folder.suffix == ".partial":
        raise ConfigError(
            f"{folder} is a store whose computation is not finished; name the folder it lies in",
            field="feature_cache",
        )
    found = _all_differences(index, key)
    if found:
        raise ConfigError(
            f"the features in {folder} are not those that are wanted: {_shown(found)}. Name "
            "another folder, and they are computed",
            field=found[0].partition(":")[0],
        )


def _all_differences(index: StoreIndex, key: FeatureKey) -> list[str]:
    found = differences(key.fields, index.key)
    held = {episode.sha256 for episode in index.episodes}
    absent = sum(sha256 not in held for sha256 in key.episodes)
    if absent:
        found.append(
            f"episodes: {len(held)} in the store, {absent} of {len(key.episodes)} wanted are not "
            "among them (or their frames or their files' names have changed)"
        )
    return found


def _shown(found: list[str]) -> str:
    more = len(found) - _SHOWN_DIFFERENCES
    return "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _show(bar: tqdm[Any], done: int) -> None:
    bar.update(done - bar.n)
