"""LIBERO's HDF5 demonstrations to a LeRobot v3.0 dataset, a task file at a time.

LeRobot has an image for every row: where none was rendered, the one before is repeated, and the
column ``libero.rendered`` says so. Images are stored turned by half a turn, as the field's LIBERO
datasets are. What else a demo holds goes where :mod:`reflexarc.data.lerobot.from_libero` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action
from reflexarc.data.lerobot.encoding import Codec, ImageError
from reflexarc.data.lerobot.from_libero import FORMAT, MANIFEST, PREFIX, RENDERED, extra_file
from reflexarc.data.lerobot.hdf5_values import encode_attributes, encode_value
from reflexarc.data.lerobot.metadata_writing import Described
from reflexarc.data.lerobot.video_decoder import VideoDecoder
from reflexarc.data.lerobot.writing import Layout, LeRobotWriter, list_column
from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import find_files, list_demos, read_episode
from reflexarc.data.libero_layout import CAMERA_DATASETS, Alignment, open_hdf5
from reflexarc.data.libero_writer import atomic_path

CAMERA_FEATURES = {camera: f"observation.images.{camera}" for camera in CAMERA_DATASETS}
_IMAGE_STEPS = "obs/image_steps"
_FRAMES_AT_ONCE = 64
OnDemo = Callable[[str], None]


def convert_to_lerobot(
    paths: Sequence[Path],
    output: Path,
    *,
    codec: Codec | None = None,
    alignment: Alignment | None = None,
    on_demo: OnDemo = lambda name: None,
) -> ImageError:
    """Write ``output``; an interrupted conversion continues after its last whole task file.

    Args:
        paths: files or folders of LIBERO demonstrations.
        codec: of the videos.
        alignment: for files that cannot be recognised.
        on_demo: called after each demo, for progress; also for those converted before.

    Returns the images' error over all of them, as it is also written to ``meta/libero.json``.

    Raises DatasetError for files that do not read, and for images of several sizes.
    """
    codec = codec or Codec()
    files = {path: _episodes(path, alignment) for path in find_files(paths)}
    writer = LeRobotWriter(output, _layout(files), codec, _source(files, codec))
    error = ImageError()
    for number, (path, episodes) in enumerate(files.items()):
        if number < len(writer.groups):
            for episode in episodes:
                on_demo(f"{path.name} {episode.demo}")
        else:
            _convert_file(writer, path, episodes, on_demo)
        error.merge(_error_of(writer.groups[number].notes))
    manifest = {
        "format": FORMAT,
        "images": {"codec": codec.name, **codec.options, "error": error.to_json()},
        "files": [group.notes["file"] for group in writer.groups],
    }
    path = writer.partial / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    writer.finish()
    return error


def _episodes(path: Path, alignment: Alignment | None) -> list[Episode]:
    return [read_episode(path, demo, alignment) for demo in list_demos(path)]


def _layout(files: dict[Path, list[Episode]]) -> Layout:
    episodes = [episode for group in files.values() for episode in group]
    first = episodes[0]
    for episode in episodes:
        if episode.image_shape != first.image_shape:
            raise DatasetError(
                f"{episode.path}, {episode.demo} holds images of {episode.image_shape[:2]}, "
                f"{first.path} of {first.image_shape[:2]}; convert them to a dataset each",
                field="image_shape",
            )
    return Layout(
        vectors={
            "observation.state": Described("float64", LIBERO_STATE_EEF.names),
            "action": Described("float64", libero_action(1).names),
            RENDERED: Described("bool", ("rendered",)),
        },
        cameras=dict.fromkeys(CAMERA_FEATURES.values(), first.image_shape[:2]),
        robot="panda",
        fps=libero_action(1).control_hz,
    )


def _source(files: dict[Path, list[Episode]], codec: Codec) -> dict[str, Any]:
    return {
        "codec": asdict(codec),
        "files": [
            [
                str(path.resolve()),
                path.stat().st_size,
                path.stat().st_mtime_ns,
                episodes[0].alignment,
            ]
            for path, episodes in files.items()
        ],
    }


def _convert_file(
    writer: LeRobotWriter, path: Path, episodes: list[Episode], on_demo: OnDemo
) -> None:
    number = len(writer.groups)
    with writer.write_group() as group:
        for episode in episodes:
            rendered = np.zeros((episode.length, 1), dtype=bool)
            rendered[episode.image_steps] = True
            vectors = {
                "observation.state": episode.states(LIBERO_STATE_EEF.layout),
                "action": episode.actions(),
                RENDERED: rendered,
            }
            images = {f: _every_step(episode, camera) for camera, f in CAMERA_FEATURES.items()}
            group.add_episode(episode.instruction, vectors, images)
            on_demo(f"{path.name} {episode.demo}")
    data_file = writer.data_file(number)
    _write_rest(writer.partial, data_file, path, episodes)
    error = ImageError()
    for camera, feature in CAMERA_FEATURES.items():
        _measure(writer.video_file(number, feature), episodes, camera, writer.layout.fps, error)
    first = episodes[0]
    group.group.notes.update(
        file={
            "name": path.name,
            "task_name": first.task_name,
            "render_stride": first.render_stride,
            "alignment": first.alignment,
            "data_file": data_file.relative_to(writer.partial).as_posix(),
        },
        error=asdict(error),
    )
    writer.seal_group()


def _error_of(notes: dict[str, Any]) -> ImageError:
    return ImageError(**notes["error"])


def _turned(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return images[:, ::-1, ::-1]


def _every_step(episode: Episode, camera: str) -> Iterator[npt.NDArray[np.uint8]]:
    """T images; before the first rendered one, that one."""
    steps = [*episode.image_steps.tolist(), episode.length]
    for start in range(0, len(episode.image_steps), _FRAMES_AT_ONCE):
        stop = min(start + _FRAMES_AT_ONCE, len(episode.image_steps))
        for offset, image in enumerate(_turned(episode.images(camera, range(start, stop)))):
            index = start + offset
            shown_from = 0 if index == 0 else steps[index]
            for _ in range(shown_from, steps[index + 1]):
                yield image


def _measure(
    video: Path, episodes: list[Episode], camera: str, fps: float, error: ImageError
) -> None:
    """Decode every rendered image again and compare."""
    decoder = VideoDecoder(video)
    first = 0
    for episode in episodes:
        for start in range(0, len(episode.image_steps), _FRAMES_AT_ONCE):
            frames = range(start, min(start + _FRAMES_AT_ONCE, len(episode.image_steps)))
            originals = _turned(episode.images(camera, frames))
            times = [(first + int(episode.image_steps[i])) / fps for i in frames]
            for original, decoded in zip(originals, decoder.frames(times), strict=True):
                error.add(original, decoded)
        first += episode.length
    decoder.close()


def _write_rest(root: Path, data_file: Path, path: Path, episodes: list[Episode]) -> None:
    """Everything but images: arrays with a row a step as parquet, the rest as JSON."""
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    demos = []
    with open_hdf5(path) as file:
        for episode in episodes:
            group = file["data"][episode.demo]
            others = {}
            for key, values in _arrays(group):
                if key in CAMERA_DATASETS.values() or key == _IMAGE_STEPS:
                    continue
                rows = _aligned(key, values, episode, len(group["actions"]))
                if rows is None:
                    others[key] = encode_value(values)
                else:
                    columns.setdefault(PREFIX + key.replace("/", "."), []).append(rows)
            demos.append(
                {
                    "name": episode.demo,
                    "attributes": encode_attributes(group.attrs),
                    "observation_attributes": encode_attributes(group["obs"].attrs),
                    "arrays": others,
                    "image_steps": (
                        str(group[_IMAGE_STEPS].dtype) if _IMAGE_STEPS in group else None
                    ),
                    "keys": [k for k, _ in _arrays(group)],
                }
            )
        attributes = encode_attributes(file["data"].attrs)
        of_file = encode_attributes(file.attrs)
    target = extra_file(root, data_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        pq.write_table(pa.table(_joined(columns, path, len(episodes))), temporary)
    with atomic_path(target.with_suffix(".json")) as temporary:
        stated = {"file_attributes": of_file, "attributes": attributes, "demos": demos}
        temporary.write_text(json.dumps(stated))


def _joined(columns: dict[str, list[npt.NDArray[Any]]], path: Path, demos: int) -> dict[str, Any]:
    joined = {}
    for name, rows in columns.items():
        shapes = {(part.shape[1:], str(part.dtype)) for part in rows}
        if len(rows) != demos or len(shapes) != 1:
            raise DatasetError(
                f"{path}: {name.removeprefix(PREFIX)} is in {len(rows)} of {demos} demos, with the "
                f"shapes and types {sorted(map(str, shapes))}; all demos of a file must agree",
                field=name.removeprefix(PREFIX),
            )
        joined[name] = list_column(np.concatenate(rows))
    return joined


def _arrays(group: Any) -> list[tuple[str, npt.NDArray[Any]]]:
    """Key and dataset of everything in a demo; image datasets are not read."""
    found: list[tuple[str, Any]] = []
    group.visititems(
        lambda key, item: found.append((key, item)) if hasattr(item, "dtype") else None
    )
    images = set(CAMERA_DATASETS.values())
    return [(key, item if key in images else item[()]) for key, item in found]


def _aligned(
    key: str, values: npt.NDArray[Any], episode: Episode, stored: int
) -> npt.NDArray[Any] | None:
    """The T rows of an array with a row a step, None for another.

    In files whose observations stand after their action, the first action and the last
    observation have no counterpart and are left out, as the reader leaves them out.
    """
    if np.ndim(values) == 0 or len(values) != stored or values.dtype.kind not in "biuf":
        return None
    is_observation = key.startswith("obs/") or key == "robot_states"
    first = 1 if episode.alignment == "after_action" and not is_observation else 0
    return values[first : first + episode.length]
