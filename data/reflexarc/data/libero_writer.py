"""Write demonstrations in LIBERO's HDF5 layout, so that a kill at any moment costs one of them.

Every finished demonstration, and every failed attempt, is first a file of its own in
``<folder>/.parts/<task>/``; :meth:`TaskFileWriter.assemble` then joins them to
``<task>_demo.hdf5``. Each file is written under a temporary name and renamed, so that a final
name always means a whole file. Running the same collection again continues where it ended.

Differences from an official file: images only at ``obs/image_steps`` (every ``render_stride``-th
step), low-dimensional data at every step, and row ``t`` *precedes* action ``t``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from reflexarc.data.libero_layout import CAMERA_DATASETS, open_hdf5

FloatArray = npt.NDArray[np.float64]
ALIGNMENT = "before_action"
TAG = "reflexarc-v1"


@dataclass(frozen=True)
class Demonstration:
    """One successful episode of ``T`` steps with images at ``F`` of them.

    Row ``t`` is what was seen before action ``t``. Metres, radians, quaternions xyzw, float64:
    ``actions (T, 7)``, ``states (T, S)``, ``eef_positions (T, 3)``, ``eef_quaternions (T, 4)``,
    ``eef_axis_angles (T, 3)``, ``finger_positions (T, 2)``, ``joint_positions (T, 7)``,
    ``object_positions (T, O, 3)`` of ``object_names``. ``actions`` were executed, noise and all;
    ``expert_actions (T, 7)`` are their mean over the noise, given what was seen.
    ``image_steps (F,)`` int64; ``images``: camera name -> uint8 ``(F, H, W, 3)``, upside-down.
    ``object_poses``: object name -> position and quaternion before the first action.
    """

    attempt: int
    seed: int
    actions: FloatArray
    expert_actions: FloatArray
    states: FloatArray
    eef_positions: FloatArray
    eef_quaternions: FloatArray
    eef_axis_angles: FloatArray
    finger_positions: FloatArray
    joint_positions: FloatArray
    image_steps: npt.NDArray[np.int64]
    images: Mapping[str, npt.NDArray[np.uint8]]
    object_poses: Mapping[str, Mapping[str, list[float]]]
    object_positions: FloatArray
    object_names: tuple[str, ...]
    model_file: str


@dataclass(frozen=True)
class TaskHeader:
    """What holds for all demonstrations of a task; ``attributes`` are added to ``data``'s own."""

    instruction: str
    problem_name: str
    domain_name: str
    bddl_file_name: str
    bddl_file_content: str
    image_size: int
    render_stride: int
    action_noise: float
    seed: int

    def attributes(self) -> dict[str, Any]:
        """Attributes of the group ``data``: the official ones and ours."""
        environment = {
            "type": 1,
            "env_name": self.problem_name,
            "problem_name": self.problem_name,
            "bddl_file": self.bddl_file_name,
            "env_kwargs": {
                "robots": ["Panda"],
                "controller": "OSC_POSE",
                "control_freq": 20,
                "camera_names": ["agentview", "robot0_eye_in_hand"],
                "camera_heights": self.image_size,
                "camera_widths": self.image_size,
            },
        }
        problem = {
            "problem_name": self.problem_name,
            "domain_name": self.domain_name,
            "language_instruction": self.instruction,
        }
        return {
            "env_name": self.problem_name,
            "problem_info": json.dumps(problem),
            "macros_image_convention": "opengl",
            "bddl_file_name": self.bddl_file_name,
            "bddl_file_content": self.bddl_file_content,
            "env_args": json.dumps(environment),
            "tag": TAG,
            "alignment": ALIGNMENT,
            "render_stride": self.render_stride,
            "image_size": self.image_size,
            "action_noise": self.action_noise,
            "seed": self.seed,
            "reflexarc_version": version("reflexarc"),
        }


