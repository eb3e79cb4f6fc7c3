"""LIBERO's five suites: their tasks, scene descriptions and initial states."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.init_states import read_init_states
from reflexarc.eval.libero.package import libero_path

# Steps that the field allows an episode of each suite, after the ten wait steps.
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = tuple(MAX_STEPS)


@dataclass(frozen=True)
class LiberoTask:
    """One task: ``index`` in its suite's order, and the instruction given to the policy."""

    suite: str
    index: int
    name: str
    instruction: str
    bddl_path: Path
    init_states_path: Path


def load_tasks(suite: str) -> list[LiberoTask]:
    """The suite's tasks in LIBERO's order. SimulatorError for an unknown suite."""
    if suite not in SUITES:
        raise SimulatorError(f"unknown suite {suite!r}; choose one of {', '.join(SUITES)}")
    bddl_folder = libero_path("bddl_files") / suite
    states_folder = libero_path("init_states") / suite
    return [
        LiberoTask(
            suite=suite,
            index=index,
            name=name,
            instruction=instruction_of(name),
            bddl_path=bddl_folder / f"{name}.bddl",
            init_states_path=_init_states_path(states_folder, name),
        )
        for index, name in enumerate(_task_names()[suite])
    ]


def select_tasks(suite: str, indices: Sequence[int] | None) -> list[LiberoTask]:
    """The tasks with these indices, or all of them. SimulatorError for an index out of range."""
    tasks = load_tasks(suite)
    if indices is None:
        return tasks
    for index in indices:
        if not 0 <= index < len(tasks):
            raise SimulatorError(f"{suite} has tasks 0 to {len(tasks) - 1}, not {index}")
    return [tasks[index] for index in dict.fromkeys(indices)]


def load_init_states(task: LiberoTask) -> npt.NDArray[np.float64]:
    """The task's benchmark states ``(50, S)``: time, positions, velocities."""
    return read_init_states(task.init_states_path)


def instruction_of(task_name: str) -> str:
    """The instruction that LIBERO derives from a task's name.

    ``KITCHEN_SCENE3_turn_on_the_stove`` says ``turn on the stove``. The text inside the scene
    description differs for some tasks; the field trains and evaluates with this one.
    """
    words = task_name.split("_")
    if task_name[:1].isupper():
        scene = next(i for i, word in enumerate(words) if word.startswith("SCENE"))
        words = words[scene + 1 :]
    return " ".join(words)


def _init_states_path(folder: Path, name: str) -> Path:
    archive = folder / f"{name}.pruned_init.npz"
    return archive if archive.is_file() else folder / f"{name}.pruned_init"


@functools.cache
def _task_names() -> Mapping[str, Sequence[str]]:
    """Suite -> task names, from a file of LIBERO that holds nothing but this table.

    Its package ``libero.libero.benchmark`` imports torch in an official clone, hence by path.
    """
    path = libero_path("benchmark_root") / "benchmark" / "libero_suite_task_map.py"
    spec = spec_from_file_location("_libero_suite_task_map", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SimulatorError(f"{path}: LIBERO's table of tasks is missing; reinstall LIBERO")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    names: Mapping[str, Sequence[str]] = module.libero_task_map
    return names
