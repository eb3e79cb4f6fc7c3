"""The JSON index of a store: its key, its episodes and its arrays; and opening what it names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.training.feature_store.dtypes import NUMPY_DTYPES, FeatureArray
from reflexarc.training.feature_store.keys import FORMAT, FeatureKey, KeyFields, StrictModel

INDEX = "index.json"
_FORMAT_1 = "manifest.json"


class EpisodeRows(StrictModel):
    """Where the rows of one episode lie."""

    sha256: str
    first_row: int
    rows: int


class StoreIndex(StrictModel):
    """What ``index.json`` holds.

    Attributes:
        key: what the features depend on.
        rows: of every array.
        shard_rows: rows that are computed, and marked as done, together.
        episodes: in the order of their rows.
    """

    key: KeyFields
    rows: int
    shard_rows: int
    episodes: tuple[EpisodeRows, ...]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def bytes(self) -> int:
        """Of all arrays, without their headers."""
        return self.rows * row_bytes(self.key)

    def first_rows(self, key: FeatureKey) -> list[int] | None:
        """Row of the first frame of each episode of ``key``; None where one is not held."""
        held = {(episode.sha256, episode.rows): episode.first_row for episode in self.episodes}
        rows = [held.get(wanted) for wanted in zip(key.episodes, key.counts, strict=True)]
        return None if None in rows else [row for row in rows if row is not None]


def row_bytes(key: KeyFields) -> int:
    """Bytes of one frame's features in all arrays."""
    return sum(
        int(np.prod(array.row_shape)) * np.dtype(NUMPY_DTYPES[array.dtype]).itemsize
        for array in key.arrays.values()
    )


def make_index(key: FeatureKey, shard_rows: int) -> StoreIndex:
    """The index of a store of exactly the episodes of ``key``, sorted, each once."""
    episodes: list[EpisodeRows] = []
    row = 0
    for sha256, count in sorted(set(zip(key.episodes, key.counts, strict=True))):
        episodes.append(EpisodeRows(sha256=sha256, first_row=row, rows=count))
        row += count
    return StoreIndex(key=key.fields, rows=row, shard_rows=shard_rows, episodes=tuple(episodes))


def write_index(folder: Path, index: StoreIndex) -> None:
    """Write it durably under a temporary name, then rename."""
    temporary = folder / f".{INDEX}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(index.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / INDEX)


def read_index(folder: Path) -> StoreIndex | None:
    """The index of ``folder``, None where it holds none.

    Raises DatasetError where it is damaged, ConfigError where it is of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        if (folder / _FORMAT_1).is_file():
            raise _other_format(folder, "1")
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["key"]["format"]
        if found != FORMAT:
            raise _other_format(folder, str(found))
        return StoreIndex.model_validate(values)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DatasetError(
            f"{path} is damaged ({str(error).splitlines()[0]}); remove the folder {folder}, and "
            "its features are computed again",
            field="feature_cache",
        ) from error


def open_arrays(folder: Path, index: StoreIndex) -> dict[str, FeatureArray]:
    """The memory-mapped, read-only arrays that ``index`` names.

    Raises DatasetError for a file that is absent, cut short, or of another shape or dtype.
    """
    arrays = {}
    for name, expected in index.key.arrays.items():
        path = folder / f"{name}.npy"
        wanted = ((index.rows, *expected.row_shape), np.dtype(NUMPY_DTYPES[expected.dtype]))
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if (array.shape, array.dtype) != wanted:
            raise _damaged(
                path,
                f"it holds {array.dtype} {array.shape}, the index says {wanted[1]} {wanted[0]}",
            )
        arrays[name] = array
    return arrays


def _damaged(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"{path} is not what its index says: {why}; remove the folder {path.parent}, and its "
        "features are computed again",
        field="feature_cache",
    )


def _other_format(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"{folder} is a feature store of format {found}, this version reads format {FORMAT}; "
        "name another folder, and the features are computed again",
        field="feature_cache",
    )
