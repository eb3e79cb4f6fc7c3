"""The layout of a mobile robot's HDF5 episode, and reading that names file and key.

One file is one episode. At its root stand ``images (T, H, W, 3)`` uint8 RGB, upright,
``actions (T, >= 2)`` (``linear_x``, ``linear_y``, ...) in metres a second, and as a dataset or an
attribute ``language_instruction``. Row ``t`` of images precedes action ``t``. Files of ours hold
beside them ``expert_actions`` (the labels under injected noise) and the attribute ``control_hz``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError

IMAGES, ACTIONS, EXPERT = "images", "actions", "expert_actions"
INSTRUCTION, CONTROL_HZ = "language_instruction", "control_hz"
CAMERA = "front"
VELOCITIES = ("linear_x", "linear_y")
DEFAULT_PATTERN = "*.h5"
# What h5py raises for files that are cut short, overwritten or of another format.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def rows_of(
    file: Any, path: Path, key: str, *, width: int | None = None
) -> Any:  # h5py is untyped here
    """The dataset at ``key``, of numbers, ``(T, >= 2)`` or with ``width`` exactly so wide."""
    dataset = _dataset(file, path, key)
    if dataset.dtype.kind not in "iuf":
        raise DatasetError(f"{path}: {key} is {dataset.dtype}, not numbers", field=key)
    wide_enough = dataset.ndim == 2 and dataset.shape[1] >= (width or len(VELOCITIES))
    if not wide_enough or (width is not None and dataset.shape[1] != width):
        wanted = f"(T, {width})" if width is not None else f"(T, {len(VELOCITIES)} or more)"
        raise DatasetError(
            f"{path}: {key} has shape {dataset.shape}, expected {wanted}: "
            f"{', '.join(VELOCITIES)} first; record it again, or leave the file out with "
            "data.pattern",
            field=key,
        )
    return dataset


def images_of(file: Any, path: Path) -> Any:
    """The dataset of images ``(T, H, W, 3)`` uint8."""
    dataset = _dataset(file, path, IMAGES)
    if dataset.dtype != np.uint8 or dataset.ndim != 4 or dataset.shape[3] != 3:
        raise DatasetError(
            f"{path}: {IMAGES} is {dataset.dtype} {dataset.shape}, expected uint8 (T, H, W, 3)",
            field=IMAGES,
        )
    return dataset


def instruction_of(file: Any, path: Path) -> str | None:
    """What the episode was told; None where the file does not say, or says nothing."""
    found = file.attrs.get(INSTRUCTION)
    if INSTRUCTION in file:
        found = _dataset(file, path, INSTRUCTION)[()]
    if isinstance(found, np.ndarray):
        found = found.reshape(-1)[0] if found.size else None
    if found is None:
        return None
    text = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
    return " ".join(text.split()) or None


def read(dataset: Any, path: Path, key: str, rows: slice) -> npt.NDArray[Any]:
    """Rows of a dataset; DatasetError naming the key where its bytes are damaged."""
    try:
        return np.asarray(dataset[rows])
    except HDF5_ERRORS as error:
        raise DatasetError(
            f"{path}: {key} cannot be read ({error}); the file is damaged: copy it again",
            field=key,
        ) from error


def _dataset(file: Any, path: Path, key: str) -> Any:
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        there = ", ".join(sorted(file.keys())) or "nothing"
        raise DatasetError(
            f"{path}: {key} is missing; the root of a mobile robot's episode holds {IMAGES} and "
            f"{ACTIONS}, this one holds {there}",
            field=key,
        )
    return found
