"""Which process trains in a run's folder, and how the last one ended: ``process.json``.

The lock tells whether a process trains; this tells which. A number alone would not do: it may
belong to another program by now, so what the system knows of the process's start stands beside it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = "run.lock"
PROCESS_FILE = "process.json"


@dataclass(frozen=True)
class RunProcess:
    """The process that trains, or trained last, in a run's folder.

    Attributes:
        pid, host: of the process.
        started: what the system says of its start; see :func:`start_of`.
        ended: None while it runs, and for ever when it was killed.
        reason: the message of the error that ended it.
    """

    pid: int
    host: str
    started: str
    ended: str | None = None
    reason: str | None = None

    def is_alive_here(self) -> bool:
        """Whether this very process runs on this machine."""
        return self.host == socket.gethostname() and start_of(self.pid) == self.started


def start_of(pid: int) -> str | None:
    """When a process began, in a form that no other process shares; None when there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The second field is the program's name in brackets, which may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else f"{boot}/{fields[19]}"
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    import psutil

    try:
        return repr(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def read_process(folder: Path) -> RunProcess | None:
    """What stands in a run's folder; None when it holds no record that can be read."""
    try:
        return RunProcess(**json.loads((folder / PROCESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def recorded_process(folder: Path) -> Iterator[None]:
    """Within the block the folder names this process; afterwards it says how the block ended."""
    pid = os.getpid()
    process = RunProcess(pid=pid, host=socket.gethostname(), started=start_of(pid) or "")
    _write(folder, process)
    try:
        yield
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        _write(folder, replace(process, ended="failed", reason=said))
        raise
    _write(folder, replace(process, ended="finished"))


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    path = folder / LOCK_FILE
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to open: what its process says has to do
        process = read_process(folder)
        return process is not None and process.is_alive_here()


def _write(folder: Path, process: RunProcess) -> None:
    path = folder / PROCESS_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(asdict(process), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
