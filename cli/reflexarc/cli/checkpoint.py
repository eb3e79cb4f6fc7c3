"""``reflexarc checkpoint inspect DIR``: what a checkpoint expects, returns, and came from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import checkpoint_app

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.contract import PolicyContract
    from reflexarc.policy.checkpoint import LoadedPolicy


@checkpoint_app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint's folder, or a run's with its best or last.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the contract and provenance as JSON.")
    ] = False,
) -> None:
    """Verify every file of a checkpoint and print its contract, provenance and sizes."""
    require("reflexarc checkpoint inspect", "server", "torch", "safetensors")
    from reflexarc.policy.checkpoint import load_checkpoint

    loaded = load_checkpoint(directory)
    if as_json:
        typer.echo(json.dumps(_as_json(loaded), indent=2))
        return
    from rich.console import Console

    console = Console()
    for table in (
        _contract_table(loaded.policy.contract),
        _parameter_table(loaded),
        _file_table(loaded.directory),
        _provenance_table(loaded),
        _metrics_table(loaded),
    ):
        if table is not None:
            console.print(table)


def _as_json(loaded: LoadedPolicy) -> dict[str, Any]:
    backbones = loaded.policy.frozen_backbones().items()
    return {
        "directory": str(loaded.directory),
        "fingerprint": loaded.fingerprint,
        "contract": loaded.policy.contract.model_dump(mode="json"),
        "config": loaded.policy.config.model_dump(mode="json"),
        "parameters": dict(loaded.policy.component_parameters()),
        "frozen_backbones": {path: asdict(backbone) for path, backbone in backbones},
        "frozen_modules": list(_recipe(loaded).get("freeze") or ()),
        "provenance": dict(loaded.provenance),
    }


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    return table


def _contract_table(contract: PolicyContract) -> Table:
    action, history = contract.action, contract.history
    table = _table("Contract")
    table.add_row("family", contract.family)
    for camera in contract.cameras:
        steps = ", ".join(camera.steps) or "none"
        table.add_row(
            f"camera {camera.name}",
            f"uint8 {camera.height}x{camera.width}x3, {camera.orientation}; "
            f"steps from a {camera.source_height}x{camera.source_width} render: {steps}",
        )
    table.add_row("state", f"{contract.state.dimension}: {contract.state.layout}")
    table.add_row(
        "history",
        f"{history.frames} frame(s), {history.states} state(s), stride {history.stride}",
    )
    table.add_row(
        "action chunk",
        f"{action.horizon} x {action.dimension} at {action.control_hz:g} Hz, {action.kind}: "
        f"{', '.join(action.names)}",
    )
    if action.gripper is not None:
        gripper = action.gripper
        table.add_row(
            "gripper",
            f"{action.names[gripper.index]}: {gripper.open:+g} opens, {gripper.closed:+g} closes",
        )
    table.add_row("instruction", "needed" if contract.needs_language else "not used")
    table.add_row(
        "normalisation",
        f"state {contract.state_normalization}, action {contract.action_normalization}",
    )
    table.add_row("statistics sha256", contract.statistics_sha256)
    table.add_row("fingerprint", contract.checkpoint_fingerprint)
    return table


def _parameter_table(loaded: LoadedPolicy) -> Table:
    policy = loaded.policy
    size = next((p.element_size() for p in policy.parameters()), 4)
    table = _table("Modules", "module", "parameters", "MiB", "")
    counts = policy.component_parameters()
    kept = tuple(_recipe(loaded).get("freeze") or ())
    for name, count in counts.items():
        said = "kept as it began (freeze)" if name in kept else "trained"
        table.add_row(name, f"{count:,}", f"{count * size / 2**20:,.2f}", said)
    total = sum(counts.values())
    table.add_row("total", f"{total:,}", f"{total * size / 2**20:,.2f}", "in model.safetensors")
    for path, backbone in policy.frozen_backbones().items():
        count = sum(p.numel() for p in policy.get_submodule(path).parameters())
        named = f"named, not copied: {backbone.name}, sha256 {backbone.sha256[:16]}…"
        table.add_row(f"{path} (frozen)", f"{count:,}", f"{count * size / 2**20:,.2f}", named)
    if kept and not set(kept) <= counts.keys():
        table.add_row("", "", "", f"the recipe's freeze: {', '.join(kept)}")
    return table


def _file_table(directory: Path) -> Table:
    table = _table(f"Files of {directory}", "file", "bytes")
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("total", f"{sum(sizes.values()):,}")
    return table


def _provenance_table(loaded: LoadedPolicy) -> Table:
    table = _table("Provenance")
    table.add_row("dataset fingerprint", loaded.statistics.dataset_fingerprint)
    recipe, values = _recipe(loaded), dict(loaded.provenance)
    if recipe:
        table.add_row("recipe", _one_line(recipe))
        del values["recipe"]
    for kind in ("training", "validation"):
        if isinstance(values.get(kind), dict):
            del values[kind]
    for name, value in values.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {_plain(item)}" for key, item in value.items())
        table.add_row(name.replace("_", " "), _plain(value))
    return table


def _metrics_table(loaded: LoadedPolicy) -> Table | None:
    """The last means of training, and what held-out episodes gave; None where neither stands."""
    columns = {"training": "training", "validation": "held out"}
    found = [loaded.provenance.get(kind) for kind in columns]
    maps: list[dict[str, float]] = [one if isinstance(one, dict) else {} for one in found]
    names = dict.fromkeys(name for values in maps for name in values)
    if not names:
        return None
    table = _table("Metrics", "metric", *columns.values())
    for name in names:
        cells = [values.get(name) for values in maps]
        table.add_row(name, *("-" if cell is None else f"{cell:.5g}" for cell in cells))
    return table


def _recipe(loaded: LoadedPolicy) -> dict[str, Any]:
    recipe = loaded.provenance.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _one_line(recipe: dict[str, Any]) -> str:
    """Name, stage, objective and what most often differs; ``--json`` has all of it."""
    stage, objective = recipe.get("stage"), recipe.get("objective")
    parts = [str(recipe.get("name"))]
    if isinstance(stage, dict):
        names = stage.get("names") or []
        number = stage.get("number")
        parts.append(f"stage {number} of {len(names)} ({', '.join(names)})")
    if isinstance(objective, dict):
        parts.append(str(objective.get("name")))
    return "; ".join(parts) + " (all of it: --json)"


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value)
