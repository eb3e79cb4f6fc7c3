"""``reflexarc`` and ``serve-policy``: one typer application, one module a command group."""

from __future__ import annotations

import os
import sys

import typer

from reflexarc.cli import (
    bench,
    checkpoint,
    checkpoint_export,
    checkpoint_probe,
    checkpoint_sensitivity,
    data_collect,
    data_collect_mobile,
    data_convert,
    data_embed_language,
    data_generate,
    data_inspect,
    data_precompute,
    data_stats,
    demo,
    doctor,
    eval_checkpoints,
    eval_compare,
    eval_mobile,
    eval_offline,
    eval_replay_demos,
    eval_report,
    evaluate,
    query,
    runs,
    serve,
    train,
)
from reflexarc.cli.groups import checkpoint_app, data_app, eval_app, runs_app
from reflexarc.contract.errors import ReflexarcError

app = typer.Typer(
    name="reflexarc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def before_any_command() -> None:
    """Train robot policies, serve them as action chunks, evaluate them in LIBERO."""
    # Read when torch is first imported, which every command does after this. Threads that spin
    # while they wait for each other cost tenfold as soon as another process wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Importing a module of a group registers its commands there; the others register themselves here.
GROUP_MODULES = (
    checkpoint,
    checkpoint_export,
    checkpoint_probe,
    checkpoint_sensitivity,
    data_collect,
    data_collect_mobile,
    data_convert,
    data_embed_language,
    data_generate,
    data_inspect,
    data_precompute,
    data_stats,
    evaluate,
    eval_report,
    eval_checkpoints,
    eval_compare,
    eval_mobile,
    eval_offline,
    eval_replay_demos,
    runs,
)
for module in (train, serve, query, bench, demo, doctor):
    if hasattr(module, "register"):
        module.register(app)

app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(runs_app, name="runs")


@app.command()
def version() -> None:
    """Print the installed version."""
    from importlib.metadata import version as installed_version

    typer.echo(installed_version("reflexarc"))


def main() -> None:
    """Run the command line; a named error ends it with its message and exit status 2."""
    try:
        app()
    except ReflexarcError as error:
        typer.secho(f"error [{error.code}]: {error.message}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def serve_policy() -> None:
    """``serve-policy ...`` is ``reflexarc serve ...``."""
    sys.argv[1:1] = ["serve"]
    main()
