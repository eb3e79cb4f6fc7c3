"""``reflexarc checkpoint export CKPT OUT``: a folder fit to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import checkpoint_app
from reflexarc.contract.errors import ConfigError

_HALVES = ("fp16", "bf16")


@checkpoint_app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint's folder, or a run's with its best or last.")
    ],
    output: Annotated[Path, typer.Argument(help="The new folder; must not exist.")],
    half: Annotated[
        str, typer.Option(metavar="fp16|bf16", help="Store weights in half precision.")
    ] = "",
    merge_frozen: Annotated[
        bool,
        typer.Option(
            "--merge-frozen", help="Carry frozen encoders' weights, not their names alone."
        ),
    ] = False,
) -> None:
    """Copy a checkpoint without its training state, verified by loading it back.

    Frozen backbones stay named by id and sha256 unless merged; nothing is ever overwritten.
    """
    require("reflexarc checkpoint export", "server", "torch", "safetensors")
    from rich.console import Console

    from reflexarc.policy.export import export_checkpoint

    if half and half not in _HALVES:
        raise ConfigError(f"--half {half!r}: give one of {', '.join(_HALVES)}", field="half")
    chosen = cast("Literal['fp16', 'bf16'] | None", half or None)
    done = export_checkpoint(checkpoint, output, half=chosen, merge_frozen=merge_frozen)
    say = Console(soft_wrap=True, markup=False, highlight=False).print
    say(f"Written and loaded back: {done.directory}, fingerprint {done.fingerprint[:12]}…")
    say(f"Size: {done.bytes_before / 2**20:,.2f} MiB before, {done.bytes_after / 2**20:,.2f} after")
    if half:
        change = done.change
        say(f"Largest change by {half}: {change.absolute:.3g} in {change.tensor or 'no weight'}, "
            f"{change.relative:.2%} of the largest weight there")  # fmt: skip
    for path, backbone in done.source.policy.frozen_backbones().items():
        how = "Carried in it" if merge_frozen else "Needed beside it"
        say(f"{how}: {backbone.name} as {path}, sha256 {backbone.sha256[:12]}…")
