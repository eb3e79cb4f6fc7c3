"""``reflexarc checkpoint inspect DIR``: what a checkpoint expects, returns, and came from."""

from __future__ import annotations

import json
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
    ):
        console.print(table)


def _as_json(loaded: LoadedPolicy) -> dict[str, Any]:
    return {
        "directory": str(loaded.directory),
        "fingerprint": loaded.fingerprint,
        "contract": loaded.policy.contract.model_dump(mode="json"),
        "config": loaded.policy.config.model_dump(mode="json"),
        "parameters": dict(loaded.policy.component_parameters()),
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
    table = _table("Trained parameters", "component", "parameters")
    counts = policy.component_parameters()
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("total", f"{sum(counts.values()):,}")
    for path, backbone in policy.frozen_backbones().items():
        table.add_row(f"{path} (frozen)", f"{backbone.name}, sha256 {backbone.sha256[:16]}…")
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
    for name, value in loaded.provenance.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    return table
