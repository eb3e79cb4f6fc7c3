"""Versions 2.0 and 2.1: JSON lines, one parquet and one video file an episode.

The two differ in where statistics stand (``stats.json``, ``episodes_stats.jsonl``), which are
computed anew here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.info import DatasetInfo
from reflexarc.data.lerobot.records import (
    EpisodeRecord,
    Listing,
    VideoSpan,
    check_indices,
    require_files,
)
from reflexarc.data.presence import is_file, not_allowed


def list_episodes(info: DatasetInfo) -> Listing:
    """Read ``episodes.jsonl`` and ``tasks.jsonl``; DatasetError naming file and line."""
    episodes_path, tasks_path = (info.root / f"meta/{n}.jsonl" for n in ("episodes", "tasks"))
    tasks = {
        _integer(line, "task_index", tasks_path): str(_value(line, "task", tasks_path))
        for line in _lines(tasks_path)
    }
    rows = _lines(episodes_path)
    indices = [_integer(row, "episode_index", episodes_path) for row in rows]
    lengths = [_integer(row, "length", episodes_path) for row in rows]
    check_indices(info, indices, lengths)
    videos = [key for key, feature in info.image_features.items() if feature.dtype == "video"]
    present = [
        key for key in videos if any(is_file(_path(info, info.video_path, i, key)) for i in indices)
    ]
    records = [
        EpisodeRecord(
            index=index,
            length=length,
            tasks=tuple(map(str, row.get("tasks") or ())),
            data_file=_path(info, info.data_path, index),
            first_row=0,
            videos={k: VideoSpan(_path(info, info.video_path, index, k), 0.0) for k in present},
        )
        for row, index, length in zip(rows, indices, lengths, strict=True)
    ]
    require_files(info, records)
    absent = tuple(key for key in videos if key not in present)
    return Listing(sorted(records, key=lambda record: record.index), tasks, absent)


def _path(info: DatasetInfo, template: str, index: int, video: str = "") -> Path:
    try:
        relative = template.format(
            episode_chunk=index // info.chunks_size, episode_index=index, video_key=video
        )
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(
            f"{info.root}/meta/info.json: the path {template!r} asks for {error}, which version "
            f"{info.version} has not",
            field="data_path" if not video else "video_path",
        ) from error
    return info.root / relative


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist; copy the dataset again, whole") from None
    except PermissionError as error:
        raise not_allowed(path, error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); copy it again") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(
                f"{path}, line {number} is not JSON ({error}); copy it again, or correct the line"
            ) from error
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, line {number} is no JSON map")
        rows.append(row)
    return rows


def _integer(row: dict[str, Any], key: str, path: Path) -> int:
    value = _value(row, key, path)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DatasetError(
            f"{path}: {key} is {value!r} where a whole number is needed; correct the line "
            f"{str(row)[:120]}",
            field=key,
        )
    return value


def _value(row: dict[str, Any], key: str, path: Path) -> Any:
    if key not in row:
        raise DatasetError(f"{path}: a line has no {key!r}: {str(row)[:120]}", field=key)
    return row[key]
