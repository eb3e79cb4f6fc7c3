"""Small LeRobot datasets of every version, written as the format's own tools write them.

No test file, so that tests of other folders can import it by path too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, SIZE = 10, (48, 64)
STATE, ACTION = 5, 3
CAMERA, ABSENT = "observation.images.front", "observation.images.ghost"
ENCODERS = {"h264": ("libx264", {"crf": "20", "g": "6"}), "av1": ("libsvtav1", {"crf": "25"})}


def level(episode: int, frame: int) -> int:
    """The grey of a frame, far enough from its neighbours' that a codec keeps them apart."""
    return 20 + (frame * 17 + episode * 90) % 200


def picture(episode: int, frame: int) -> np.ndarray:
    image = np.full((*SIZE, 3), level(episode, frame), dtype=np.uint8)
    image[: SIZE[0] // 2, :, 0] = 255 - level(episode, frame)
    return image


def read_level(image: np.ndarray) -> int:
    return round(float(image[SIZE[0] // 2 + 6 :].mean()))


def level_of_frame(dataset: bytes, step: int) -> int:
    """In a worker process: the grey of a frame of the second episode."""
    return read_level(pickle.loads(dataset).episodes[1].images("front", [step])[0])  # noqa: S301


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    name, options = ENCODERS[codec]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(name, rate=Fraction(FPS), options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def rows_of(episode: int, length: int, first_index: int, first_time: float = 0.0) -> dict[str, Any]:
    random = np.random.default_rng(episode)
    return {
        "observation.state": random.normal(size=(length, STATE)),
        "action": random.normal(size=(length, ACTION)).astype(np.float32),
        "timestamp": (first_time + np.arange(length) / FPS).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, episode),
        "index": first_index + np.arange(length),
        "task_index": np.full(length, episode % 2),
    }


def table_of(columns: dict[str, Any]) -> pa.Table:
    return pa.table({k: v.tolist() if v.ndim > 1 else v for k, v in columns.items()})


def features(codec: str) -> dict[str, Any]:
    video = {
        "dtype": "video",
        "shape": [*SIZE, 3],
        "names": ["height", "width", "channel"],
        "info": {"video.fps": FPS, "video.codec": codec, "video.is_depth_map": False},
    }
    scalars = ("frame_index", "episode_index", "index", "task_index")
    return {
        "observation.state": {
            "dtype": "float64", "shape": [STATE], "names": [f"joint_{i}" for i in range(STATE)],
        },
        "action": {"dtype": "float32", "shape": [ACTION], "names": {"motors": ["x", "y", "z"]}},
        CAMERA: video,
        ABSENT: video,
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in scalars},
    }  # fmt: skip


TASKS = ("pick the pear", "open the drawer")


def write_v2(
    root: Path,
    *,
    version: str = "v2.1",
    lengths: Sequence[int] = (12, 7, 9),
    codec: str = "h264",
    first_time: float = 0.0,
) -> Path:
    """A parquet and an mp4 an episode; ``ABSENT`` is declared and has no file."""
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(root, version, lengths, data, video, codec)
    first = 0
    episodes, tasks = [], []
    for episode, length in enumerate(lengths):
        names = {"episode_chunk": 0, "episode_index": episode, "video_key": CAMERA}
        path = root / data.format(**names)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of(rows_of(episode, length, first, first_time)), path)
        frames = [picture(episode, frame) for frame in range(length)]
        write_video(root / video.format(**names), frames, codec)
        first += length
        line = {"episode_index": episode, "tasks": [TASKS[episode % 2]], "length": length}
        episodes.append(json.dumps(line))
    tasks = [json.dumps({"task_index": i, "task": task}) for i, task in enumerate(TASKS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(episodes) + "\n")
    (root / "meta/tasks.jsonl").write_text("\n".join(tasks) + "\n")
    return root


def write_v3(root: Path, *, lengths: Sequence[int] = (12, 7, 9), codec: str = "h264") -> Path:
    """Two episodes in the first data and video file, the others in the second."""
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    write_info(root, "v3.0", lengths, data, video, codec)
    rows: list[dict[str, Any]] = []
    first = 0
    for file, members in enumerate((range(2), range(2, len(lengths)))):
        tables, frames, start = [], [], 0.0
        for episode in members:
            length = lengths[episode]
            tables.append(table_of(rows_of(episode, length, first)))
            frames += [picture(episode, frame) for frame in range(length)]
            where = {"chunk_index": 0, "file_index": file}
            rows.append(
                {
                    "episode_index": episode, "tasks": [TASKS[episode % 2]], "length": length,
                    "dataset_from_index": first, "dataset_to_index": first + length,
                    **{f"data/{k}": v for k, v in where.items()},
                    **{f"videos/{CAMERA}/{k}": v for k, v in where.items()},
                    f"videos/{CAMERA}/from_timestamp": start,
                    f"videos/{CAMERA}/to_timestamp": start + length / FPS,
                    "stats/action/min": [0.0] * ACTION,
                }
            )  # fmt: skip
            first, start = first + length, start + length / FPS
        path = root / data.format(chunk_index=0, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path)
        write_video(root / video.format(video_key=CAMERA, **where), frames, codec)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    return root


def write_info(
    root: Path, version: str, lengths: Sequence[int], data: str, video: str, codec: str
) -> None:
    (root / "meta").mkdir(parents=True)
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": data,
        "video_path": video,
        "features": features(codec),
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
