"""What the commands that measure a served policy share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from reflexarc.contract.errors import NotReadyError, ServerUnavailableError

DEFAULT_SERVER = "ws://127.0.0.1:8000"
DEFAULT_RETRY_FOR = 60.0
EXIT_SERVER_UNAVAILABLE = 3
LOG_COLUMNS = 140

Server = Annotated[str, typer.Option(help="Address that serve-policy printed.")]
RetryFor = Annotated[
    float, typer.Option(help="Seconds to wait for a server that does not answer.", min=0)
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling noise.", min=0, max=2**32 - 1)]


@contextmanager
def exit_when_unavailable(server: str, output: Path) -> Iterator[None]:
    """A server that stays silent ends the command with status 3, and says how to resume."""
    try:
        yield
    except (ServerUnavailableError, NotReadyError) as error:
        typer.secho(f"error [{error.code}]: {error.message}", fg=typer.colors.RED, err=True)
        results = output / "results.jsonl"
        kept = f"Finished episodes are kept in {results}. " if results.is_file() else ""
        typer.echo(
            f"{kept}Start the server (serve-policy --ckpt ...) at {server}, then run the same "
            "command: it resumes.",
            err=True,
        )
        raise typer.Exit(EXIT_SERVER_UNAVAILABLE) from error


def print_wide(renderable: Any) -> None:
    """Print a table of ``rich``, unbroken in a log file, which has no edge."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = LOG_COLUMNS
    console.print(renderable)
