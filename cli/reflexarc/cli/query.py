"""``reflexarc query``: ask a server for its contract, for one chunk, or for a recording again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.contract import ActionChunk, Observation, PolicyContract


def register(app: typer.Typer) -> None:
    app.command()(query)


def query(
    server: Annotated[
        str, typer.Option(help="ws://host:port asks by websocket, http://host:port by HTTP.")
    ] = "ws://127.0.0.1:8000",
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="CAMERA=FILE", help="An image as the contract wants it; repeatable."),
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="Numbers in the contract's layout, comma-separated.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="What to do, in words.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Noise for every image and state not given.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling noise.", min=0)] = None,
    retry_for: Annotated[float, typer.Option(help="Seconds to wait for a server.", min=0)] = 10.0,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Ask everything in a recording of serve-policy --record again, and compare.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Of --replay: largest difference that passes, in units of the action's standard "
            "deviation where the policy states one.",
            min=0,
        ),
    ] = 1e-3,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of --replay: the report as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", help="Draw predicted chunks against the recorded actions of --data."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Of --plot: demonstrations, as for eval offline.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Of --plot: a task's name or part of it; default: the first.")
    ] = "",
    episode: Annotated[
        int, typer.Option(help="Of --plot: which of the task's demonstrations.", min=0)
    ] = 0,
    every: Annotated[
        int, typer.Option(help="Of --plot: ask at every Nth recorded frame.", min=1)
    ] = 4,
) -> None:
    """Print the server's contract; with an observation, or --random, one chunk of actions.

    With --plot and --data: a picture of predicted chunks over the actions of one demonstration.

    With --replay: what the server answers otherwise than the recorded one; exit status 1 when
    actions differ by more than --tolerance, or another request is refused.
    """
    from reflexarc.client import HttpPolicyClient, PolicyClient

    if replay is not None and (image or state or instruction or random):
        raise ConfigError("--replay sends what was recorded; leave out the rest", field="replay")
    kind = HttpPolicyClient if server.startswith("http") else PolicyClient
    with kind(server, retry_for=retry_for) as client:
        if replay is not None:
            from reflexarc.cli.query_replay import replay_recording

            same = replay_recording(replay, client, tolerance, output)
            raise typer.Exit(0 if same else 1)
        if plot is not None:
            from reflexarc.cli.query_plot import plot_episode

            plot_episode(
                client, plot, data, task=task, episode=episode, every=every, seed=seed or 0
            )
            return
        if not (image or state or instruction or random):
            _print_contract(client.contract, client.metadata)
            return
        observation = _observation(
            client.contract, image or [], state, instruction, random=random, seed=seed
        )
        _print_chunk(client.contract, client.infer(observation))


def _observation(
    contract: PolicyContract,
    image: Sequence[str],
    state: str | None,
    instruction: str | None,
    *,
    random: bool,
    seed: int | None,
) -> Observation:
    """What was given on the command line; the contract check names what is missing."""
    from reflexarc.contract import Observation, check_observation

    images = dict(_read_image(text) for text in image)
    numbers: Any = np.zeros(0) if state is None else _read_state(state)
    if random:
        rng = np.random.default_rng(seed)
        for camera in contract.cameras:
            shape = (camera.height, camera.width, 3)
            images.setdefault(camera.name, rng.integers(0, 256, shape, dtype=np.uint8))
        if state is None:
            numbers = rng.uniform(-0.1, 0.1, contract.state.dimension)
    observation = Observation(images, numbers, instruction=instruction, seed=seed, step_index=0)
    check_observation(contract, observation)
    return observation


def _read_image(text: str) -> tuple[str, Any]:
    from PIL import Image

    camera, separator, path = text.partition("=")
    if not separator:
        raise ConfigError(f"--image {text!r}: write CAMERA=FILE", field="image")
    try:
        with Image.open(Path(path)) as opened:
            return camera, np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--image {text!r}: {error}", field="image") from error


def _read_state(text: str) -> Any:
    try:
        return np.array([float(part) for part in text.split(",")])
    except ValueError as error:
        raise ConfigError(
            f"--state {text!r}: write numbers separated by commas", field="state"
        ) from error


def _print_contract(contract: PolicyContract, metadata: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{contract.family}, protocol {contract.protocol_version}")
    table.add_column("part")
    table.add_column("what")
    for camera in contract.cameras:
        steps = ", ".join(camera.steps) or "as rendered"
        source = f"from {camera.source_height}x{camera.source_width}: {steps}"
        table.add_row(f"image {camera.name}", f"uint8 {camera.height}x{camera.width} RGB, {source}")
    table.add_row("state", f"{contract.state.layout} ({contract.state.dimension} numbers)")
    table.add_row("instruction", "needed" if contract.needs_language else "not needed")
    action = contract.action
    table.add_row("actions", f"{action.horizon} x {action.dimension}: {', '.join(action.names)}")
    table.add_row("", f"{action.kind} at {action.control_hz:g} Hz")
    if action.gripper is not None:
        table.add_row("gripper", f"{action.gripper.open:g} opens, {action.gripper.closed:g} closes")
    table.add_row("sampling", ", ".join(f"{k} {v}" for k, v in metadata["sampling"].items()))
    table.add_row("checkpoint", contract.checkpoint_fingerprint[:16] or "none")
    Console().print(table)


def _print_chunk(contract: PolicyContract, chunk: ActionChunk) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(chunk.actions)} actions, seed {chunk.seed}")
    for name in ("step", *contract.action.names):
        table.add_column(name, justify="right")
    for step, action in enumerate(chunk.actions):
        table.add_row(str(step), *(f"{value:.4f}" for value in action))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {ms:.2f}" for name, ms in sorted(chunk.timing.items())))
