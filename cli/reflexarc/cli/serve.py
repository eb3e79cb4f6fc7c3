"""``reflexarc serve``, also ``serve-policy``: a checkpoint behind websocket and HTTP."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require

if TYPE_CHECKING:
    from reflexarc.contract import PolicyContract


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    checkpoint: Annotated[
        Path, typer.Option("--ckpt", "--checkpoint", help="Folder that training wrote.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    denoising_steps: Annotated[
        int | None,
        typer.Option(help="Euler steps where a request names none.", min=1, max=100),
    ] = None,
) -> None:
    """Serve a policy as action chunks until Ctrl-C or SIGTERM."""
    require("serve-policy", "server", "fastapi", "safetensors", "torch", "uvicorn")
    from reflexarc.policy.devices import resolve_device
    from reflexarc.server.lifecycle import PolicyServer, open_port
    from reflexarc.server.loading import CheckpointPolicy, verify_checkpoint
    from reflexarc.server.service import PolicyService

    contract = verify_checkpoint(checkpoint)
    resolved = str(resolve_device(device))
    listener = open_port(host, port)
    address = _address(host, int(listener.getsockname()[1]))
    typer.echo(f"Serving {checkpoint} at ws://{address} and http://{address} on {resolved}")
    typer.echo(f"Contract: {describe(contract)}")
    typer.echo(
        "Try next, in another terminal:\n"
        f"  reflexarc query --server ws://{address}\n"
        f"  reflexarc eval libero --server ws://{address} --suite libero_object --tasks 0"
    )
    service = PolicyService(
        lambda: CheckpointPolicy.load(checkpoint, resolved, denoising_steps=denoising_steps)
    )
    PolicyServer(service, on_ready=_announce_ready).run([listener])
    if service.load_error is not None:
        raise service.load_error


def _announce_ready() -> None:
    # What was loaded stays: leave it out of every later garbage collection, which otherwise
    # walks all of torch's objects in the middle of some request.
    gc.collect()
    gc.freeze()
    typer.echo("Ready. Ctrl-C ends it.")


def describe(contract: PolicyContract) -> str:
    """The contract in one line."""
    cameras = " + ".join(
        f"{camera.name} {camera.height}x{camera.width} {camera.orientation}"
        for camera in contract.cameras
    )
    language = ", an instruction" if contract.needs_language else ""
    action = contract.action
    return (
        f"{contract.family}: {cameras}, state {contract.state.layout}{language} -> "
        f"{action.horizon} actions of {action.dimension} ({action.kind}, {action.control_hz:g} Hz)"
    )


def _address(host: str, port: int) -> str:
    """What a person on this machine types; a wildcard address is reached by loopback."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"[{shown}]:{port}" if ":" in shown and not shown.startswith("[") else f"{shown}:{port}"
