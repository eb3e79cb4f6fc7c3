"""``meta/info.json``: version, rate, features and where files lie; ``meta/modality.json``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import DatasetError
from reflexarc.data.presence import not_allowed

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO_PATH, MODALITY_PATH = "meta/info.json", "meta/modality.json"
_IMAGE_TYPES = ("video", "image")


@dataclass(frozen=True)
class Feature:
    """One feature as ``info.json`` declares it.

    Attributes:
        dtype: numpy's name, ``video``, ``image`` or ``string``.
        shape: of one row.
        names: of a vector's dimensions, empty where they are not given.
        is_depth: whether it is a depth map rather than colours.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    is_depth: bool = False

    @property
    def is_image(self) -> bool:
        return self.dtype in _IMAGE_TYPES

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, whose channels stand first or last."""
        channels_first = self.shape[0] in (1, 3) and self.shape[-1] not in (1, 3)
        height, width = self.shape[1:3] if channels_first else self.shape[:2]
        return height, width


@dataclass(frozen=True)
class Slice:
    """Columns ``start`` to ``end`` (exclusive) of the feature ``key``."""

    key: str
    start: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Modality:
    """GR00T's names: parts of the state and action vectors, and of cameras."""

    state: Mapping[str, Slice] = field(default_factory=dict)
    action: Mapping[str, Slice] = field(default_factory=dict)
    cameras: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetInfo:
    """What ``info.json`` says.

    Attributes:
        root: the dataset's folder.
        fps: rows a second.
        total_episodes, total_frames: as stated, None where they are not.
        data_path, video_path: templates of files, relative to ``root``.
        chunks_size: episodes (v2) or files (v3) a folder.
        modality: of ``meta/modality.json``, empty where there is none.
    """

    root: Path
    version: str
    fps: float
    robot: str
    features: Mapping[str, Feature]
    total_episodes: int | None
    total_frames: int | None
    data_path: str
    video_path: str
    chunks_size: int
    modality: Modality

    @property
    def image_features(self) -> dict[str, Feature]:
        """Declared cameras with colours, whether or not their files are there."""
        return {k: f for k, f in self.features.items() if f.is_image and not f.is_depth}

    def vector(self, key: str) -> Feature:
        """A numeric vector feature; DatasetError naming those there are."""
        feature = self.features.get(key)
        if feature is None or feature.is_image or len(feature.shape) != 1:
            known = ", ".join(
                k for k, f in self.features.items() if not f.is_image and len(f.shape) == 1
            )
            raise DatasetError(
                f"{self.root}: there is no vector {key!r}; there are: {known}", field=key
            )
        return feature


def read_info(root: Path) -> DatasetInfo:
    """Read ``info.json`` and ``modality.json``; DatasetError naming the key that is wrong."""
    values = read_json(root / INFO_PATH)
    version = str(values.get("codebase_version"))
    if version not in VERSIONS:
        raise DatasetError(
            f"{root / INFO_PATH}: codebase_version is {version!r}; versions that are read: "
            f"{', '.join(VERSIONS)}",
            field="codebase_version",
        )
    try:
        features = {key: _feature(key, value) for key, value in values["features"].items()}
        fps = float(values["fps"])
        info = DatasetInfo(
            root=root,
            version=version,
            fps=fps,
            robot=str(values.get("robot_type") or ""),
            features=features,
            total_episodes=_optional_int(values.get("total_episodes")),
            total_frames=_optional_int(values.get("total_frames")),
            data_path=str(values["data_path"]),
            video_path=str(values.get("video_path") or ""),
            chunks_size=int(values.get("chunks_size") or 1000),
            modality=_read_modality(root, features),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DatasetError(
            f"{root / INFO_PATH} is not as LeRobot writes it: {type(error).__name__} {error}",
            field=str(error.args[0]) if isinstance(error, KeyError) else None,
        ) from error
    if not (fps > 0 and math.isfinite(fps)):
        raise DatasetError(
            f"{root / INFO_PATH}: fps is {fps:g}; write the rows a second, a number above 0",
            field="fps",
        )
    return info


def read_json(path: Path) -> dict[str, Any]:
    """A JSON map; DatasetError for a file that is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist; copy the dataset again, whole") from None
    except PermissionError as error:
        raise not_allowed(path, error) from error
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read as JSON ({error}); copy it again, or correct it"
        ) from error
    if not isinstance(values, dict):
        raise DatasetError(f"{path} must hold a JSON map, holds {type(values).__name__}")
    return values


def parse_slice(text: str) -> tuple[str, int | None, int | None]:
    """``key[2:5]`` to ``("key", 2, 5)``; ``key`` alone to ``("key", None, None)``."""
    matched = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", text)
    if matched is None:
        return text, None, None
    return matched[1], int(matched[2]), int(matched[3])


def _feature(key: str, value: Mapping[str, Any]) -> Feature:
    stated = {**(value.get("video_info") or {}), **(value.get("info") or {})}
    depth = stated.get("video.is_depth_map", stated.get("is_depth_map", False))
    shape = tuple(int(n) for n in value["shape"])
    names = _names(value.get("names"))
    return Feature(
        key=key,
        dtype=str(value["dtype"]),
        shape=shape,
        names=names if len(shape) == 1 and len(names) == shape[0] else (),
        is_depth=bool(depth),
    )


def _names(stated: Any) -> tuple[str, ...]:
    """Names as a list, or as a map of lists (``{"motors": [...]}``)."""
    if isinstance(stated, Mapping):
        values = list(stated.values())
        stated = values[0] if len(values) == 1 and isinstance(values[0], list) else []
    if not isinstance(stated, list):
        return ()
    return tuple(str(name) for name in stated)


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _read_modality(root: Path, features: Mapping[str, Feature]) -> Modality:
    path = root / MODALITY_PATH
    if not path.is_file():
        return Modality()
    values = read_json(path)
    try:
        return Modality(
            state=_slices(values.get("state") or {}, "observation.state", features, path),
            action=_slices(values.get("action") or {}, "action", features, path),
            cameras=_cameras(values.get("video") or {}, features, path),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{path} is not as GR00T writes it: {type(error).__name__} {error}"
        ) from error


def _cameras(
    stated: Mapping[str, Any], features: Mapping[str, Feature], path: Path
) -> dict[str, str]:
    cameras = {}
    for name, value in stated.items():
        key = str(value.get("original_key", f"observation.images.{name}"))
        if key not in features:
            known = ", ".join(key for key, feature in features.items() if feature.is_image)
            raise DatasetError(
                f"{path}: camera {name!r} is {key!r}, which info.json does not declare; it "
                f"declares: {known or 'no cameras'}. Correct its original_key, or remove it",
                field=name,
            )
        cameras[name] = key
    return cameras


def _slices(
    parts: Mapping[str, Any], default: str, features: Mapping[str, Feature], path: Path
) -> dict[str, Slice]:
    slices = {}
    for name, value in parts.items():
        part = Slice(
            str(value.get("original_key", default)), int(value["start"]), int(value["end"])
        )
        feature = features.get(part.key)
        if feature is None:
            raise DatasetError(
                f"{path}: part {name!r} is of {part.key!r}, which info.json does not declare; it "
                f"declares: {', '.join(features)}. Correct its original_key, or remove it",
                field=name,
            )
        width = feature.shape[0] if feature is not None and len(feature.shape) == 1 else 0
        if not 0 <= part.start < part.end <= width:
            raise DatasetError(
                f"{path}: part {name!r} is {part.key}[{part.start}:{part.end}], outside the "
                f"{width} columns of that feature; correct it by the features of info.json",
                field=name,
            )
        slices[name] = part
    return slices
