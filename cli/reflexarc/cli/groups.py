"""The command groups, so that each command's module registers itself on one of them."""

from __future__ import annotations

import typer

data_app = typer.Typer(no_args_is_help=True, help="Collect and inspect demonstrations.")
eval_app = typer.Typer(no_args_is_help=True, help="Evaluate a served policy.")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints.")
runs_app = typer.Typer(no_args_is_help=True, help="List, plot and stop training runs.")
