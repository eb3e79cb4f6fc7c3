"""The layout of LIBERO's HDF5 files, and access to it that names file, demo and key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATES, StateSpec

Alignment = Literal["before_action", "after_action"]
ALIGNMENTS: tuple[Alignment, ...] = ("before_action", "after_action")
ACTION_DIMENSION = 7
CAMERA_DATASETS = {"agentview": "obs/agentview_rgb", "eye_in_hand": "obs/eye_in_hand_rgb"}
STATE_PARTS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "eef3+axisangle3+fingers2": (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)),
    "joint7+fingers2": (("joint_states", 7), ("gripper_states", 2)),
    "eef3+axisangle3+fingers2+joint7": (
        ("ee_pos", 3),
        ("ee_ori", 3),
        ("gripper_states", 2),
        ("joint_states", 7),
    ),
}
# What h5py raises for files that are cut short, overwritten or of another format.
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def libero_state_spec(layout: str) -> StateSpec:
    """The state in one of LIBERO's layouts; DatasetError for another."""
    if layout not in LIBERO_STATES:
        raise DatasetError(
            f"state layout {layout!r} is unknown; known: {', '.join(LIBERO_STATES)}",
            field="layout",
        )
    return LIBERO_STATES[layout]


@dataclass(frozen=True)
class FileKind:
    """What one file says of all its demos."""

    task_name: str
    instruction: str
    alignment: Alignment
    recognised_by: str
    render_stride: int


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorts ``demo_2`` before ``demo_10``."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)
    ]


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open for reading for the length of the block; DatasetError for a file that cannot be."""
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except _HDF5_ERRORS as error:
        raise DatasetError(
            f"{path} cannot be opened as HDF5 ({error}); it is truncated, still being written or "
            "of another format: copy or collect it again"
        ) from error
    try:
        yield file
    except DatasetError:
        raise
    except _HDF5_ERRORS as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); it is corrupt: copy or collect it again"
        ) from error
    finally:
        file.close()


def require_dataset(
    file: Any,
    path: Path,
    demo: str,
    key: str,
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
) -> Any:
    """The dataset ``data/<demo>/<key>``; None in ``shape`` stands for any positive size."""
    try:
        dataset = file[f"data/{demo}/{key}"]
    except _HDF5_ERRORS as error:
        reason = "is missing" if isinstance(error, KeyError) else f"cannot be opened ({error})"
        raise DatasetError(
            f"{path}, {demo}: {key} {reason}; remove this demo or collect it again", field=key
        ) from error
    if not isinstance(dataset, h5py.Dataset):
        raise DatasetError(f"{path}, {demo}: {key} is a group, not a dataset", field=key)
    if dtype is not None and dataset.dtype != np.dtype(dtype):
        raise DatasetError(f"{path}, {demo}: {key} is {dataset.dtype}, not {dtype}", field=key)
    if dtype is None and dataset.dtype.kind not in "iuf":
        raise DatasetError(f"{path}, {demo}: {key} is {dataset.dtype}, not numbers", field=key)
    if shape is None:
        return dataset
    fits = len(dataset.shape) == len(shape) and all(
        wanted is None or wanted == size for size, wanted in zip(dataset.shape, shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise DatasetError(
            f"{path}, {demo}: {key} has shape {dataset.shape}, expected {wanted}; "
            "remove this demo or collect it again",
            field=key,
        )
    return dataset


def read_dataset(
    dataset: Any, path: Path, demo: str, key: str, rows: slice | npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Read rows; DatasetError naming the key when its bytes are damaged."""
    try:
        return np.asarray(dataset[rows])
    except _HDF5_ERRORS as error:
        raise DatasetError(
            f"{path}, {demo}: {key} cannot be read ({error}); the file is corrupt: "
            "copy or collect it again",
            field=key,
        ) from error


def describe_file(file: Any, path: Path, demo: str, override: Alignment | None) -> FileKind:
    """Recognise the file's kind from its attributes and those of ``demo``."""
    attributes = file["data"].attrs
    task_name = path.name.removesuffix(".hdf5").removesuffix("_demo")
    alignment, reason = _alignment(attributes, file["data"][demo].attrs, path, demo)
    if override is not None:
        alignment, reason = override, "the caller"
    if alignment is None:
        raise DatasetError(
            f"{path}, {demo}: cannot tell whether observations stand before or after their action "
            f"({reason}); say which: alignment='before_action' or 'after_action'",
            field="alignment",
        )
    stride = int(attributes.get("render_stride", 1))
    if stride < 1:
        raise DatasetError(f"{path}: render_stride is {stride}, must be positive")
    return FileKind(task_name, _instruction(attributes, path, task_name), alignment, reason, stride)


def _alignment(
    file_attributes: Any, demo_attributes: Any, path: Path, demo: str
) -> tuple[Alignment | None, str]:
    """The alignment (None when it cannot be told) and the reason."""
    stated = _text(file_attributes.get("alignment"))
    if stated is not None:
        for alignment in ALIGNMENTS:
            if stated == alignment:
                return alignment, "attribute alignment"
        raise DatasetError(
            f"{path}, {demo}: attribute alignment is {stated!r}, not one of {ALIGNMENTS}",
            field="alignment",
        )
    if _text(file_attributes.get("tag")) == "libero-v1":
        return "after_action", "official: tag libero-v1"
    has_env_args = "env_args" in file_attributes
    has_num_samples = "num_samples" in demo_attributes
    if has_env_args and has_num_samples:
        return "after_action", "official: env_args and num_samples"
    if not has_env_args and not has_num_samples:
        return "before_action", "regenerated: neither env_args nor num_samples"
    present = "env_args without num_samples" if has_env_args else "num_samples without env_args"
    return None, f"the file has {present}"


def _instruction(attributes: Any, path: Path, task_name: str) -> str:
    """``language_instruction`` of ``problem_info``, else the task's name in words."""
    text = _text(attributes.get("problem_info"))
    if text is not None:
        try:
            instruction = json.loads(text)["language_instruction"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: attribute problem_info is no JSON map with language_instruction",
                field="problem_info",
            ) from error
        # Official LIBERO-100 files hold it as a list of characters' words in quotes at times.
        joined = "".join(instruction) if isinstance(instruction, list) else str(instruction)
        return joined.strip().strip('"')
    # Regenerated files carry no attributes: KITCHEN_SCENE3_turn_on_the_stove -> turn on the stove.
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task_name).replace("_", " ")


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)
