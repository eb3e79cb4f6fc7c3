"""Small demonstration files in Reflexarc's own format, with random images."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

TASKS = ("pick_up_the_red_block", "pick_up_the_blue_block")


def write_task_file(
    path: Path,
    *,
    demos: int = 4,
    steps: int = 21,
    stride: int = 4,
    image_size: int = 32,
    seed: int = 0,
    actions: np.ndarray | None = None,
) -> Path:
    """One ``<task>_demo.hdf5``: images at every ``stride``-th step, the rest at every step."""
    random = np.random.default_rng(seed)
    instruction = path.stem.removesuffix("_demo").replace("_", " ")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(
            {
                "tag": "reflexarc-v1",
                "alignment": "before_action",
                "render_stride": stride,
                "image_size": image_size,
                "action_noise": 0.0,
                "reflexarc_version": "0.1.0",
                "env_name": "Libero_Tabletop_Manipulation",
                "env_args": json.dumps({}),
                "bddl_file_name": f"{path.stem.removesuffix('_demo')}.bddl",
                "bddl_file_content": "",
                "macros_image_convention": "opengl",
                "problem_info": json.dumps({"language_instruction": instruction}),
                "num_demos": demos,
                "total": demos * steps,
            }
        )
        for index in range(demos):
            _write_demo(data, index, random, steps, stride, image_size, actions)
    return path


def _write_demo(
    data: h5py.Group,
    index: int,
    random: np.random.Generator,
    steps: int,
    stride: int,
    image_size: int,
    actions: np.ndarray | None,
) -> None:
    demo = data.create_group(f"demo_{index}")
    demo.attrs.update(
        {
            "num_samples": steps,
            "init_state": np.zeros(10),
            "model_file": "<mujoco/>",
            "seed": index,
            "object_poses": json.dumps({}),
        }
    )
    if actions is None:
        actions = random.uniform(-1, 1, (steps, 7))
        actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
    demo["actions"] = actions
    demo["states"] = random.normal(size=(steps, 10))
    demo["robot_states"] = random.normal(size=(steps, 9))
    demo["rewards"] = np.zeros(steps, np.uint8)
    demo["dones"] = np.zeros(steps, np.uint8)
    demo["dones"][-1] = 1
    position, orientation = random.normal(size=(2, steps, 3))
    obs = demo.create_group("obs")
    obs["ee_pos"], obs["ee_ori"] = position, orientation
    obs["ee_states"] = np.concatenate([position, orientation], axis=1)
    obs["gripper_states"] = random.normal(size=(steps, 2))
    obs["joint_states"] = random.normal(size=(steps, 7))
    rendered = np.arange(0, steps, stride, dtype=np.int64)
    obs["image_steps"] = rendered
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        shape = (len(rendered), image_size, image_size, 3)
        obs[camera] = random.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="session")
def task_file() -> Callable[..., Path]:
    """:func:`write_task_file`, for tests that need a file of their own."""
    return write_task_file


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks of four short demonstrations."""
    folder = tmp_path_factory.mktemp("demonstrations")
    for seed, task in enumerate(TASKS):
        write_task_file(folder / f"{task}_demo.hdf5", seed=seed)
    return folder


@pytest.fixture(scope="session")
def recipe_in_two_stages(tmp_path_factory: pytest.TempPathFactory, demonstrations: Path) -> Path:
    """The tiny recipe in two stages of 6 steps."""
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    for key in ("objective", "optimizer", "schedule", "training"):
        values.pop(key, None)
    loop = {"batch_size": 8, "steps": 6, "validate_every": 3, "checkpoint_every": 4, "log_every": 2}
    values["name"] = "tiny_temporal"
    values["data"]["paths"] = [str(demonstrations)]
    values["stages"] = [
        {
            "name": "representation",
            "objective": {"name": "temporal_jepa", "horizon": 4, "predictor_hidden": 16},
            "freeze": ["flow", "gripper"],
            "training": {**loop, "ema_decay": 0.9},
        },
        {"name": "policy", "freeze": ["representation"], "training": {**loop, "ema_decay": 0.9}},
    ]
    path = tmp_path_factory.mktemp("recipe") / "tiny_temporal.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
