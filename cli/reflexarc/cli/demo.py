"""``reflexarc demo``: serve the demo checkpoint in one process, evaluate it from another."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.child_process import own_command
from reflexarc.cli.extras import require
from reflexarc.contract.errors import CheckpointError, ConfigError, ServerUnavailableError

START_SECONDS = 180.0
STOP_SECONDS = 40.0


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(demo)


def demo(
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of libero_object; default: 0,9, and 0-9 with --full.")
    ] = None,
    states: Annotated[
        str, typer.Option(help="Benchmark states; none of them was trained on.")
    ] = "45-47",
    full: Annotated[
        bool, typer.Option("--full", help="All ten tasks, states 40-49: the README's table.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port of the server; 0 takes a free one.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: outputs/demo/TIME.")
    ] = None,
    ckpt: Annotated[Path, typer.Option(help="Checkpoint to serve.")] = Path("checkpoints/demo"),
    demonstrations: Annotated[
        Path, typer.Option(help="Demonstrations for the blind replay.")
    ] = Path("checkpoints/demo_demonstrations"),
    workers: Annotated[int, typer.Option(help="Simulator processes.", min=1, max=16)] = 1,
) -> None:
    """Watch a trained policy act: starts a server, runs LIBERO against it, prints the table."""
    require("reflexarc demo", "all", "torch", "uvicorn", "libero", "mujoco", "h5py", "av")
    checkpoint = _find(ckpt, "--ckpt")
    recorded = _find(demonstrations, "--demonstrations")
    output = output or Path("outputs/demo") / datetime.now().strftime("%Y%m%d-%H%M%S")
    output.mkdir(parents=True, exist_ok=True)
    with serving(checkpoint, port or free_port(), output / "server.log") as url:
        arguments = [
            *("eval", "libero", "--server", url, "--suite", "libero_object"),
            *("--tasks", tasks or ("0-9" if full else "0,9")),
            *("--states", "40-49" if full else states),
            *("--baselines", "replay,blank", "--demonstrations", str(recorded)),
            *("--videos", "all", "--workers", str(workers), "--output", str(output)),
        ]
        typer.echo(f"Evaluating: reflexarc {' '.join(arguments)}")
        status = subprocess.run([*own_command(), *arguments], check=False).returncode
    if status != 0:
        typer.secho(
            f"The evaluation ended with status {status}; the server's log is {output}/server.log",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(status if status > 0 else 1)


def _find(path: Path, option: str) -> Path:
    """``path`` below the working directory, or below the repository that this code lies in."""
    if path.exists():
        return path
    repository = Path(__file__).resolve().parents[3]
    if not path.is_absolute() and (repository / path).exists():
        return repository / path
    if option == "--ckpt":
        raise CheckpointError(
            f"{path} does not exist, neither here ({Path.cwd()}) nor in {repository}; run this in "
            "a clone of the repository, or name a checkpoint with --ckpt",
            field="ckpt",
        )
    raise ConfigError(
        f"{path} does not exist; name a folder of LIBERO HDF5 files with {option}",
        field=option.removeprefix("--"),
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(checkpoint: Path, port: int, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """A server process that is ready, at the URL given; terminated when the block ends.

    Raises ServerUnavailableError with the end of its log when it does not become ready.
    """
    # By default SIGTERM would end this process at once and leave the server behind.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = ["serve", "--ckpt", str(checkpoint), "--port", str(port), *options]
    typer.echo(f"Serving:    reflexarc {' '.join(arguments)}  (log: {log})")
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*own_command(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", log)
            yield f"ws://127.0.0.1:{port}"
        finally:
            _stop(process)
            signal.signal(signal.SIGTERM, before)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            raise ServerUnavailableError(
                f"the server ended with status {status} before it was ready; its log ends with:\n"
                + _tail(log)
            )
        try:
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # the port is not open yet
        time.sleep(0.2)
    raise ServerUnavailableError(
        f"the server was not ready after {START_SECONDS:.0f} s; its log ends with:\n{_tail(log)}"
    )


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which lets an inference in flight finish; then, if it must be, SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
