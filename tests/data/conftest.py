"""Small files of the three kinds, with values that say which row they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

TASK = "pick_up_the_milk_and_place_it_in_the_basket"
INSTRUCTION = "pick up the milk and place it in the basket"
WriteFile = Callable[..., Path]


def _write_demo(
    group: h5py.Group, samples: int, size: int, stride: int | None, offset: float
) -> None:
    """Row t of every dataset starts with ``offset + t / 1000``; images hold t."""
    steps = np.arange(0, samples, stride or 1)
    observations = group.create_group("obs")
    row = offset + np.arange(samples)[:, None] / 1000
    for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
        observations[name] = row + np.arange(width) * 10
    for name in ("agentview_rgb", "eye_in_hand_rgb"):
        pixels = np.broadcast_to(steps[:, None, None, None], (len(steps), size, size, 3))
        observations[name] = (pixels + (100 if name.startswith("eye") else 0)).astype(np.uint8)
    if stride is not None:
        observations["image_steps"] = steps.astype(np.int64)
    actions = np.tile(row, (1, 7)) + np.arange(7) / 100
    actions[:, 6] = np.where(np.arange(samples) < samples // 2, -1.0, 1.0)
    group["actions"] = actions


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    def write(
        kind: str = "own", *, name: str = TASK, demos: int = 3, samples: int = 9, size: int = 8
    ) -> Path:
        path = tmp_path / f"{name}_demo.hdf5"
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            if kind != "regenerated":
                problem = {"problem_name": "p", "language_instruction": INSTRUCTION}
                data.attrs["problem_info"] = json.dumps(problem)
                data.attrs["env_args"] = "{}"
                data.attrs["tag"] = "libero-v1" if kind == "official" else "reflexarc-v1"
                data.attrs["num_demos"] = demos
            if kind == "own":
                data.attrs["alignment"] = "before_action"
                data.attrs["render_stride"] = 4
            for index in range(demos):
                group = data.create_group(f"demo_{index}")
                stride = 4 if kind == "own" else None
                _write_demo(group, samples, size, stride, offset=index / 10)
                if kind != "regenerated":
                    group.attrs["num_samples"] = samples
                if kind == "own":
                    group.attrs["seed"] = 1000 + index
        return path

    return write


@pytest.fixture
def edit_file() -> Callable[..., None]:
    """Overwrite (or, without a value, delete) one key of a file."""

    def edit(path: Path, key: str, value: object = None) -> None:
        with h5py.File(path, "r+") as file:
            del file[key]
            if value is not None:
                file[key] = value

    return edit
