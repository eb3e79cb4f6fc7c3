"""A smoke run: V-JEPA 2 of random weights from a folder, through to LIBERO.

It shows that precompute, training, serving and evaluation fit together with 16-frame histories and
goals. Weights are random and training is four steps: what it does in the scene means nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.eval.libero.collect import CollectionSettings, collect
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.recipe_files import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from vjepa2_samples import SIZE, save_tiny_vjepa2, tiny_head_config

pytestmark = [pytest.mark.simulator, pytest.mark.slow]

TASKS, STATE, STEPS = (0, 1), 40, 24


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_from_a_folder_of_weights_to_an_episode(tmp_path: Path) -> None:
    data, cache, run, output = (tmp_path / name for name in ("data", "cache", "run", "results"))
    settings = CollectionSettings(suite="libero_object", image_size=SIZE, render_every=4)
    collect(settings, data, demos=2, tasks=list(TASKS), progress=False)

    values = load_recipe("debug_vjepa2_head").model_dump(mode="json")
    values["policy"] = tiny_head_config(save_tiny_vjepa2(tmp_path / "vjepa2"))
    values["objective"]["static_aug"] = 0.0
    values["contract"] |= {"history": {"frames": 16, "states": 5, "stride": 4}, "horizon": 8,
                           "cameras": ["agentview"]}  # fmt: skip
    values["data"] |= {"suite": "libero_object", "paths": [str(data)], "feature_dtype": "bf16"}
    values["training"] |= {"steps": 4, "validate_every": 4, "checkpoint_every": 4, "batch_size": 8}
    values["reporting"] = {"tensorboard": False}
    recipe = tmp_path / "smoke.yaml"
    recipe.write_text(json.dumps(values))
    shared = ["--feature-cache", str(cache), "--device", "cpu", "--threads", "1"]
    said = json.loads(command("data", "precompute", str(recipe), *shared).splitlines()[-1])
    assert said["rows_computed"] == said["rows"] > 40
    assert "(" in said["arrays"]["clip"]
    command("train", str(recipe), *shared, "--output", str(run))

    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu")) as server:
        command(
            "eval", "libero", "--server", server.url, "--suite", "libero_object", "--tasks", "0,1",
            "--states", str(STATE), "--max-steps", str(STEPS), "--replan-steps", "8",
            "--baselines", "other_goal", "--goals", str(data), "--videos", "none",
            "--output", str(output),
        )  # fmt: skip
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {(line["task"], line["arm"]) for line in lines} == {
        (task, arm) for task in TASKS for arm in ("policy", "other_goal")
    }
    # Every decision was answered, and each arm was shown the goal that it names.
    assert all(line["chunks"] == STEPS // 8 and line["reason"] == "timeout" for line in lines)
    goals = {(line["task"], line["arm"]): line["goal_sha256"] for line in lines}
    assert goals[0, "policy"] == goals[1, "other_goal"] != goals[1, "policy"]
