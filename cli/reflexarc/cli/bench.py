"""``reflexarc bench``: how much load a served policy takes, and how fast it answers under it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reflexarc.client.load import LoadSummary


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    server: Annotated[str, typer.Option(help="ws://host:port")] = "ws://127.0.0.1:8000",
    clients: Annotated[int, typer.Option(help="Connections.", min=1)] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second that arrive at random (Poisson); without it each client asks "
            "again as soon as it is answered."
        ),
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Sent with each request; goodput counts by it.")
    ] = None,
    think_ms: Annotated[
        float, typer.Option(help="Without --rate: pause before a client asks again.", min=0)
    ] = 0.0,
    duration: Annotated[float, typer.Option(help="Seconds that are measured.")] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before that.", min=0)] = 1.0,
    processes: Annotated[
        int, typer.Option(help="Of the load generator; 0 takes half of the processors.", min=0)
    ] = 0,
    instruction: Annotated[
        str, typer.Option(help="Sent where the policy needs one.")
    ] = "pick up the alphabet soup and place it in the basket",
    seed: Annotated[int, typer.Option(help="Of observations and arrivals.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Figures as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latencies as a picture (.png, .svg).")
    ] = None,
) -> None:
    """Load a server with observations in the shape of its contract, and print what it took.

    The generator first measures its own ceiling against a server that only answers, and says when
    it may have been the bottleneck.
    """
    from reflexarc.cli.extras import require
    from reflexarc.client.credentials import authorization
    from reflexarc.client.load import LoadSettings, run_load

    if plot is not None:
        require("reflexarc bench --plot", "sim", "matplotlib")
    settings = LoadSettings(
        server=server,
        clients=clients,
        rate=rate,
        think_ms=think_ms,
        deadline_ms=deadline_ms,
        seconds=duration,
        warm_up_seconds=warm_up,
        processes=processes,
        instruction=instruction,
        seed=seed,
        headers=authorization(),
    )
    summary = run_load(settings)
    _print(summary)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(summary.to_json(), indent=2) + "\n")
        temporary.replace(output)
    if plot is not None:
        from reflexarc.client.load.plot import plot_load

        plot_load(summary, plot)


def _print(summary: LoadSummary) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    settings = summary.settings
    load = "closed loop" if settings.rate is None else f"Poisson, {settings.rate:g}/s"
    table = Table(
        Column(no_wrap=True),
        Column(),
        title=f"{summary.family}, {settings.clients} clients, {load}",
    )
    table.show_header = False
    table.add_row("requests", f"{summary.requests} in {settings.seconds:g} s")
    table.add_row("answers a second", f"{summary.throughput:.1f}")
    latencies = ", ".join(f"{name} {value:.2f}" for name, value in summary.latency_ms.items())
    table.add_row("latency, ms", latencies or "nothing was answered")
    if settings.deadline_ms is not None:
        table.add_row(
            f"within {settings.deadline_ms:g} ms",
            f"{summary.goodput:.1f} a second, {summary.goodput_share:.1%} of what arrived",
        )
    if summary.fairness is not None:
        table.add_row("fairness (Jain)", f"{summary.fairness:.3f}")
    errors = ", ".join(f"{code} {count}" for code, count in summary.errors.items())
    table.add_row("errors", errors or "none")
    stated = ", ".join(f"{name} {value:.2f}" for name, value in summary.server_timing_ms.items())
    table.add_row("server states (median)", stated or "nothing")
    busy = f"{summary.generator_busy:.0%} busy"
    table.add_row("load generator", f"{summary.generator_processes} processes, {busy}")
    if summary.generator_ceiling is not None:
        table.add_row("load generator alone", f"{summary.generator_ceiling:.0f} requests a second")
    console = Console()
    console.print(table)
    if summary.generator_limits:
        console.print(
            "The load generator may have been the bottleneck: give it --processes, or a machine "
            "of its own.",
            style="yellow",
        )
