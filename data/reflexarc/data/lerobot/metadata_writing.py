"""The ``meta`` folder of LeRobot v3.0: info, tasks, episodes and statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reflexarc.data.lerobot.encoding import Codec
from reflexarc.data.lerobot.image_statistics import ImageSums
from reflexarc.data.lerobot.parquet import ColumnCache
from reflexarc.data.libero_writer import atomic_path

if TYPE_CHECKING:
    from reflexarc.data.lerobot.writing import Group, Layout

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_CHUNK = 1000
_INDICES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class Described:
    """A vector's dtype and the names of its dimensions."""

    dtype: str
    names: tuple[str, ...]


def file_indices(number: int) -> dict[str, int]:
    """``chunk_index`` and ``file_index`` of the file of group ``number``."""
    return {"chunk_index": number // _CHUNK, "file_index": number % _CHUNK}


def write_metadata(
    root: Path, layout: Layout, codec: Codec, groups: Sequence[Group], tasks: Mapping[str, int]
) -> None:
    """Write everything below ``root/meta`` for data and videos that are there; info comes last."""
    _write_tasks(root / "meta/tasks.parquet", tasks)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(_episodes(layout, groups), temporary)
    _write_json(root / "meta/stats.json", _statistics(root, layout, groups))
    _write_json(root / "meta/info.json", _info(layout, codec, groups, tasks))


def _info(
    layout: Layout, codec: Codec, groups: Sequence[Group], tasks: Mapping[str, int]
) -> dict[str, Any]:
    lengths = [episode.length for group in groups for episode in group.episodes]
    features: dict[str, Any] = {
        key: {"dtype": d.dtype, "shape": [len(d.names)], "names": list(d.names)}
        for key, d in layout.vectors.items()
    }
    for key, (height, width) in layout.cameras.items():
        features[key] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "av1" if codec.name == "av1" else "h264",
                "video.pix_fmt": codec.pixel_format if codec.name != "lossless" else "gbrp",
                "video.is_depth_map": False,
                "video.fps": _plain(layout.fps),
                "video.channels": 3,
                "has_audio": False,
            },
        }
    for key, dtype in _INDICES.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": layout.robot,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(tasks),
        "chunks_size": _CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": _plain(layout.fps),
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _episodes(layout: Layout, groups: Sequence[Group]) -> Any:
    rows: list[dict[str, Any]] = []
    first = 0
    for number, group in enumerate(groups):
        where = file_indices(number)
        for episode in group.episodes:
            row: dict[str, Any] = {
                "episode_index": len(rows),
                "tasks": [episode.task],
                "length": episode.length,
                "data/chunk_index": where["chunk_index"],
                "data/file_index": where["file_index"],
                "dataset_from_index": first,
                "dataset_to_index": first + episode.length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
            for key in layout.cameras:
                start = episode.video_starts[key]
                row[f"videos/{key}/chunk_index"] = where["chunk_index"]
                row[f"videos/{key}/file_index"] = where["file_index"]
                row[f"videos/{key}/from_timestamp"] = start
                row[f"videos/{key}/to_timestamp"] = start + episode.length / layout.fps
            rows.append(row)
            first += episode.length
    return pa.Table.from_pylist(rows)


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """As pandas writes a frame whose index is the task, which LeRobot reads it with."""
    index = "__index_level_0__"
    table = pa.table(
        {"task_index": pa.array(list(tasks.values()), pa.int64()), index: pa.array(list(tasks))}
    )
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64",
         "numpy_type": "int64", "metadata": None},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object",
         "metadata": None},
    ]  # fmt: skip
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns,
              "creator": {"library": "pyarrow", "version": pa.__version__},
              "pandas_version": "2.0.0"}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), temporary)


def _statistics(root: Path, layout: Layout, groups: Sequence[Group]) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    columns = ColumnCache(kept=1)
    paths = [root / DATA_PATH.format(**file_indices(n)) for n in range(len(groups))]
    for key in (*layout.vectors, *_INDICES):
        rows = np.concatenate([np.asarray(columns.get(path, key)) for path in paths])
        values = rows.reshape(len(rows), -1).astype(np.float64)
        statistics[key] = {
            "min": values.min(0).tolist(),
            "max": values.max(0).tolist(),
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
            "count": [len(values)],
            **{n: np.quantile(values, q, axis=0).tolist() for n, q in _QUANTILES.items()},
        }
    for key in layout.cameras:
        sums = ImageSums()
        for group in groups:
            sums.merge(group.pixels[key])
        statistics[key] = sums.to_lerobot()
    return statistics


def _plain(fps: float) -> float | int:
    return int(fps) if float(fps).is_integer() else fps


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=4, ensure_ascii=False))
