"""Version 3.0: episodes listed in parquet, many of them in one data file and one video file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.info import DatasetInfo
from reflexarc.data.lerobot.parquet import count_rows, read_table
from reflexarc.data.lerobot.records import (
    EpisodeRecord,
    Listing,
    VideoSpan,
    check_indices,
    require_files,
)
from reflexarc.data.presence import is_file

EPISODES_FOLDER, TASKS_PATH = "meta/episodes", "meta/tasks.parquet"


def list_episodes(info: DatasetInfo) -> Listing:
    """Read ``meta/episodes/*/*.parquet`` and ``meta/tasks.parquet``."""
    rows = _episode_rows(info)
    check_indices(info, [r["episode_index"] for r in rows], [r["length"] for r in rows])
    data = _DataFiles(info)
    videos = [key for key, feature in info.image_features.items() if feature.dtype == "video"]
    spans = [{key: _span(info, key, row) for key in videos} for row in rows]
    present = [
        key for key in videos if any(s is not None and is_file(s.path) for s in _of(spans, key))
    ]
    records = []
    for row, found in zip(rows, spans, strict=True):
        path, first = data.locate(row)
        listed = {key: span for key in present if (span := found[key]) is not None}
        missing = [key for key in present if key not in listed]
        if missing:
            raise DatasetError(
                f"{info.root}/meta/episodes: episode {row['episode_index']} has no video of "
                f"{', '.join(missing)}, which other episodes have",
                field=missing[0],
            )
        records.append(
            EpisodeRecord(
                index=row["episode_index"],
                length=row["length"],
                tasks=tuple(map(str, row.get("tasks") or ())),
                data_file=path,
                first_row=first,
                videos=listed,
            )
        )
    require_files(info, records)
    absent = tuple(key for key in videos if key not in present)
    return Listing(sorted(records, key=lambda r: r.index), _tasks(info), absent)


def _of(spans: Sequence[Mapping[str, VideoSpan | None]], key: str) -> list[VideoSpan | None]:
    return [span[key] for span in spans]


class _DataFiles:
    """The data files in order: rows of the dataset count through them.

    Episodes are found by ``dataset_from_index``, not by ``data/file_index``, which LeRobot's own
    converter from v2.1 states wrongly for the first episode of a file.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._paths = sorted((info.root / "data").glob("*/*.parquet"))
        if not self._paths:
            raise DatasetError(
                f"{info.root / 'data'} holds no parquet file; copy the dataset again, whole",
                field="data_path",
            )
        self._ends = list(accumulate(count_rows(path) for path in self._paths))

    def locate(self, row: Mapping[str, Any]) -> tuple[Path, int]:
        """The file of an episode and its first row there."""
        first, last = row["dataset_from_index"], row["dataset_to_index"]
        if last - first != row["length"]:
            raise DatasetError(
                f"{self._info.root}/meta/episodes: episode {row['episode_index']} has rows {first} "
                f"to {last}, but its length is {row['length']}",
                field="length",
            )
        place = bisect_right(self._ends, first)
        if place == len(self._paths) or last > self._ends[place]:
            raise DatasetError(
                f"{self._info.root}: episode {row['episode_index']} should end at row {last}, the "
                f"files in data hold {self._ends[-1]} rows; one is missing or cut short: copy the "
                "dataset again",
                field="dataset_to_index",
            )
        return self._paths[place], first - (self._ends[place - 1] if place else 0)


def _episode_rows(info: DatasetInfo) -> list[dict[str, Any]]:
    paths = sorted((info.root / EPISODES_FOLDER).glob("*/*.parquet"))
    if not paths:
        raise DatasetError(
            f"{info.root / EPISODES_FOLDER} holds no parquet file; copy the dataset again, whole"
        )
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = read_table(path, lambda name: not name.startswith("stats/"))
        rows.extend(table.to_pylist())
    needed = ("episode_index", "length", "dataset_from_index", "dataset_to_index")
    for row in rows:
        for key in needed:
            if not isinstance(row.get(key), int):
                raise DatasetError(
                    f"{info.root / EPISODES_FOLDER}: {key} is {row.get(key)!r} where a number is "
                    "needed",
                    field=key,
                )
    return rows


def _span(info: DatasetInfo, key: str, row: Mapping[str, Any]) -> VideoSpan | None:
    """Where the frames of a camera lie, None where the episode does not say."""
    chunk, file, start = (
        row.get(f"videos/{key}/{name}") for name in ("chunk_index", "file_index", "from_timestamp")
    )
    if chunk is None or file is None or start is None:
        return None
    try:
        relative = info.video_path.format(
            video_key=key, chunk_index=int(chunk), file_index=int(file)
        )
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(
            f"{info.root}/meta/info.json: video_path {info.video_path!r} asks for {error}",
            field="video_path",
        ) from error
    return VideoSpan(info.root / relative, float(start))


def _tasks(info: DatasetInfo) -> dict[int, str]:
    """pandas writes the instruction as its index, whatever that column is called."""
    table = read_table(info.root / TASKS_PATH)
    names = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(names) != 1:
        raise DatasetError(
            f"{info.root / TASKS_PATH} has the columns {', '.join(table.column_names)}; expected "
            "task_index and the task",
            field="task_index",
        )
    indices, tasks = (table.column(name).to_pylist() for name in ("task_index", names[0]))
    return {int(index): str(task) for index, task in zip(indices, tasks, strict=True)}
