"""``reflexarc doctor``: what it finds, what stops it, and that the base install can run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from reflexarc.cli.diagnosis import machine
from reflexarc.cli.diagnosis.accelerator import judge_torch
from reflexarc.cli.diagnosis.artefacts import check_checkpoint, check_recipe
from reflexarc.cli.diagnosis.finding import Finding, ask_python
from reflexarc.cli.diagnosis.packages import check_extras, requirements
from reflexarc.cli.doctor import doctor
from reflexarc.contract.errors import ConfigError

CUDA: dict[str, Any] = {
    "version": "2.9.0+cu128", "built_for": "12.8", "hip": None, "mps": False, "available": True,
    "count": 1, "warning": "", "mamba_absent": "No module named 'mamba_ssm'",
    "devices": [{"name": "A GPU", "capability": "9.0", "computes": True,
                 "free": 100 * 2**30, "total": 140 * 2**30}],
}  # fmt: skip
CPU: dict[str, Any] = {**CUDA, "version": "2.9.0+cpu", "built_for": None, "available": False,
                       "count": 0, "devices": []}  # fmt: skip


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_runs_without_importing_more_than_the_base_install_has(tmp_path: Path) -> None:
    program = (
        "import sys, json\n"
        "from typer.testing import CliRunner\n"
        "from reflexarc.cli.main import app\n"
        f"result = CliRunner().invoke(app, ['doctor', '--json', '--port', '{free_port()}'])\n"
        "print(json.dumps({'code': result.exit_code, 'out': json.loads(result.stdout),\n"
        "  'heavy': sorted({'torch', 'yaml', 'h5py', 'safetensors', 'mujoco', 'psutil',\n"
        "  'filelock', 'matplotlib', 'scipy', 'fastapi', 'transformers'} & set(sys.modules))}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["heavy"] == []
    report = values["out"]
    stopping = [f for f in report["findings"] if f["status"] == "broken" and (
        not f["needed_for"] or set(f["needed_for"]) & set(report["purposes"]))]  # fmt: skip
    assert report["healthy"] == (not stopping) and values["code"] == (1 if stopping else 0)
    names = [finding["name"] for finding in report["findings"]]
    assert {"python", "packages: base", "torch", "rendering", "memory", "disk", "port"} <= set(
        names
    )
    assert all(finding["mend"] for finding in report["findings"] if finding["status"] == "broken")


def test_what_is_broken_stops_only_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in ("check_accelerator", "check_rendering"):
        fine: Any = (
            [Finding(slow, "ok", "")] if slow == "check_accelerator" else Finding("x", "ok", "")
        )
        monkeypatch.setattr(f"reflexarc.cli.doctor.{slow}", lambda found=fine: found)
    monkeypatch.setattr("reflexarc.cli.doctor.check_extras", lambda purposes: [])
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        serving = call("--for", "serve", "--port", port)
        assert serving.exit_code == 1
        assert "--port 0" in serving.output and "Broken for serve: port" in serving.output
        training = call("--for", "train", "--port", port)
        assert training.exit_code == 0 and "broken" in training.output
    assert call("--for", "serve", "--port", free_port()).exit_code == 0
    assert isinstance(call("--for", "everything").exception, ConfigError)
    absent = call("--for", "train", "--port", free_port(), "--ckpt", "/absent/checkpoint")
    assert absent.exit_code == 1 and "no checkpoint folder" in absent.output


@pytest.mark.parametrize(
    ("found", "driver", "name", "status", "says"),
    [
        (CUDA, "575.1, A GPU", "torch", "ok", "built for CUDA 12.8; driver 575.1"),
        (CUDA, "575.1, A GPU", "device cuda:0", "ok", "100.0 of 140.0 GiB free"),
        (CUDA, "575.1, A GPU", "mamba-ssm", "note", "pip install --no-build-isolation mamba-ssm"),
        (CPU, None, "torch", "ok", "built for the CPU alone"),
        (CPU, None, "mamba-ssm", "ok", "without CUDA not used"),
        (CPU, "575.1, A GPU", "torch", "note", "but there is 575.1, A GPU"),
        ({**CUDA, "available": False, "devices": [], "warning": "driver too old (version 11040)"},
         "470.1, A GPU", "torch", "broken", "too old (version 11040)"),
        ({**CUDA, "available": False, "devices": []}, None, "torch", "ok", "CUDA 12.8"),
        ({**CUDA, "devices": [{**CUDA["devices"][0], "error": "no kernel image is available"}]},
         "575.1, A GPU", "device cuda:0", "broken", "no kernel image is available"),
        ({**CUDA, "devices": [{**CUDA["devices"][0], "free": 2**20}]},
         "575.1, A GPU", "device cuda:0", "note", "nvidia-smi"),
        ({**CUDA, "mamba": "2.2.4", "mamba_error": "ImportError: undefined symbol: _ZN3c10"},
         "575.1, A GPU", "mamba-ssm", "note", "undefined symbol"),
        ({**CUDA, "mamba": "2.2.4"}, "575.1, A GPU", "mamba-ssm", "ok", "kernels import"),
        ({**CPU, "scans": {"cpu": {"name": "native", "why_not": {}}}}, None,
         "scan on cpu", "ok", "native"),
        ({**CPU, "scans": {"cpu": {"name": "blocked", "why_not": {"native": "no C++ compiler"}}}},
         None, "scan on cpu", "note", "no C++ compiler"),
        ({**CUDA, "scans": {"cuda": {"name": "triton", "why_not": {"mamba_ssm": "absent"}}}},
         None, "scan on cuda", "ok", "triton"),
        ({**CPU, "scans": {"cpu": {"error": "REFLEXARC_SCAN is 'triton', but", "why_not": {}}}},
         None, "scan on cpu", "broken", "unset REFLEXARC_SCAN"),
        ({"error": "OSError: libcudnn.so.9"}, None, "torch", "broken", "libcudnn.so.9"),
    ],
)  # fmt: skip
def test_torch_and_driver_are_judged_together(
    found: dict[str, Any], driver: str | None, name: str, status: str, says: str
) -> None:
    findings = {finding.name: finding for finding in judge_torch(found, driver)}
    one = findings[name]
    assert one.status == status and says in f"{one.said} {one.mend}"
    assert one.status == "ok" or one.mend


def test_a_process_that_crashes_hangs_or_babbles_is_an_answer() -> None:
    assert ask_python("print('{\"a\": 1}')", 60) == {"a": 1}
    assert "no answer within 0.5 s" in ask_python("while True: pass", 0.5)["error"]
    crashed = ask_python("import os; os.abort()", 60)["error"]
    assert "signal 6" in crashed
    assert "ZeroDivisionError" in ask_python("1 / 0", 60)["error"]
    assert "printed nothing" in ask_python("pass", 60)["error"]


def test_an_extra_that_lacks_a_package_is_named_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = requirements()
    assert "numpy" in dict(listed[""]) and "torch" in dict(listed["train"])
    listed["sim"] = [("mujoco", ">=3"), ("no-such-package-anywhere", "")]
    listed["demo"] = [("numpy", "<0.1")]
    monkeypatch.setattr("reflexarc.cli.diagnosis.packages.requirements", lambda: listed)
    found = {finding.name: finding for finding in check_extras(("sim",))}
    sim, demo = found["packages: sim"], found["packages: demo"]
    assert sim.stops(("sim",)) and "no-such-package-anywhere missing" in sim.said
    assert "pip install 'reflexarc[sim]'" in sim.mend
    assert not sim.stops(("serve",))
    assert demo.status == "note" and ("needed <0.1" in demo.said) == bool(find_spec("packaging"))
    assert {f.name: f.status for f in check_extras(())}["packages: sim"] == "note"


@pytest.mark.simulator
@pytest.mark.parametrize("renderer", ["osmesa", "nonsense"])
def test_rendering_is_tried(monkeypatch: pytest.MonkeyPatch, renderer: str) -> None:
    monkeypatch.setenv("MUJOCO_GL", renderer)
    # MuJoCo sets it for the renderer that a test before this one may have used.
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    found = machine.check_rendering()
    if renderer == "nonsense":
        assert found.stops(("sim",)) and "MUJOCO_GL=nonsense was set by you" in found.mend
    else:
        assert found.status == "ok" and "osmesa" in found.said


def test_memory_and_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine.available_memory()
    assert memory is None or memory > 2**20
    monkeypatch.setattr(machine, "available_memory", lambda: 2**28)
    assert machine.check_memory().stops(())
    usage = os.statvfs(tmp_path)
    said = machine.check_disk(tmp_path).said
    assert abs(float(said.split()[0]) - usage.f_bavail * usage.f_frsize / 2**30) < 1


def test_a_recipe_and_what_it_names(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: mine\nfamily: statevla\nlanguage: {encoder: hashed}\n"
        "policy: {vision: {name: siglip, path: /absent/siglip}}\n"
        "data: {paths: [/absent/demonstrations]}\ntraining: {steps: 1}\n"
    )
    found = {finding.name: finding for finding in check_recipe(str(recipe))}
    assert found["recipe"].status == found["language encoder"].status == "ok"
    assert "/absent/siglip" in found["vision encoder"].said and found["vision encoder"].stops(())
    assert "/absent/demonstrations" in found["recipe's data"].said
    recipe.write_text(recipe.read_text().replace("encoder: hashed", "table: /absent/table"))
    found = {finding.name: finding for finding in check_recipe(str(recipe))}
    assert "reflexarc data embed-language --data /absent/demo" in found["language encoder"].said
    assert found["language encoder"].stops(())
    (wrong,) = check_recipe("statevla_tyny")
    assert wrong.status == "broken" and "statevla_tiny" in wrong.said
    staged = check_recipe("statevla_temporal_libero_object_small")
    assert "2 stages" in staged[0].said
    assert check_checkpoint(tmp_path).stops(())
