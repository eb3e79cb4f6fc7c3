"""``reflexarc checkpoint inspect``: what it prints, and what it says of a bad folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reflexarc.cli import checkpoint  # noqa: F401  registers its command on the group
from reflexarc.cli.groups import checkpoint_app
from reflexarc.contract.errors import CheckpointError
from reflexarc.policy.checkpoint import load_checkpoint

runner = CliRunner(env={"COLUMNS": "140"})


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.add_typer(checkpoint_app, name="checkpoint")
    return app


def test_the_tables_say_what_the_policy_expects_and_came_from(
    app: typer.Typer, saved: Path
) -> None:
    result = runner.invoke(app, ["checkpoint", "inspect", str(saved)])
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(saved)
    for text in (
        "rotate_180",
        "eef3+axisangle3+fingers2",
        "gripper: -1 opens, +1 closes",
        f"{sum(loaded.policy.component_parameters().values()):,}",
        "vision (frozen)",
        "model.safetensors",
        "of the tests",
        "tiny",
        loaded.fingerprint,
    ):
        assert text in result.output, text


def test_json_is_for_programs(app: typer.Typer, saved: Path) -> None:
    result = runner.invoke(app, ["checkpoint", "inspect", str(saved), "--json"])
    printed = json.loads(result.output)
    loaded = load_checkpoint(saved)
    assert printed["fingerprint"] == loaded.fingerprint
    assert printed["contract"] == loaded.policy.contract.model_dump(mode="json")
    assert printed["parameters"] == dict(loaded.policy.component_parameters())


def test_an_altered_checkpoint_is_named(app: typer.Typer, saved: Path) -> None:
    (saved / "norm_stats.json").write_text("{}")
    result = runner.invoke(app, ["checkpoint", "inspect", str(saved)])
    assert isinstance(result.exception, CheckpointError)
    assert "norm_stats.json was altered" in str(result.exception)
