"""Ask the process that trains a run to save and stop, and see whether it did."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from reflexarc.contract.errors import ConfigError
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.runs.overview import require_run, state_of
from reflexarc.training.runs.process import is_locked, read_process

_POLL_SECONDS = 0.1


def stop_run(
    folder: Path, *, patience: float, log: Callable[[str], None] = lambda line: None
) -> str:
    """Send SIGTERM to the process that trains here, wait for it, and say what became of the run.

    Args:
        folder: of the run.
        patience: seconds to wait for its current step and its checkpoint.
        log: told what is being waited for.

    Raises ConfigError, naming the mend, when no run stands here, nothing trains, the process is
    not on this machine or not the one that was recorded, or it did not end in time.
    """
    run = require_run(folder)
    if not is_locked(folder):
        state, reason = state_of(run)
        raise ConfigError(
            f"{folder}: nothing trains here, the run is {state}"
            + (f" ({reason})" if reason else ""),
            field="run",
        )
    process = read_process(folder)
    if process is None or not process.is_alive_here():
        said = "no process" if process is None else f"process {process.pid} on {process.host}"
        raise ConfigError(
            f"{folder} is locked, but its record names {said}, which is not a process of this "
            "machine that trains there; stop it where it runs",
            field="run",
        )
    try:
        os.kill(process.pid, signal.SIGTERM)
    except PermissionError as error:
        raise ConfigError(
            f"process {process.pid} belongs to another user; run this as its owner", field="run"
        ) from error
    except ProcessLookupError:
        pass  # it ended in between, which is what was asked for
    log(f"asked process {process.pid} to save and stop")
    if not _wait_until_free(folder, patience):
        raise ConfigError(
            f"process {process.pid} still trains after {patience:g} s; it stops after its current "
            "step, so wait longer with --timeout",
            field="timeout",
        )
    return _what_happened(run)


def _wait_until_free(folder: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while is_locked(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _what_happened(run: RunFolder) -> str:
    state, reason = state_of(run)
    last = run.pointed("last")
    saved = "no checkpoint was saved" if last is None else f"`last` is {last.name}"
    if state == "stopped" and last is not None:
        return f"{run.path} stopped; {saved}. Continue with the same command and --resume."
    return f"{run.path} is {state}{f' ({reason})' if reason else ''}; {saved}."
