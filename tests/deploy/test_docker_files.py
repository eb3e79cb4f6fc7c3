"""docker/: the compose file against its specification, images' rules, the dashboard's metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.contract import ActionChunk
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import ServerMetrics

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = (DOCKER / "server.Dockerfile", DOCKER / "sim.Dockerfile")
# github.com/compose-spec/compose-spec, schema/compose-spec.json; its licence stands beside it.
SCHEMA = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
OURS = ("server", "server-cpu", "eval")


def example() -> dict[str, str]:
    lines = (DOCKER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables() -> set[str]:
    return set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))


def compose() -> dict[str, Any]:
    """As docker compose reads it with .env.example."""
    text = (DOCKER / "compose.yaml").read_text()
    values = example()

    def value(found: re.Match[str]) -> str:
        return values.get(found[1]) or (found[3] or "" if found[2] == ":-" else "")

    text = re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_compose_file_is_one_by_the_compose_specification() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(compose())
    wrong = compose()
    wrong["services"]["server"]["reserve"] = {"gpu": 1}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(wrong)


def test_what_the_compose_file_asks_for_is_in_the_example_and_nothing_else() -> None:
    optional = {"REFLEXARC_VERSION", "REFLEXARC_SERVER_EXTRAS"}  # with defaults that few change
    assert variables() - optional == set(example())


def test_profiles_are_those_that_the_documentation_names() -> None:
    profiles = {name: service["profiles"] for name, service in compose()["services"].items()}
    assert profiles == {
        "server": ["server"],
        "server-cpu": ["server-cpu"],
        "eval": ["eval"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    (device,) = compose()["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    waits = compose()["services"]["eval"]["depends_on"]
    assert {name: wait["condition"] for name, wait in waits.items()} == {
        "server": "service_healthy",
        "server-cpu": "service_healthy",
    }


@pytest.mark.parametrize("name", sorted(compose()["services"]))
def test_every_service_is_hardened_and_keeps_secrets_in_files(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["secrets"]
    for key, value in service.get("environment", {}).items():
        if "KEY" in key or "PASSWORD" in key:
            assert str(value).startswith("/run/secrets/"), key
    assert not re.search(r":latest|[^:]\s*$", service["image"].rsplit("/", 1)[-1] + ":")


@pytest.mark.parametrize(("name", "command"), [("server", "serve"), ("server-cpu", "serve")])
def test_servers_are_started_with_options_that_exist(name: str, command: str) -> None:
    assert_options_exist(compose()["services"][name]["command"], command)


def test_the_evaluation_is_started_with_options_that_exist() -> None:
    words = compose()["services"]["eval"]["command"]
    assert words[:2] == ["eval", "libero"]
    assert_options_exist(words[2:], "eval", "libero")


def assert_options_exist(words: list[str], *command: str) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    known = set(re.findall(r"--[a-z][a-z-]*", result.output))
    assert result.exit_code == 0
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_and_run_as_nobody(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert re.search(r"^ARG BASE_IMAGE=\S+:\d[\w.-]+$", text, re.M)
    assert "latest" not in text
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    assert len(stages) == 2
    assert all(stage.startswith("${BASE_IMAGE}") for stage in stages)
    assert re.search(r"^USER 10001:10001$", stages[1], re.M)
    assert "HEALTHCHECK" in stages[1]
    assert "pip install" not in stages[1]
    side = dockerfile.stem
    pinned = (DOCKER / f"constraints-{side}.txt").read_text().splitlines()
    versions = [line for line in pinned if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in versions)
    names = {line.partition("==")[0].lower() for line in versions}
    assert ("torch" in names) == (side == "server")
    assert ("mujoco" in names) == (side == "sim")


@pytest.mark.parametrize("path", [*DOCKERFILES, DOCKER / "compose.yaml"], ids=lambda p: p.name)
def test_documentation_says_of_every_line_whether_it_was_run(path: Path) -> None:
    table = (ROOT / "docs/deploy.md").read_text()
    if path.suffix == ".yaml":
        wanted = [f"`{name}`" for name in compose()["services"]]
    else:
        sys.path.insert(0, str(ROOT / "scripts"))
        from check_images import parse

        wanted = [f"`{path.stem}:{line.number}`" for line in parse(path)]
    assert [row for row in wanted if f"| {row} |" not in table] == []


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/reflexarc.json").read_text())
    return loaded


def test_the_dashboard_asks_only_for_metrics_that_a_server_has() -> None:
    metrics = ServerMetrics(phase=lambda: "ready", waiting=lambda: 0, sessions=lambda: 0)
    chunk = ActionChunk([[0.0]], seed=0, timing={"queue_ms": 1.0, "batch_size": 1.0})  # type: ignore[arg-type]
    metrics(Exchange("native", 0.0, chunk=chunk, timing=chunk.timing))
    scraped = metrics.exposition().decode()
    names = set(re.findall(r"^(\w+)[{ ]", scraped, re.M)) | {"up"}
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    asked = {
        name for text in expressions for name in re.findall(r"(?:reflexarc|process)_\w+", text)
    }
    assert len(expressions) > 12
    assert asked <= names, asked - names
    labels = set(re.findall(r"by \(([^)]*)\)", " ".join(expressions)))
    known = set(re.findall(r"(\w+)=\"", scraped))
    assert {label.strip() for group in labels for label in group.split(",")} <= known


def test_the_dashboard_is_provisioned_with_its_source() -> None:
    provisioning = DOCKER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    panels = dashboard()["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    (provider,) = yaml.safe_load((provisioning / "dashboards/reflexarc.yaml").read_text())[
        "providers"
    ]
    mounts = compose()["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    scrape = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/api_key"
    (names,) = scrape["dns_sd_configs"]
    assert names["names"] == compose()["services"]["server"]["networks"]["default"]["aliases"]


def test_the_health_check_tells_a_server_that_is_ready_from_none() -> None:
    def check(url: str) -> int:
        command = [sys.executable, "-I", DOCKER / "healthcheck.py"]
        environment = {"REFLEXARC_HEALTH_URL": f"{url}/readyz"}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    with BackgroundServer(NullPolicy) as server:
        assert check(server.http_url) == 0
        url = server.http_url
    assert check(url) == 1
