"""``reflexarc train --ablation``: one command, every arm, one store, one comparison; it resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reflexarc.cli.ablation_report import write_report
from reflexarc.cli.main import app
from reflexarc.contract.errors import ConfigError
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.eval.saved_run import RESULTS_FILE
from reflexarc.training.ablation import places, read_costs
from reflexarc.training.recipe_files import load_recipe, recipe_to_yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from results_folders import episode


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    write_generated(folder, GeneratedSettings(tasks=2, episodes=2, steps=8))
    return folder


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "debug_qwen_geometry", "--data", str(data), "--output", str(output),
        "--ablation", "geometry", "--device", "cpu", "--threads", "1",
        "--set", "training.steps=2", "--set", "training.log_every=1",
        "--set", "reporting.tensorboard=false", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_arms_share_a_store_and_are_compared(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "arms"
    for arms in ("none,pool", "none,pool,qformer"):  # the second goes on with the first's
        result = CliRunner().invoke(app, command(data, output, "--arms", arms))
        assert result.exit_code == 0, result.output
    stores = list((output / "feature_cache").glob("*/index.json"))
    assert len(stores) == 1
    values = json.loads((output / "ablation.json").read_text())
    assert [arm["arm"] for arm in values["arms"]] == ["none", "pool", "qformer"]
    by_arm = {arm["arm"]: arm for arm in values["arms"]}
    assert "compressor" not in by_arm["none"]["parameters"]
    sizes = [by_arm[arm]["parameters"]["compressor"] for arm in ("pool", "qformer")]
    assert sizes[0] < sizes[1]
    assert all(arm["samples_per_second"] > 0 and arm["memory"][1] > 0 for arm in values["arms"])
    assert "not a ranking" in values["note"]
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    groups = {
        load_recipe(str(output / arm / "recipe.yaml")).reporting.group for arm in by_arm
    }  # fmt: skip
    assert groups == {"debug_qwen_geometry_geometry"}
    assert "found" in (output / "pool.log").read_text()


@pytest.mark.slow
def test_an_arm_ends_with_its_command_and_keeps_what_it_has(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "arms"
    arguments = command(data, output, "--arms", "none", "--set", "training.steps=100000")
    run = [sys.executable, "-c", "from reflexarc.cli.main import main; main()", *arguments]
    with subprocess.Popen(run, start_new_session=True) as process:
        metrics = output / "none" / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 20)
        process.kill()
    wait_for(lambda: "Stopped by SIGTERM; `last` is saved" in (output / "none.log").read_text())
    assert (output / "none" / "last").exists()
    time.sleep(1)
    lines = metrics.read_text().count("\n")
    time.sleep(2)
    assert metrics.read_text().count("\n") == lines


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--arms", "none,depth"], "choose each at most once among"),
        (["--arms", "none,none"], "choose each at most once among"),
        (["--fresh"], "takes no --fresh"),
    ],
)
def test_what_it_cannot_do_is_named(data: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(app, command(data, tmp_path, *more), catch_exceptions=False)


def test_a_recipe_of_another_family_is_refused(tmp_path: Path) -> None:
    arguments = ["train", "statevla_tiny", "--ablation", "geometry", "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="the family statevla has not"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(ConfigError, match="'depth' is unknown; known: geometry"):
        CliRunner().invoke(app, [*arguments[:3], "depth"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="belong to --ablation"):
        CliRunner().invoke(app, ["train", "statevla_tiny", "--arms", "x"], catch_exceptions=False)


def test_every_arm_has_a_gpu_and_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    found = places(("a", "b", "c", "d"), 3, "auto")
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in found] == ["4", "5", "7", "4"]
    assert len({p.environment["MASTER_PORT"] for p in found}) == 4
    alone = places(("a", "b"), 1, "auto")
    assert all("CUDA_VISIBLE_DEVICES" not in p.environment for p in alone)


def run_folder(folder: Path, mae: float) -> None:
    """What a run leaves behind, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    lines = [
        {"kind": "train", "step": step, "total": 1 / step, "samples_per_second": 10.0 * step,
         "memory/rss_mb": 100.0 + step} for step in (1, 2, 3)
    ]  # fmt: skip
    lines.append({"kind": "validation", "step": 3, "total": 0.5, "action_mae": mae})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("debug_qwen_geometry")))


def evaluated(folder: Path, solved: set[int]) -> None:
    """Ten episodes of the policy, as an evaluation writes them."""
    folder.mkdir(parents=True)
    results = [episode(0, state, state in solved) for state in range(10)]
    lines = "".join(result.model_dump_json() + "\n" for result in results)
    (folder / RESULTS_FILE).write_text(lines)


def test_success_is_paired_and_a_weak_reference_called_empty(tmp_path: Path) -> None:
    solved = {"none": {0, 1}, "pool": {0, 1, 2, 3, 4, 5, 6}}
    for arm, states in solved.items():
        run_folder(tmp_path / arm, 0.1)
        evaluated(tmp_path / "eval" / "libero_goal" / arm, states)
    (path, markdown, _) = write_report(
        tmp_path, list(solved), reference="none", suites=["libero_goal"], compact=True
    )
    values = json.loads(path.read_text())["success"]["libero_goal"]
    assert values["empty"] and values["rates"]["pool"]["successes"] == 7
    (pair,) = values["pairs"]
    assert (pair["first"], pair["second"], pair["pairs"]) == ("pool", "none", 10)
    assert pair["difference"] == pytest.approx(0.5)
    assert pair["low"] < 0.5 < pair["high"] and pair["mcnemar_p"] == pytest.approx(0.0625)
    said = markdown.read_text()
    assert "Empty: none succeeds in fewer than 30%" in said and "2/10 [" in said


def test_costs_are_read_from_the_run(tmp_path: Path) -> None:
    run_folder(tmp_path / "none", 0.25)
    costs, curves = read_costs("none", tmp_path / "none")
    assert costs.samples_per_second == 20.0 and costs.memory == ("memory/rss_mb", 103.0)
    assert costs.best == ("action_mae", 0.25) and len(curves.train["total"]) == 3