class TaskFileWriter:
    """The finished demonstrations of one task in ``folder``, by attempt number."""

    def __init__(self, folder: Path, task_name: str) -> None:
        self.path = folder / f"{task_name}_demo.hdf5"
        self.parts_folder = folder / ".parts" / task_name

    def attempts(self) -> dict[int, bool]:
        """Attempt number -> whether it gave a demonstration, for all attempts made so far."""
        made: dict[int, bool] = {}
        if self.path.is_file():
            with open_hdf5(self.path) as file:
                failed = json.loads(file["data"].attrs["failed_attempts"])
                made |= dict.fromkeys(failed, False)
                made |= dict.fromkeys(_demos_by_attempt(file), True)
        made |= {int(path.stem): False for path in self.parts_folder.glob("*.failed")}
        made |= {int(path.stem): True for path in self.parts_folder.glob("*.hdf5")}
        return dict(sorted(made.items()))

    def add(self, demonstration: Demonstration) -> None:
        """Keep a demonstration; safe from several processes, one attempt each."""
        path = self._part(demonstration.attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            _write_demonstration(file.create_group("demo"), demonstration)

    def add_failure(self, attempt: int, reason: str) -> None:
        """Remember that an attempt failed, so that a resumed collection does not repeat it."""
        path = self._part(attempt).with_suffix(".failed")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(reason)

    def assemble(self, header: TaskHeader) -> Path:
        """Join everything kept so far to the task's file, in the order of attempts.

        A kill before the rename leaves the parts, one after it leaves duplicates of what is
        already in the file; both are put right by the next call.
        """
        if self.path.is_file() and not self.parts_folder.is_dir():
            return self.path
        made = self.attempts()
        successes = [attempt for attempt, success in made.items() if success]
        with atomic_path(self.path) as temporary, h5py.File(temporary, "w") as target:
            data = target.create_group("data")
            data.attrs.update(header.attributes())
            data.attrs["total"] = self._copy(successes, data)
            data.attrs["num_demos"] = len(successes)
            data.attrs["failed_attempts"] = json.dumps([a for a in made if not made[a]])
        shutil.rmtree(self.parts_folder)
        with suppress(OSError):  # other tasks' parts may be there
            self.parts_folder.parent.rmdir()
        return self.path

    def _copy(self, attempts: list[int], data: Any) -> int:
        """Copy demonstrations into ``data`` as ``demo_0``...; the number of their samples."""
        total = 0
        with ExitStack() as stack:
            assembled: Mapping[int, Any] = {}
            if self.path.is_file():
                assembled = _demos_by_attempt(stack.enter_context(open_hdf5(self.path)))
            for index, attempt in enumerate(attempts):
                if attempt in assembled:
                    data.copy(assembled[attempt], data, name=f"demo_{index}")
                else:
                    with open_hdf5(self._part(attempt)) as part:
                        data.copy(part["demo"], data, name=f"demo_{index}")
                total += int(data[f"demo_{index}"].attrs["num_samples"])
        return total

    def _part(self, attempt: int) -> Path:
        return self.parts_folder / f"{attempt:06d}.hdf5"


def _demos_by_attempt(file: Any) -> dict[int, Any]:
    return {int(demo.attrs["attempt"]): demo for demo in file["data"].values()}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it, unless the block raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_demonstration(group: Any, demo: Demonstration) -> None:
    """LIBERO's datasets and attributes of one demonstration.

    Images are stored raw: lzf, a frame a chunk, makes them a third smaller and reading them six
    times slower (0.7 against 0.12 ms a frame of 256 px).
    """
    length = len(demo.actions)
    observations = group.create_group("obs")
    for camera, name in CAMERA_DATASETS.items():
        group[name] = demo.images[camera]
    observations["image_steps"] = demo.image_steps
    observations["gripper_states"] = demo.finger_positions
    observations["joint_states"] = demo.joint_positions
    observations["ee_states"] = np.concatenate([demo.eef_positions, demo.eef_axis_angles], axis=1)
    observations["ee_pos"] = demo.eef_positions
    observations["ee_ori"] = demo.eef_axis_angles
    group["actions"] = demo.actions
    group["expert_actions"] = demo.expert_actions
    group["object_positions"] = demo.object_positions
    group["states"] = demo.states
    group["robot_states"] = np.concatenate(
        [demo.finger_positions, demo.eef_positions, demo.eef_quaternions], axis=1
    )
    finished = np.zeros(length, dtype=np.uint8)
    finished[-1] = 1
    group["rewards"] = finished
    group["dones"] = finished
    group.attrs["num_samples"] = length
    group.attrs["init_state"] = demo.states[0]
    group.attrs["model_file"] = demo.model_file
    group.attrs["attempt"] = demo.attempt
    group.attrs["seed"] = demo.seed
    group.attrs["object_names"] = json.dumps(demo.object_names)
    group.attrs["object_poses"] = json.dumps(demo.object_poses)
